"""What records add up to: speed, acceptance, and the speed-up, measured and by a formula."""

from __future__ import annotations

import resource
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest

import pandas
import torch

from runs.records import Record
from self_speculation.drafts.costs import Costs


def speed(records: Sequence[Record], prefix: str = "") -> Record:
    """How fast one strategy answered; a batch of one is a batch.

    Args:
        records: of `timed_runs.measure_examples`, one at least.
        prefix: of the strategy's fields, in records that hold two.

    Returns:
        Wall times are in seconds. `total_time` is the wall time of the slowest rank, so `tokens_per_second`
        is what all ranks give together. `tokens_per_second_median` is of windows: a stall of the machine
        leaves it alone. A window is an example, or with batches a few of them. The two medians of single
        answers are `time_to_first_token_ms`, and `decode_tokens_per_second_median` (None where no answer has
        two tokens), which in a batch is a row's share.
    """
    num_tokens = [record[f"{prefix}num_tokens"] for record in records]
    decode = [
        record[f"{prefix}num_decode_tokens"] / record[f"{prefix}decode_time"]
        for record in records
        if record[f"{prefix}num_decode_tokens"]
    ]
    total_time = float(_sums(records, "rank", prefix)["seconds"].max())
    return {
        "tokens_per_second": sum(num_tokens) / total_time,
        "tokens_per_second_median": float(_sums(records, "window", prefix)["rate"].median()),
        "decode_tokens_per_second_median": statistics.median(decode) if decode else None,
        "time_to_first_token_ms": 1000 * statistics.median(r[f"{prefix}prefill_time"] for r in records),
        "total_time": total_time,
        "num_tokens": sum(num_tokens),
        "empty_answers": num_tokens.count(0),
    }


def speedup(records: Sequence[Record], baseline: str) -> Record:
    """How much faster one strategy answered the same prompts than another, by tokens per second.

    Both answered each window one right after the other, so the ratio of a window means something on a busy
    machine too, and the median of these ratios is the speed-up. A ratio of totals is dominated by a window
    that met a stall. Sampled outputs differ in length, so times alone would not compare. Windows in which
    a strategy gave no token are left out.

    Args:
        records: of `timed_runs.measure_examples`, one at least.
        baseline: prefix of the other strategy's fields.

    Returns:
        `speedup_interval` is where the median lies with a confidence of 90 %, None with fewer than five
        windows. `decode_speedup` leaves the first token of each answer out; it is None where there were
        batches, since decode times of their rows overlap.
    """
    ratios, totals = _ratios(records, baseline, "num_tokens", "wall_time")
    decode = None
    if all(record["batch_size"] == 1 for record in records):
        of_examples, _ = _ratios(records, baseline, "num_decode_tokens", "decode_time")
        decode = statistics.median(of_examples) if of_examples else None
    return {
        "speedup": statistics.median(ratios) if ratios else None,
        "speedup_quartiles": quartiles(ratios),
        "speedup_interval": median_interval(ratios),
        "speedup_of_totals": totals,
        "speedup_faster": sum(ratio > 1 for ratio in ratios),
        "speedup_windows": len(ratios),
        "decode_speedup": decode,
        "identical_outputs": sum(record["tokens"] == record[f"{baseline}tokens"] for record in records),
    }


def _sums(
    records: Sequence[Record], by: str, prefix: str, tokens: str = "num_tokens", seconds: str = "wall_time"
) -> pandas.DataFrame:
    """Tokens, seconds and their ratio, of one strategy, for each value of the records' field `by`."""
    rows = [(r[by], r[f"{prefix}{tokens}"], r[f"{prefix}{seconds}"]) for r in records]
    table = pandas.DataFrame(rows, columns=["by", "tokens", "seconds"]).groupby("by").sum()
    return table.assign(rate=table["tokens"] / table["seconds"])


