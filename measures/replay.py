"""What self-speculation would do, read off what each exit would have guessed; no model needed.

Along a fixed greedy output, the token that exit layer E drafts after any accepted prefix is the argmax of its
logits at that position with the output as input. So one list of booleans for each exit, "its guess at output
position i is output token i", decides every round for every draft length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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

    Args:
        records: of outputs, with what each exit would have guessed along them.
        costs: what a plain step, a draft step and a verification take.
    """
    rounds = [_rounds(record, exit_layer, lambda *_: draft_length) for record in records]
    seconds = [_seconds(record, r, costs, exit_layer) for record, r in zip(records, rounds, strict=True)]
    plain = [_plain_seconds(record, costs) for record in records]
    speedups = [a / b for a, b in zip(plain, seconds, strict=True)]
    num_tokens = sum(record["num_tokens"] for record in records)
    return {
        "mode": "predicted",
        "exit_layer": exit_layer,
        "num_speculations": draft_length,
        **metrics.acceptance([_counted(r) for r in rounds]),
        **times(num_tokens, sum(seconds), sum(plain) / sum(seconds), metrics.quartiles(speedups)),
    }


def beyond_the_grid(records: Sequence[Record], costs: Costs, exit_layers: Sequence[int]) -> list[Record]:
    """For each exit layer, the best fixed draft length, and the most that ending drafts early could reach."""
    plain = sum(_plain_seconds(record, costs) for record in records)

    def speedup(layer: int, draft_length: DraftLength) -> float:
        return plain / sum(
            _seconds(record, _rounds(record, layer, draft_length), costs, layer) for record in records
        )

    found = []
    for layer in exit_layers:
        fixed = {k: speedup(layer, lambda *_, k=k: k) for k in range(1, LONGEST_DRAFT + 1)}
        best = max(fixed, key=lambda k: fixed[k])
        found.append(
            {
                "exit_layer": layer,
                "best_draft_length": best,
                "speedup": fixed[best],
                "oracle_speedup": speedup(layer, lambda matches, at: run_length(matches, at, LONGEST_DRAFT)),
            }
        )
    return found


def times(num_tokens: int, total_time: float, speedup: float | None, quartiles: Sequence[float]) -> Record:
    """The columns of a sweep's table about time.

    Args:
        speedup: None where there are no answers to compare.
        quartiles: of the speed-ups of single examples, empty where there are none.
    """
    return {
        "num_tokens": num_tokens,
        "total_time": total_time,
        "time_per_token": total_time / max(num_tokens, 1),
        "tokens_per_second": num_tokens / total_time,
        "speedup": speedup,
        "speedup_q1": quartiles[0] if quartiles else None,
        "speedup_q3": quartiles[-1] if quartiles else None,
    }


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


def _seconds(record: Record, rounds: Tally, costs: Costs, exit_layer: int) -> float:
    decode = sum(n * costs.round(exit_layer, k) for k, n in rounds.rounds_by_length.items())
    return record["prefill_time"] + decode


def _plain_seconds(record: Record, costs: Costs) -> float:
    return record["prefill_time"] + (len(record["tokens"]) - 1) * costs.plain_step
