"""What self-speculation would do, read off what each exit would have guessed; no model needed.

Along a fixed greedy output, the token that exit layer E drafts after any accepted prefix is the argmax of its
logits at that position with the output as input. So one list of booleans for each exit, "its guess at output
position i is output token i", decides every round for every draft length.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy

from measures import metrics
from runs.records import Record
from self_speculation.decoding.tally import Tally
from self_speculation.drafts.costs import Costs

LONGEST_DRAFT = 20  # tried where draft lengths are not those of the grid

# (which tokens of an output an exit guesses right, position in the output) -> how many tokens to draft there
DraftLength = Callable[[Sequence[bool], int], int]


def replay(matches: Sequence[bool], max_tokens: int, draft_length: Callable[[int], int]) -> Tally:
    """The rounds that an output takes.

    Args:
        matches: for each output token, an end id included, whether the exit guesses it. The first one comes
            from the prompt and is not drafted.
        max_tokens: the most tokens that the output could have had.
        draft_length: how many tokens to draft for output positions i, i+1, ...
    """
    rounds = Tally()
    position = 1
    while position < len(matches):
        k = min(draft_length(position), max_tokens - position - 1)
        run = run_length(matches, position, k)
        emitted = min(run + 1, len(matches) - position)
        rounds.add("exit", drafted=k, accepted=run, emitted=emitted)
        position += emitted
    return rounds


def run_length(matches: Sequence[bool], position: int, longest: int) -> int:
    """Right guesses in a row from a position on, at most `longest`."""
    run = 0
    while run < longest and position + run < len(matches) and matches[position + run]:
        run += 1
    return run


def predicted_cell(records: Sequence[Record], costs: Costs, exit_layer: int, draft_length: int) -> Record:
    """The row of a sweep's table for one exit layer and draft length.

    Besides, `speedup_draws` has a speed-up for each draw of the costs.

    Args:
        records: of outputs, with what each exit would have guessed along them.
        costs: what a plain step, a draft step and a verification take.
    """
    rounds = [_rounds(record, exit_layer, lambda *_: draft_length) for record in records]
    seconds = _seconds(records, rounds, costs, exit_layer)
    plain = _plain_seconds(records, costs)
    speedups = _ratios(plain, seconds)
    draws = [
        statistics.median(_ratios(_plain_seconds(records, draw), _seconds(records, rounds, draw, exit_layer)))
        for draw in costs.draws
    ]
    tokens = [record["num_tokens"] for record in records]
    return {
        "mode": "predicted",
        "exit_layer": exit_layer,
        "num_speculations": draft_length,
        **metrics.acceptance([_counted(r) for r in rounds]),
        **times(sum(tokens), sum(seconds)),
        "tokens_per_second_median": statistics.median(_ratios(tokens, seconds)),
        "autoregressive_tokens_per_second_median": statistics.median(_ratios(tokens, plain)),
        **speedup_columns(
            statistics.median(speedups),
            metrics.quartiles(speedups),
            (float(numpy.quantile(draws, 0.05)), float(numpy.quantile(draws, 0.95))) if draws else None,
            sum(plain) / sum(seconds),
        ),
        "speedup_draws": draws,
    }


def beyond_the_grid(records: Sequence[Record], costs: Costs, exit_layers: Sequence[int]) -> list[Record]:
    """For each exit layer, the best fixed draft length, and the most that ending drafts early could reach."""
    plain = _plain_seconds(records, costs)

    def speedup(layer: int, draft_length: DraftLength) -> float:
        rounds = [_rounds(record, layer, draft_length) for record in records]
        return statistics.median(_ratios(plain, _seconds(records, rounds, costs, layer)))

    found = []
    for layer in exit_layers:
        lengths = range(1, LONGEST_DRAFT + 1)
        fixed = {k: speedup(layer, lambda *_, k=k: k) for k in lengths}
        ended = [speedup(layer, partial(run_length, longest=k)) for k in lengths]
        best = max(fixed, key=lambda k: fixed[k])
        found.append(
            {
                "exit_layer": layer,
                "best_draft_length": best,
                "speedup": fixed[best],
                "oracle_speedup": max(ended),
            }
        )
    return found


def times(num_tokens: int, total_time: float) -> Record:
    """The columns of a sweep's table about totals of time."""
    return {
        "num_tokens": num_tokens,
        "total_time": total_time,
        "time_per_token": total_time / max(num_tokens, 1),
        "tokens_per_second": num_tokens / total_time,
    }


def speedup_columns(
    median: float | None,
    quartiles: Sequence[float],
    interval: tuple[float, float] | None,
    of_totals: float | None,
) -> Record:
    """The columns of a sweep's table about the speed-up.

    Args:
        median: over the examples; None where there are no answers to compare.
        quartiles: of the speed-ups of single examples, empty where there are none.
        interval: where the median lies with a confidence of 90 %, as far as noise goes.
        of_totals: all seconds of one strategy by all those of the other.
    """
    return {
        "speedup": median,
        "speedup_q1": quartiles[0] if quartiles else None,
        "speedup_q3": quartiles[-1] if quartiles else None,
        "speedup_low": interval and interval[0],
        "speedup_high": interval and interval[1],
        "speedup_of_totals": of_totals,
    }


def rivals(rows: Sequence[Record], best: Mapping[str, Any]) -> list[Record]:
    """The other rows of the best one's mode which may be as fast: noise does not tell the two apart.

    Two predicted rows have the noise of one calibration, so each draw of it compares them. Measured ones are
    told apart where their ranges are.
    """

    def may_be_as_fast(row: Record) -> bool:
        if row["mode"] == "predicted":
            draws = _ratios(row["speedup_draws"], best["speedup_draws"])
            return sum(ratio >= 1 for ratio in draws) > 0.05 * len(draws)
        return (row["speedup_high"] or row["speedup"] or 0.0) >= (best["speedup_low"] or best["speedup"])

    others = [row for row in rows if row is not best and row["mode"] == best["mode"]]
    return [row for row in others if may_be_as_fast(row)]


def _rounds(record: Record, exit_layer: int, draft_length: DraftLength) -> Tally:
    matches = [match == "1" for match in record["matches"][str(exit_layer)]]
    return replay(matches, record["max_tokens"], lambda position: draft_length(matches, position))


def _counted(rounds: Tally) -> Record:
    """The fields of a record that tell of drafts."""
    return {
        "num_verifications": rounds.num_verifications,
        "num_decode_tokens": rounds.num_emitted,
        "drafted_by_position": rounds.drafted_by_position,
        "accepted_by_position": rounds.accepted_by_position,
    }


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


def _plain_seconds(records: Sequence[Record], costs: Costs) -> list[float]:
    return [record["prefill_time"] + (len(record["tokens"]) - 1) * costs.plain_step for record in records]


def _ratios(first: Sequence[float], second: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(first, second, strict=True)]
