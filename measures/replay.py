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
from self_speculation.decoding.draft_stats import DraftStats
from self_speculation.drafts.costs import Costs

# The fields of a record that tell of drafts, and their names in a tally.
_COUNTED = {
    "num_verifications": "num_verifications", "num_decode_tokens": "num_emitted",
    "drafted_by_position": "drafted_by_position", "accepted_by_position": "accepted_by_position",
}  # fmt: skip


def replay(matches: Sequence[bool], max_tokens: int, draft_length: int) -> DraftStats:
    """The rounds that an output takes.

    Args:
        matches: for each output token, an end id included, whether the exit guesses it. The first one comes
            from the prompt and is not drafted.
        max_tokens: the most tokens that the output could have had.
        draft_length: tokens to draft in each round, where there is room for them.
    """
    rounds = DraftStats()
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

    Its interval holds the noise of prompts and that of the calibration. Besides, `speedup_by_turn` has the
    speed-up by the costs of each turn, and `seconds_by_prompt` what each record takes.

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
    by_prompt = _speedups(records, rounds, costs, exit_layer)
    by_turn = [statistics.median(_speedups(records, rounds, turn, exit_layer)) for turn in turns]
    of_prompts, of_turns = metrics.median_interval(by_prompt), metrics.median_interval(by_turn)
    low = high = None
    if of_prompts and of_turns:
        low, high = min(of_prompts[0], of_turns[0]), max(of_prompts[1], of_turns[1])
    return {
        "mode": "predicted",
        "exit_layer": exit_layer,
        "num_speculations": draft_length,
        **metrics.acceptance([{name: getattr(each, of) for name, of in _COUNTED.items()} for each in rounds]),
        "num_tokens": sum(num_tokens),
        "total_time": sum(seconds),
        "tokens_per_second": sum(num_tokens) / sum(seconds),
        "tokens_per_second_median": statistics.median(_ratios(num_tokens, seconds)),
        "speedup": statistics.median(by_prompt),
        "speedup_low": low,
        "speedup_high": high,
        "speedup_by_turn": by_turn,
        "seconds_by_prompt": seconds,
    }


def within_noise(rows: Sequence[Record], best: Mapping[str, Any]) -> list[Record]:
    """The rows of other cells that may be as fast as the best one with a confidence of 90 %, fastest first.

    A measured cell may be where its interval overlaps the best one's, or is not known. Other cells are
    compared by what was predicted of both: they share prompts and calibration, so each prompt and each turn
    compares them.
    """
    by_mode: dict[str, dict[tuple[int, int], Record]] = {"measured": {}, "predicted": {}}
    for row in rows:
        by_mode[row["mode"]][_cell(row)] = row
    measured, predicted = by_mode["measured"], by_mode["predicted"]

    def may_be_as_fast(row: Record) -> bool:
        if row["mode"] == "measured":
            return row["speedup"] is not None and (
                row.get("speedup_high") is None or row["speedup_high"] >= best["speedup_low"]
            )
        other = predicted[_cell(best)]
        intervals = [
            metrics.median_interval(_ratios(row["speedup_by_turn"], other["speedup_by_turn"])),
            metrics.median_interval(_ratios(other["seconds_by_prompt"], row["seconds_by_prompt"])),
        ]
        return any(interval is None or interval[1] >= 1 for interval in intervals)

    if best.get("speedup_low") is None:
        return []
    others = [row for cell, row in {**predicted, **measured}.items() if cell != _cell(best)]
    return sorted(filter(may_be_as_fast, others), key=lambda row: row["speedup"], reverse=True)


def _cell(row: Mapping[str, Any]) -> tuple[int, int]:
    return row["exit_layer"], row["num_speculations"]


def _speedups(
    records: Sequence[Record], rounds: Sequence[DraftStats], costs: Costs, exit_layer: int
) -> list[float]:
    """Of each record over plain decoding, by these costs."""
    plain = [record["prefill_time"] + (len(record["tokens"]) - 1) * costs.plain_step for record in records]
    return _ratios(plain, _seconds(records, rounds, costs, exit_layer))


def _seconds(
    records: Sequence[Record], rounds: Sequence[DraftStats], costs: Costs, exit_layer: int
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
