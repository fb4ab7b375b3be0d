"""Drafts from a predicted output: text that a request expects in its answer, such as a file to be edited."""

from __future__ import annotations

from collections import abc, defaultdict
from weakref import WeakKeyDictionary

from self_speculation.decoding.sequence import Sequence
from self_speculation.drafts.ngram import LookupDrafts
from self_speculation.drafts.policy import Arm

# The n-grams that find the output in the prediction again: fewer tokens occur in too many places.
_SHORTEST, _LONGEST = 2, 8
# Matched tokens that are told apart.
_MOST_MATCHED = 4


class PredictionDrafts(LookupDrafts):
    """What follows in `Sequence.prediction`; nothing for sequences without one."""

    name = "prediction"
    arm = Arm(priors=[0.5 + 0.1 * matched for matched in range(_MOST_MATCHED + 1)])

    def __init__(self, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self._cursors: WeakKeyDictionary[Sequence, _Cursor] = WeakKeyDictionary()

    def _find(self, sequence: Sequence, k: int) -> tuple[int, list[int]]:
        if not sequence.prediction:
            return 0, []
        cursor = self._cursors.get(sequence)
        if cursor is None:
            cursor = self._cursors[sequence] = _Cursor(sequence.prediction)
        cursor.follow(sequence.tokens)
        return 1 + min(cursor.matched, _MOST_MATCHED - 1), cursor.next(k)


class _Cursor:
    """Position in the prediction; a mismatch counts as a substitution until an n-gram matches."""

    def __init__(self, prediction: abc.Sequence[int]) -> None:
        self._ids = prediction
        self._ends: dict[tuple[int, ...], list[int]] = defaultdict(list)  # where n-grams end
        for n in range(_SHORTEST, _LONGEST + 1):
            for end in range(n, len(prediction) + 1):
                self._ends[tuple(prediction[end - n : end])].append(end)
        self._position = 0  # of the token that is expected next
        self._known = 0  # tokens of the output that were followed
        self.matched = 0  # the last tokens of the output that the prediction has as well

    def next(self, k: int) -> list[int]:
        return list(self._ids[self._position : self._position + k])

    def follow(self, output: abc.Sequence[int]) -> None:
        """Move on with the new tokens of an output."""
        for length in range(self._known + 1, len(output) + 1):
            if self.next(1) == [output[length - 1]]:
                self._position, self.matched = self._position + 1, self.matched + 1
                continue
            self._position, self.matched = min(self._position + 1, len(self._ids)), 0
            for n in range(min(_LONGEST, length), _SHORTEST - 1, -1):
                if found := self._ends.get(tuple(output[length - n : length])):
                    start = self._position - n
                    # The first one from here on, else the last one.
                    self._position = next((end for end in found if end >= start), found[-1])
                    self.matched = n
                    break
        self._known = len(output)
