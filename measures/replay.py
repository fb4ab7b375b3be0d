"""The rounds of self-speculation, read off what each exit would guess along a greedy output.

Along a fixed greedy output, exit layer E drafts, after any accepted prefix, the argmax of its logits with the
output as input. So one list of booleans per exit, "the exit guesses output token i", decides every round for
every draft length.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from measures import metrics
from runs.records import Record
from self_speculation.drafts.costs import Costs
from self_speculation.results import DraftStats


def replay(matches: Sequence[bool], max_tokens: int, draft_length: int) -> DraftStats:
    """The rounds of one output.

    Args:
        matches: for each output token, with the end id, whether the exit guesses it. The prompt's pass gives
            the first one, so nothing drafts it.
        max_tokens: the longest output that the context and max_steps allow.
        draft_length: tokens per draft, where there is room for them.
    """
    rounds = DraftStats()
    position = 1
    while position < len(matches):
        k = min(draft_length, max_tokens - position - 1)
        accepted = sum(takewhile(bool, matches[position : position + k]))
        emitted = min(accepted + 1, len(matches) - position)
        rounds.add("exit", drafted=k, accepted=accepted, emitted=emitted)
        position += emitted
    return rounds


def predicted_cell(
    records: Sequence[Record], costs: Costs, turns: Sequence[Costs], exit_layer: int, draft_length: int
) -> Record:
    """The row of a sweep's table for one exit layer and draft length.

    The interval of its speed-up covers the noise of prompts and that of the calibration's turns.

    Args:
        records: outputs, and the tokens that each exit guesses along them.
        costs: medians of the calibration.
        turns: costs of each turn of the calibration.
    """
    rounds = [
        replay(
            [match == "1" for match in record["matches"][str(exit_layer)]], record["max_tokens"], draft_length
        )
        for record in records
    ]
    by_length = [each.rounds_by_length for each in rounds]
    drafted = set().union(*by_length)

    def seconds(costs: Costs) -> list[float]:
        """Of each record."""
        cost = {k: costs.round(exit_layer, k) for k in drafted}
        return [
            record["prefill_time"] + sum(n * cost[k] for k, n in lengths.items())
            for record, lengths in zip(records, by_length, strict=True)
        ]

    def speedups(costs: Costs) -> list[float]:
        """Of each record over plain decoding."""
        plain = [
            record["prefill_time"] + (len(record["tokens"]) - 1) * costs.plain_step for record in records
        ]
        return _ratios(plain, seconds(costs))

    num_tokens, took = [record["num_tokens"] for record in records], seconds(costs)
    by_prompt = speedups(costs)
    by_turn = [statistics.median(speedups(turn)) for turn in turns]
    intervals = [metrics.median_interval(by_prompt), metrics.median_interval(by_turn)]
    known = [interval for interval in intervals if interval] if all(intervals) else []
    return {
        "mode": "predicted",
        "exit_layer": exit_layer,
        "num_speculations": draft_length,
        **metrics.acceptance(sum(rounds, DraftStats())),
        "num_tokens": sum(num_tokens),
        "total_time": sum(took),
        "tokens_per_second": sum(num_tokens) / sum(took),
        "tokens_per_second_median": statistics.median(_ratios(num_tokens, took)),
        "speedup": statistics.median(by_prompt),
        "speedup_low": min((low for low, _ in known), default=None),
        "speedup_high": max((high for _, high in known), default=None),
        "speedup_by_turn": by_turn,
        "speedup_by_prompt": by_prompt,
    }


def within_noise(rows: Sequence[Record], best: Mapping[str, Any]) -> list[Record]:
    """The other cells that may be as fast as the best one (90 % confidence), fastest first.

    Measured cells are compared by their intervals. Predicted cells share prompts and calibration, so they are
    compared prompt by prompt and turn by turn, with the prediction of the best cell.
    """
    if best.get("speedup_low") is None:
        return []
    predicted = {_cell(row): row for row in rows if row["mode"] == "predicted"}
    measured = {_cell(row): row for row in rows if row["mode"] == "measured"}

    def may_be_as_fast(row: Record) -> bool:
        if row["speedup"] is None:
            return False
        if row["mode"] == "measured":
            return row.get("speedup_high") is None or row["speedup_high"] >= best["speedup_low"]
        names, other = ("speedup_by_turn", "speedup_by_prompt"), predicted[_cell(best)]
        intervals = [metrics.median_interval(_ratios(row[name], other[name])) for name in names]
        return any(interval is None or interval[1] >= 1 for interval in intervals)

    others = [row for row in (predicted | measured).values() if _cell(row) != _cell(best)]
    return sorted(filter(may_be_as_fast, others), key=lambda row: row["speedup"], reverse=True)


def _cell(row: Mapping[str, Any]) -> tuple[int, int]:
    return row["exit_layer"], row["num_speculations"]


def _ratios(first: Sequence[float], second: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(first, second, strict=True)]