def _ratios(
    records: Sequence[Record], baseline: str, tokens: str, seconds: str
) -> tuple[list[float], float | None]:
    """The rate of ours by that of theirs: of each window in which both gave tokens, and of totals."""
    ours, theirs = (_sums(records, "window", prefix, tokens, seconds) for prefix in ("", baseline))
    both = (ours["tokens"] > 0) & (theirs["tokens"] > 0)
    ours, theirs = ours[both], theirs[both]
    if ours.empty:
        return [], None
    mine, other = ours.sum(), theirs.sum()
    totals = (mine["tokens"] / mine["seconds"]) / (other["tokens"] / other["seconds"])
    return (ours["rate"] / theirs["rate"]).tolist(), float(totals)


def acceptance(records: Sequence[Record]) -> Record:
    """How many drafted tokens were accepted, over all examples; rates are None where nothing was drafted.

    `acceptance_by_position` is of the drafts that were so long: long ones may be those of another source, or
    those that their source was sure of, so it may rise from one position to the next. `rounds_by_accepted` is
    of all rounds: [i] is the share of those that accepted more than i tokens.
    """
    drafted = _by_position(records, "drafted_by_position")
    accepted = _by_position(records, "accepted_by_position")
    rounds = sum(record["num_verifications"] for record in records)
    decoded = sum(record["num_decode_tokens"] for record in records)
    return {
        "acceptance_rate": sum(accepted) / sum(drafted) if drafted else None,
        "mean_accepted_length": decoded / rounds if rounds else None,
        "acceptance_by_position": [a / d for a, d in zip(accepted, drafted, strict=True)],
        "rounds_by_accepted": [a / rounds for a in accepted],
        "num_drafted": sum(drafted),
        "num_accepted": sum(accepted),
        "num_verifications": rounds,
        "drafts_by_source": by_source(record.get("drafts_by_source", {}) for record in records),
    }


def median_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Where the median of what values are drawn from lies, with a confidence of 90 %.

    None where there are fewer than five values.
    """
    from scipy.stats import quantile_test  # a second that runs without a comparison save

    interval = quantile_test(values, p=0.5).confidence_interval(0.9) if len(values) >= 5 else None
    return interval and (float(interval.low), float(interval.high))


def token_acceptance(records: Sequence[Record]) -> float | None:
    """alpha, the chance that a drafted token is accepted when all before it in its round were.

    Accepted tokens over tokens judged: those after a rejection were never judged.
    """
    judged = sum(_by_position(records, "judged_by_position"))
    return sum(_by_position(records, "accepted_by_position")) / judged if judged else None


def predicted_speedup(alpha: float, k: int, exit_layer: int, costs: Costs) -> float:
    """E[tokens] of a round over its cost in plain steps, E[tokens] = (1 - alpha^(k+1)) / (1 - alpha).

    With estimated costs that is E[tokens] / (k c + 1) (Leviathan et al., theorem 3.8).

    Args:
        alpha: see `token_acceptance`.
        k: tokens drafted per round.
    """
    tokens = k + 1 if alpha == 1 else (1 - alpha ** (k + 1)) / (1 - alpha)
    return tokens * costs.plain_step / costs.round(exit_layer, k)


def peak_memory_mib(device: torch.device) -> float:
    """The most memory held so far: on a GPU by tensors, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def quartiles(values: list[float]) -> list[float]:
    """The three of them; of a single value, that value three times."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def by_source(answers: Iterable[Mapping[str, Mapping[str, int]]]) -> dict[str, dict[str, int]]:
    """Of the `drafts_by_source` of answers: rounds, drafted and accepted tokens of each, sorted by name."""
    totals: dict[str, Counter[str]] = defaultdict(Counter)
    for answer in answers:
        for source, counts in answer.items():
            totals[source].update(counts)
    return {source: dict(totals[source]) for source in sorted(totals)}


def _by_position(records: Sequence[Record], field: str) -> list[int]:
    return [*map(sum, zip_longest(*(record[field] for record in records), fillvalue=0))]
