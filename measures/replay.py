"""The rounds of self-speculation, read off what each exit would guess along a greedy output.

Along a fixed greedy output, exit layer E drafts, after any accepted prefix, the argmax of its logits with the
output as input. So one list of booleans per exit, "the exit guesses output token i", decides every round for
every draft length.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy

from measures import metrics
from measures.timed_runs import BASELINE
from runs.records import Record
from self_speculation.results import DraftStats


@dataclass(frozen=True)
class Costs:
    """Seconds that real decoding took; costs in between are interpolated.

    Args:
        plain_step: a token without drafts.
        rounds: exit layer -> (drafted tokens of a round, seconds) pairs, in ascending order.
    """

    plain_step: float
    rounds: Mapping[int, Sequence[tuple[float, float]]]

    def round(self, exit_layer: int, num_drafted: int) -> float:
        """A draft and its verification."""
        by_exit = []
        for points in self.rounds.values():
            drafted, seconds = zip((0, self.plain_step), *points, strict=True)
            by_exit.append(float(numpy.interp(num_drafted, drafted, seconds)))
        return float(numpy.interp(exit_layer, list(self.rounds), by_exit))


def costs_of(cells: Mapping[tuple[int, int], Sequence[Record]]) -> Costs:
    """The costs of rounds, by records of cells (exit layer, draft length) and plain decoding in turn.

    A round's cost is a median of ratios to the plain steps beside it, since a machine's pace changes.
    """
    steps, rounds = list[float](), dict[int, list[tuple[float, float]]]()
    for (exit_layer, _), records in sorted(cells.items()):
        drafted, ratios = [], []
        for record in records:
            if record["num_decode_tokens"] and (number := record[f"{BASELINE}num_decode_tokens"]):
                stats = DraftStats.from_rows(record["drafts"])
                steps.append(record[f"{BASELINE}decode_time"] / number)
                ratios.append(record["decode_time"] / stats.num_verifications / steps[-1])
                drafted.append(stats.num_drafted / stats.num_verifications)
        if ratios:
            own = statistics.mean(drafted), statistics.median(ratios)
            rounds.setdefault(exit_layer, []).append(own)
    plain = statistics.median(steps) if steps else 0.0
    return Costs(plain, {layer: [(k, plain * ratio) for k, ratio in own] for layer, own in rounds.items()})


def replay(matches: Sequence[bool], max_tokens: int, draft_length: int) -> DraftStats:
    """The rounds of one output.

    Args:
        matches: whether the exit guesses each output token and the end id. Nothing drafts the first one.
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


def predicted_cell(records: Sequence[Record], costs: Costs, exit_layer: int, draft_length: int) -> Record:
    """The row of a sweep's table for one exit layer and draft length, from `sweeping.Predicted` records."""
    rounds, seconds, speedups = [], [], []
    for record in records:
        matches = [match == "1" for match in record["matches"][str(exit_layer)]]
        rounds.append(replay(matches, record["max_tokens"], draft_length))
        kinds = rounds[-1].rounds.items()
        decoding = sum(n * costs.round(exit_layer, kind.drafted) for kind, n in kinds)
        seconds.append(record["prefill_time"] + decoding)
        plain = record["prefill_time"] + (len(record["tokens"]) - 1) * costs.plain_step
        speedups.append(plain / seconds[-1])
    num_tokens = [record["num_tokens"] for record in records]
    low, high = metrics.median_interval(speedups) or (None, None)
    return {
        "mode": "predicted",
        "exit_layer": exit_layer,
        "num_speculations": draft_length,
        **metrics.acceptance(sum(rounds, DraftStats())),
        "num_tokens": sum(num_tokens),
        "total_time": sum(seconds),
        "tokens_per_second": sum(num_tokens) / sum(seconds),
        "tokens_per_second_median": statistics.median(
            n / time for n, time in zip(num_tokens, seconds, strict=True)
        ),
        "speedup": statistics.median(speedups),
        "speedup_low": low,
        "speedup_high": high,
    }
