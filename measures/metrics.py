"""What records add up to: speed, acceptance, and the speed-up, measured and by a formula."""

from __future__ import annotations

import resource
import statistics
import sys
from collections.abc import Sequence

import torch

from runs.records import Record
from self_speculation.drafts.costs import Costs


def speed(records: Sequence[Record], prefix: str = "") -> Record:
    """Totals over all examples, and the spread over single ones.

    Args:
        prefix: of the fields of one strategy, in records that hold two.
    """
    tokens = [record[f"{prefix}num_tokens"] for record in records]
    prefill = [record[f"{prefix}prefill_time"] for record in records]
    decode = [record[f"{prefix}decode_time"] for record in records]
    decoded = [record[f"{prefix}num_decode_tokens"] for record in records]
    each = [n / (p + d) for n, p, d in zip(tokens, prefill, decode, strict=True)]
    total_time = sum(prefill) + sum(decode)
    return {
        "tokens_per_second": sum(tokens) / total_time,
        "tokens_per_second_mean": statistics.mean(each),
        "tokens_per_second_median": statistics.median(each),
        "decode_tokens_per_second": sum(decoded) / sum(decode) if sum(decoded) else None,
        "decode_ms_per_token": 1000 * sum(decode) / sum(decoded) if sum(decoded) else None,
        "time_to_first_token_ms": 1000 * statistics.mean(prefill),
        "total_time": total_time,
        "num_tokens": sum(tokens),
        "empty_answers": tokens.count(0),
    }


def acceptance(records: Sequence[Record]) -> Record:
    """How many drafted tokens were accepted, over all examples; rates are None where nothing was drafted."""
    drafted = _by_position(records, "drafted_by_position")
    accepted = _by_position(records, "accepted_by_position")
    rounds = sum(record["num_verifications"] for record in records)
    decoded = sum(record["num_decode_tokens"] for record in records)
    return {
        "acceptance_rate": sum(accepted) / sum(drafted) if drafted else None,
        "mean_accepted_length": decoded / rounds if rounds else None,
        "acceptance_by_position": [a / d for a, d in zip(accepted, drafted, strict=True)],
        "num_drafted": sum(drafted),
        "num_accepted": sum(accepted),
        "num_verifications": rounds,
        "drafts_by_source": _by_source(records),
    }


def speedup(records: Sequence[Record], baseline: str) -> Record:
    """Of one strategy over another on the same prompts, by tokens per second; `baseline` is the prefix of the
    other's fields.

    Sampled outputs differ in length, so times alone would not compare.
    """
    decoded = [r for r in records if r["num_decode_tokens"] and r[f"{baseline}num_decode_tokens"]]
    each = [
        (r["num_decode_tokens"] / r["decode_time"])
        / (r[f"{baseline}num_decode_tokens"] / r[f"{baseline}decode_time"])
        for r in decoded
    ]
    answered = [r for r in records if r["num_tokens"] and r[f"{baseline}num_tokens"]]
    ours, theirs = speed(records), speed(records, baseline)
    return {
        "speedup": ours["tokens_per_second"] / theirs["tokens_per_second"] if theirs["num_tokens"] else None,
        "decode_speedup": ours["decode_tokens_per_second"] / theirs["decode_tokens_per_second"]
        if each
        else None,
        "speedup_quartiles": quartiles([_rate(r, "") / _rate(r, baseline) for r in answered]),
        "decode_speedup_quartiles": quartiles(each),
        "identical_outputs": sum(record["tokens"] == record[f"{baseline}tokens"] for record in records),
    }


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


def _rate(record: Record, prefix: str) -> float:
    return record[f"{prefix}num_tokens"] / (record[f"{prefix}prefill_time"] + record[f"{prefix}decode_time"])


def quartiles(values: list[float]) -> list[float]:
    """The three of them; of a single value, that value three times."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def _by_source(records: Sequence[Record]) -> dict[str, list[int]]:
    """Rounds, drafted and accepted tokens of each source of drafts."""
    totals: dict[str, list[int]] = {}
    for record in records:
        for source, counts in record.get("drafts_by_source", {}).items():
            before = totals.get(source, [0, 0, 0])
            totals[source] = [a + b for a, b in zip(before, counts, strict=True)]
    return totals


def _by_position(records: Sequence[Record], field: str) -> list[int]:
    longest = max(len(record[field]) for record in records)
    return [sum(record[field][i] for record in records if i < len(record[field])) for i in range(longest)]
