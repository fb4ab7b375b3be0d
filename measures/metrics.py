"""What records add up to: speed, acceptance, and the speed-up, measured and by a formula."""

from __future__ import annotations

import resource
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch

from runs.records import Record
from self_speculation.drafts.costs import Costs
from self_speculation.results import SourceCounts


def speed(records: Sequence[Record], prefix: str = "") -> Record:
    """Totals over all examples, and the medians of single ones, which a stall of the machine leaves alone.

    Args:
        prefix: of the fields of one strategy, in records that hold two.
    """
    tokens = [record[f"{prefix}num_tokens"] for record in records]
    prefill = [record[f"{prefix}prefill_time"] for record in records]
    decode = [record[f"{prefix}decode_time"] for record in records]
    decoded = [record[f"{prefix}num_decode_tokens"] for record in records]
    each = [n / (p + d) for n, p, d in zip(tokens, prefill, decode, strict=True)]
    each_decode = [n / d for n, d in zip(decoded, decode, strict=True) if n]
    total_time = sum(prefill) + sum(decode)
    return {
        "tokens_per_second": sum(tokens) / total_time,
        "tokens_per_second_mean": statistics.mean(each),
        "tokens_per_second_median": statistics.median(each),
        "decode_tokens_per_second": sum(decoded) / sum(decode) if sum(decoded) else None,
        "decode_tokens_per_second_median": statistics.median(each_decode) if each_decode else None,
        "decode_ms_per_token": 1000 * sum(decode) / sum(decoded) if sum(decoded) else None,
        "time_to_first_token_ms": 1000 * statistics.median(prefill),
        "total_time": total_time,
        "num_tokens": sum(tokens),
        "empty_answers": tokens.count(0),
    }


def speeds(records: Sequence[Record], batch_size: int, prefix: str = "") -> Record:
    """Of all answers together and of single ones, the latter called as what they are in a batch."""
    together = {f"{prefix}throughput": throughput(records, prefix)}
    if batch_size == 1:
        return {**together, f"{prefix}speed": speed(records, prefix)}
    return {**together, f"{prefix}speed_shared_with_the_batch": _speed_in_batch(records, prefix)}


def _speed_in_batch(records: Sequence[Record], prefix: str) -> Record:
    """What of `speed` means something where the times of answers overlap."""
    names = (
        "tokens_per_second_median", "decode_tokens_per_second_median", "time_to_first_token_ms",
    )  # fmt: skip
    of_each = speed(records, prefix)
    return {name: of_each[name] for name in names}


def throughput(records: Sequence[Record], prefix: str = "") -> Record:
    """Of all answers together: tokens over the wall time of the run, which is that of its slowest rank."""
    tokens = [record[f"{prefix}num_tokens"] for record in records]
    by_rank: dict[int, float] = defaultdict(float)
    for record in records:
        by_rank[record.get("rank", 0)] += _wall_time(record, prefix)
    wall_time = max(by_rank.values())
    return {
        "tokens_per_second": sum(tokens) / wall_time,
        "wall_time": wall_time,
        "num_tokens": sum(tokens),
        "empty_answers": tokens.count(0),
    }


def throughput_ratio(records: Sequence[Record], baseline: str) -> Record:
    """As `speedup`, of batches: what is compared is not examples but windows of them, each of which the one
    strategy answered right after the other.
    """
    windows = _windows(records, ("", baseline))
    identical = sum(record["tokens"] == record[f"{baseline}tokens"] for record in records)
    return {**_compared("throughput_ratio", windows, baseline, wall_pace), "identical_outputs": identical}


def _windows(records: Sequence[Record], prefixes: Sequence[str]) -> list[Record]:
    """Tokens and wall time of each window."""
    sums: dict[int, Record] = defaultdict(lambda: defaultdict(float))
    for record in records:
        window = sums[record["window"] if "window" in record else record["index"]]
        for prefix in prefixes:
            window[f"{prefix}num_tokens"] += record[f"{prefix}num_tokens"]
            window[f"{prefix}wall_time"] += _wall_time(record, prefix)
    return list(sums.values())


