"""Drafts from a predicted output: text that a request expects in its answer, such as a file to be edited."""

from __future__ import annotations

from collections import abc, defaultdict

from self_speculation.decoding.sequence import Sequence
from self_speculation.drafts.draft import PerSequence
from self_speculation.drafts.ngram import TokenDrafts

# The n-grams that find the output in the prediction again: fewer tokens occur in too many places.
_SHORTEST, _LONGEST = 2, 8
# Matched tokens that `Guess.matched` distinguishes.
_MOST_MATCHED = 4


class PredictionDrafts(TokenDrafts):
    """What follows in `Sequence.prediction`; nothing for sequences without one."""

    name = "prediction"
    priors = tuple(0.5 + 0.1 * matched for matched in range(_MOST_MATCHED + 1))

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self._cursors = PerSequence(lambda sequence: _Cursor(sequence.prediction))

    def _find(self, sequence: Sequence, k: int) -> tuple[int, list[int]]:
        if not sequence.prediction:
            return 0, []
        cursor = self._cursors[sequence]
        cursor.follow(sequence.tokens)
        ids = cursor.next(k)
        return (1 + min(cursor.matched, _MOST_MATCHED - 1), ids) if ids or cursor.has_more else (0, [])


class _Cursor:
    """Where in a prediction an output has come to.

    A token that differs is taken for a replaced one, until n-grams of the output show up elsewhere.
    """

    def __init__(self, prediction: abc.Sequence[int]) -> None:
        self._ids = prediction
        self._position = 0  # of the token that is expected next
        self._known = 0  # tokens of the output that were followed
        self.matched = 0  # the last tokens of the output that the prediction has as well
        self._positions: dict[tuple[int, ...], list[int]] = defaultdict(list)  # n-gram -> positions after it
        for n in range(_SHORTEST, _LONGEST + 1):
            for start in range(len(prediction) - n + 1):
                self._positions[tuple(prediction[start : start + n])].append(start + n)

    @property
    def has_more(self) -> bool:
        return self._position < len(self._ids)

    def next(self, k: int) -> list[int]:
        return list(self._ids[self._position : self._position + k])

    def follow(self, output: abc.Sequence[int]) -> None:
        """Move on with the new tokens of an output."""
        for length in range(self._known + 1, len(output) + 1):
            if self.has_more and self._ids[self._position] == output[length - 1]:
                self._position, self.matched = self._position + 1, self.matched + 1
                continue
            self._position, self.matched = min(self._position + 1, len(self._ids)), 0
            for n in range(min(_LONGEST, length), _SHORTEST - 1, -1):
                if found := self._positions.get(tuple(output[length - n : length])):
                    self._position, self.matched = _nearest(found, self._position - n), n
                    break
        self._known = len(output)


def _nearest(positions: abc.Sequence[int], start: int) -> int:
    """The first one from `start` on, else the last one."""
    return next((position for position in positions if position >= start), positions[-1])
