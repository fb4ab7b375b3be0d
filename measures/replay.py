"""The rounds of self-speculation, read off what each exit would guess along a greedy output.

Along a fixed greedy output, exit layer E drafts, after any accepted prefix, the argmax of its logits with the
output as input. So one list of booleans per exit, "the exit guesses output token i", decides every round for
every draft length.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import numpy

from measures.timed_runs import BASELINE
from runs.records import Record
from self_speculation.results import DraftStats

Cell = tuple[int, int]  # exit layer, draft length


# Exit layer -> (drafted tokens of a round, its cost in plain steps) pairs, in ascending order.
Costs = Mapping[int, Sequence[tuple[float, float]]]


def costs_of(cells: Mapping[Cell, Sequence[Record]]) -> Costs:
    """The costs of rounds, by records of cells and plain decoding in turn.

    A round's cost is a median of ratios to the plain steps beside it, since a machine's pace changes.
    """
    costs: dict[int, list[tuple[float, float]]] = {}
    for (exit_layer, _), records in sorted(cells.items()):
        drafted, ratios = [], []
        for record in records:
            if record["num_decode_tokens"] and (number := record[f"{BASELINE}num_decode_tokens"]):
                stats = DraftStats.from_rows(record["drafts"])
                plain_step = record[f"{BASELINE}decode_time"] / number
                ratios.append(record["decode_time"] / stats.num_verifications / plain_step)
                drafted.append(stats.num_drafted / stats.num_verifications)
        if ratios:
            own = statistics.mean(drafted), statistics.median(ratios)
            costs.setdefault(exit_layer, []).append(own)
    return costs


def round_cost(costs: Costs, exit_layer: int, num_drafted: int) -> float:
    """Plain steps of a draft and its verification; between measured exits and lengths it is interpolated."""
    by_exit = []
    for points in costs.values():
        drafted, steps = zip((0, 1.0), *points, strict=True)
        by_exit.append(numpy.interp(num_drafted, drafted, steps))
    return float(numpy.interp(exit_layer, [*costs], by_exit))


def replayed(record: Record, costs: Costs, cell: Cell) -> Record:
    """An example of `sweeping.Predicted` as `timed_runs.measure_examples` would record it.

    Nothing drafts the first token. Drafts are as long as the cell's, where `max_tokens` leaves room.
    """
    exit_layer, draft_length = cell
    matches, num_decoded = record["matches"][str(exit_layer)], len(record["tokens"]) - 1
    stats, position = DraftStats(), 1
    while position < len(matches):
        k = min(draft_length, record["max_tokens"] - position - 1)
        draft = matches[position : position + k]
        accepted = len(draft) - len(draft.lstrip("1"))
        emitted = min(accepted + 1, len(matches) - position)
        stats.add("exit", drafted=k, accepted=accepted, emitted=emitted)
        position += emitted
    steps = sum(n * round_cost(costs, exit_layer, kind.drafted) for kind, n in stats.rounds.items())
    plain = record["decode_time"]
    found = {"window": record["index"], "rank": 0, "batch_size": 1, "drafts": stats.to_rows()}
    for prefix, decode_time in {"": steps * plain / max(1, num_decoded), BASELINE: plain}.items():
        found |= {
            f"{prefix}tokens": record["tokens"],
            f"{prefix}num_tokens": record["num_tokens"],
            f"{prefix}num_decode_tokens": num_decoded,
            f"{prefix}prefill_time": record["prefill_time"],
            f"{prefix}decode_time": decode_time,
            f"{prefix}wall_time": record["prefill_time"] + decode_time,
        }
    return found