def _wall_time(record: Record, prefix: str) -> float:
    # A run that began before wall times were taken goes on with --resume; its examples were alone.
    alone = record[f"{prefix}prefill_time"] + record[f"{prefix}decode_time"]
    return record.get(f"{prefix}wall_time", alone)


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
        "drafts_by_source": _by_source(records),
    }


def speedup(records: Sequence[Record], baseline: str) -> Record:
    """Of one strategy over another on the same prompts, by tokens per second; `baseline` is the prefix of the
    other's fields.

    The two answered each prompt one right after the other, so the ratio of an example means something on a
    busy machine too, and the median of these ratios is the speed-up. A ratio of totals is dominated by an
    example that met a stall. Sampled outputs differ in length, so times alone would not compare.

    `..._interval` is where the median lies with a confidence of 90 %; None with fewer than five examples.
    """
    identical = sum(record["tokens"] == record[f"{baseline}tokens"] for record in records)
    return {
        **_compared("speedup", records, baseline, answer_pace),
        **_compared("decode_speedup", records, baseline, decode_pace),
        "identical_outputs": identical,
    }


# (record, prefix of one strategy's fields) -> tokens, and the seconds that they took.
Pace = Callable[[Record, str], tuple[int, float]]


def answer_pace(record: Record, prefix: str) -> tuple[int, float]:
    """Of the whole answer."""
    return record[f"{prefix}num_tokens"], record[f"{prefix}prefill_time"] + record[f"{prefix}decode_time"]


def decode_pace(record: Record, prefix: str) -> tuple[int, float]:
    """Of all tokens but the first."""
    return record[f"{prefix}num_decode_tokens"], record[f"{prefix}decode_time"]


def wall_pace(record: Record, prefix: str) -> tuple[int, float]:
    """Of a window."""
    return record[f"{prefix}num_tokens"], record[f"{prefix}wall_time"]


def with_tokens(records: Sequence[Record], baseline: str, pace: Pace) -> list[Record]:
    """The examples that can be compared: neither side's answer is empty."""
    return [record for record in records if pace(record, "")[0] and pace(record, baseline)[0]]


def ratio_of_totals(records: Sequence[Record], baseline: str, pace: Pace) -> float:
    def rate(prefix: str) -> float:
        tokens, seconds = zip(*(pace(record, prefix) for record in records), strict=True)
        return sum(tokens) / sum(seconds)

    return rate("") / rate(baseline)


def _compared(name: str, records: Sequence[Record], baseline: str, pace: Pace) -> Record:
    records = with_tokens(records, baseline, pace)
    each = [ratio_of_totals([record], baseline, pace) for record in records]
    return {
        name: statistics.median(each) if each else None,
        f"{name}_quartiles": quartiles(each),
        f"{name}_interval": median_interval(each),
        f"{name}_of_totals": ratio_of_totals(records, baseline, pace) if each else None,
        f"{name}_faster": sum(ratio > 1 for ratio in each),
        f"{name}_examples": len(each),
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


def _by_source(records: Sequence[Record]) -> dict[str, dict[str, int]]:
    """Rounds, drafted and accepted tokens of each source of drafts, in the order of their names."""
    found: dict[str, list[SourceCounts]] = defaultdict(list)
    for record in records:
        for source, counts in record.get("drafts_by_source", {}).items():
            # A run that began before fields had names goes on with --resume.
            named = isinstance(counts, Mapping)
            found[source].append(SourceCounts(**counts) if named else SourceCounts(*counts))
    totals = {source: SourceCounts(*map(sum, zip(*all_, strict=True))) for source, all_ in found.items()}
    return {source: totals[source]._asdict() for source in sorted(totals)}


def _by_position(records: Sequence[Record], field: str) -> list[int]:
    longest = max(len(record[field]) for record in records)
    return [sum(record[field][i] for record in records if i < len(record[field])) for i in range(longest)]
