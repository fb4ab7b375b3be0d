"""What self-speculation would do, read off what each exit would have guessed; no model needed.

Along a fixed greedy output, the token that exit layer E drafts after any accepted prefix is the argmax of its
logits at that position with the output as input. So one list of booleans for each exit, "its guess at output
position i is output token i", decides every round for every draft length.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from measures import metrics
from runs.records import Record
from self_speculation.decoding.tally import Tally
from self_speculation.drafts.costs import Costs

# The fields of a record that tell of drafts, and their names in a tally.
_COUNTED = {
    "num_verifications": "num_verifications", "num_decode_tokens": "num_emitted",
    "drafted_by_position": "drafted_by_position", "accepted_by_position": "accepted_by_position",
}  # fmt: skip


def replay(matches: Sequence[bool], max_tokens: int, draft_length: int) -> Tally:
    """The rounds that an output takes.

    Args:
        matches: for each output token, an end id included, whether the exit guesses it. The first one comes
            from the prompt and is not drafted.
        max_tokens: the most tokens that the output could have had.
        draft_length: tokens to draft in each round, where there is room for them.
    """
    rounds = Tally()
    position = 1
    while position < len(matches):
        k = min(draft_length, max_tokens - position - 1)
        right = sum(takewhile(bool, matches[position : position + k]))  # guesses in a row
        emitted = min(right + 1, len(matches) - position)
        rounds.add("exit", drafted=k, accepted=right, emitted=emitted)
        position += emitted
    return rounds


def predicted_cell(
    records: Sequence[Record], costs: Costs, turns: Sequence[Costs], exit_layer: int, draft_length: int
) -> Record:
    """The row of a sweep's table for one exit layer and draft length.

    Besides, `speedup_by_turn` has the speed-up by the costs of each turn of the calibration.

    Args:
        records: of outputs, with what each exit would have guessed along them.
        costs: medians of the calibration.
        turns: the costs that its single turns say, which tell how far noise goes.
    """
    matches = [[match == "1" for match in record["matches"][str(exit_layer)]] for record in records]
    limits = [record["max_tokens"] for record in records]
    rounds = [replay(*output, draft_length) for output in zip(matches, limits, strict=True)]
    num_tokens = [record["num_tokens"] for record in records]
    seconds = _seconds(records, rounds, costs, exit_layer)
    by_turn = [_speedup(records, rounds, turn, exit_layer) for turn in turns]
    interval = metrics.median_interval(by_turn)
    return {
        "mode": "predicted",
        "exit_layer": exit_layer,
        "num_speculations": draft_length,
        **metrics.acceptance([{name: getattr(each, of) for name, of in _COUNTED.items()} for each in rounds]),
        "num_tokens": sum(num_tokens),
        "total_time": sum(seconds),
        "tokens_per_second": sum(num_tokens) / sum(seconds),
        "tokens_per_second_median": statistics.median(_ratios(num_tokens, seconds)),
        "speedup": _speedup(records, rounds, costs, exit_layer),
        "speedup_low": interval and interval[0],
        "speedup_high": interval and interval[1],
        "speedup_by_turn": by_turn,
    }


def within_noise(rows: Sequence[Record], best: Mapping[str, Any]) -> list[Record]:
    """The other rows of the best one's mode that may be as fast, with a confidence of 90 %.

    Predicted rows share the noise of one calibration, so its turns compare them one by one. Measured rows
    may be as fast where their intervals overlap.
    """

    def may_be_as_fast(row: Record) -> bool:
        if row["mode"] == "measured":
            return (row.get("speedup_high") or 0.0) >= best["speedup_low"]
        interval = metrics.median_interval(_ratios(row["speedup_by_turn"], best["speedup_by_turn"]))
        return interval is not None and interval[1] >= 1

    if best.get("speedup_low") is None:
        return []
    return [row for row in rows if row is not best and row["mode"] == best["mode"] and may_be_as_fast(row)]


def _speedup(records: Sequence[Record], rounds: Sequence[Tally], costs: Costs, exit_layer: int) -> float:
    """Of the median record, over plain decoding, by these costs."""
    plain = [record["prefill_time"] + (len(record["tokens"]) - 1) * costs.plain_step for record in records]
    return statistics.median(_ratios(plain, _seconds(records, rounds, costs, exit_layer)))


def _seconds(
    records: Sequence[Record], rounds: Sequence[Tally], costs: Costs, exit_layer: int
) -> list[float]:
    """Of each record, with its rounds."""
    by_length = [each.rounds_by_length for each in rounds]
    cost = {k: costs.round(exit_layer, k) for k in set().union(*by_length)}
    return [
        record["prefill_time"] + sum(n * cost[k] for k, n in lengths.items())
        for record, lengths in zip(records, by_length, strict=True)
    ]


def _ratios(first: Sequence[float], second: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(first, second, strict=True)]
