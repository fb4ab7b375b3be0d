"""What self-speculation would do, read off what each exit would have guessed; no model needed.

Along a fixed greedy output, the token that exit layer E drafts after any accepted prefix is the argmax of its
logits at that position with the output as input. So one list of booleans for each exit, "its guess at output
position i is output token i", decides every round for every draft length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

from measures import metrics
from measures.calibration import Costs
from runs.records import Record

LONGEST_DRAFT = 20  # tried where draft lengths are not those of the grid

# (which tokens of an output an exit guesses right, position in the output) -> how many tokens to draft there
DraftLength = Callable[[Sequence[bool], int], int]


@dataclass
class Rounds:
    """Counts over all rounds of one or several outputs, as `GenerationStrategyResult` counts them."""

    num_verifications: int = 0
    num_decode_tokens: int = 0
    drafted_by_position: list[int] = field(default_factory=list)
    accepted_by_position: list[int] = field(default_factory=list)
    lengths: dict[int, int] = field(default_factory=dict)  # draft length -> rounds that had it

    def add(self, drafted: int, accepted: int, emitted: int) -> None:
        self.num_verifications += 1
        self.num_decode_tokens += emitted
        self.lengths[drafted] = self.lengths.get(drafted, 0) + 1
        for counts, n in ((self.drafted_by_position, drafted), (self.accepted_by_position, accepted)):
            counts += [0] * (max(drafted, accepted) - len(counts))
            for i in range(n):
                counts[i] += 1

    def time(self, draft_step: float, verification: Callable[[int], float]) -> float:
        """Seconds that the rounds take, by what a draft step and a verification of k drafts cost."""
        return sum(n * (k * draft_step + verification(k)) for k, n in self.lengths.items())


def replay(
    matches: Sequence[bool], max_tokens: int, draft_length: Callable[[int], int], rounds: Rounds
) -> None:
    """Go through the rounds that an output takes, and count them.

    Args:
        matches: for each output token, an end id included, whether the exit guesses it. The first one comes
            from the prompt and is not drafted.
        max_tokens: the most tokens that the output could have had.
        draft_length: how many tokens to draft for output positions i, i+1, ...
        rounds: where to count.
    """
    position = 1
    while position < len(matches):
        k = min(draft_length(position), max_tokens - position - 1)
        run = run_length(matches, position, k)
        emitted = min(run + 1, len(matches) - position)
        rounds.add(drafted=k, accepted=min(run, emitted), emitted=emitted)
        position += emitted


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
        **metrics.acceptance([asdict(r) for r in rounds]),
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


def times(num_tokens: int, total_time: float, speedup: float, quartiles: Sequence[float]) -> Record:
    """The columns of a sweep's table about time; `quartiles` of the speed-ups of single examples."""
    return {
        "num_tokens": num_tokens,
        "total_time": total_time,
        "time_per_token": total_time / max(num_tokens, 1),
        "tokens_per_second": num_tokens / total_time,
        "speedup": speedup,
        "speedup_q1": quartiles[0],
        "speedup_q3": quartiles[-1],
    }


def _rounds(record: Record, exit_layer: int, draft_length: DraftLength) -> Rounds:
    matches = [match == "1" for match in record["matches"][str(exit_layer)]]
    rounds = Rounds()
    replay(matches, record["max_tokens"], lambda position: draft_length(matches, position), rounds)
    return rounds


def _seconds(record: Record, rounds: Rounds, costs: Costs, exit_layer: int) -> float:
    decode = rounds.time(costs.draft_step[exit_layer], lambda k: costs.verification(exit_layer, k))
    return record["prefill_time"] + decode


def _plain_seconds(record: Record, costs: Costs) -> float:
    return record["prefill_time"] + (len(record["tokens"]) - 1) * costs.plain_step
