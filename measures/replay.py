"""What self-speculation would do, read off what each exit would have guessed; no model needed.

Along a fixed greedy output, the token that exit layer E drafts after any accepted prefix is the argmax of its
logits at that position with the output as input. So one list of booleans for each exit, "its guess at output
position i is output token i", decides every round for every draft length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

LONGEST_DRAFT = 20  # considered beyond the grid


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
        """Seconds that the rounds take, by what a draft step and a verification behind k drafts cost."""
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
