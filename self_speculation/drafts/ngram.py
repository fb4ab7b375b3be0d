"""Drafts that are looked up (prompt lookup decoding): the last tokens occurred before, in a predicted output,
in the prompt or in the output, and the tokens that followed them there are the draft.
"""

from collections import abc
from weakref import WeakKeyDictionary

from self_speculation.decoding.sequence import Sequence
from self_speculation.drafts.draft import DraftCost, LookupDrafts, Match

# Ends a predicted output: no model has this id.
_END = -1


class NgramIndex:
    """The text of a sequence (prediction, prompt and output), and where the end of it occurred before.

    Maps every n-gram to the position after the last occurrence; n-grams of the prediction keep the first one.
    A token is added in constant time. A match of the longest n-gram goes on while the output does as the text
    did, however often the n-gram occurs: so the next one of many equal lines is found.

    Args:
        prediction: the output is expected to begin as it does.
        longest: tokens of the longest n-gram. Two must match, unless it is 1: after one it is chance.
    """

    def __init__(self, prediction: abc.Sequence[int], longest: int) -> None:
        self.ids: list[int] = []
        self._least = min(2, longest)
        self._num_predicted = 0
        self._lengths = range(longest, self._least - 1, -1)
        self._followed_at: dict[tuple[int, ...], int] = {}  # n-gram -> position of the token that followed it
        self.extend([*prediction, _END] if prediction else [])
        self._num_predicted = len(self.ids)
        self._matched = self._least if prediction else 0
        self._position = 0

    def extend(self, ids: abc.Iterable[int]) -> None:
        """Append tokens to the text."""
        for token in ids:
            # N-grams that end before this token have a follower only now, so none finds itself.
            position = len(self.ids)
            for n in self._lengths:
                if n <= position:
                    ngram = tuple(self.ids[position - n :])
                    if self._followed_at.get(ngram, position) >= self._num_predicted:
                        self._followed_at[ngram] = position
            self.ids.append(token)

    def locate(self) -> tuple[int, int]:
        """n of the longest n-gram at the end that the text has before, and the position after it there;
        (0, 0): none.
        """
        for n in self._lengths:
            if (position := self._followed_at.get(tuple(self.ids[-n:]))) is not None:
                return n, position
        return 0, 0

    def find(self, sequence: Sequence, k: int) -> Match | None:
        """Move on with the new tokens of the sequence, and look up what follows. At the end of the text the
        tokens repeat from the match.
        """
        ids = self.ids
        start = len(self.ids)
        num_predicted = self._num_predicted
        self.extend(sequence.ids_from(start - num_predicted))
        for position in range(max(start, num_predicted + len(sequence.prompt)), len(ids)):
            goes_on = self._matched and ids[self._position] == ids[position]
            self._matched = self._matched + 1 if goes_on else 0
            self._position += 1
        matched, position = self.locate()
        if matched > self._matched:
            self._matched = matched
            self._position = position
        if self._matched < self._least:
            return None
        name = "prediction" if self._position < num_predicted else "n-grams"
        period = len(ids) - self._position
        return Match(name, self._matched, [ids[self._position + i % period] for i in range(k)])


class TextDrafts(LookupDrafts):
    """Drafts the tokens that followed the end of a sequence earlier; `longest`: see `NgramIndex`."""

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._indices: WeakKeyDictionary[Sequence, NgramIndex] = WeakKeyDictionary()
        priors = [0.3 + 0.6 * matched / longest for matched in range(longest + 1)]
        self.costs = {"prediction": DraftCost(priors=priors), "n-grams": DraftCost(priors=priors)}

    def find(self, sequence: Sequence, k: int) -> Match | None:
        index = self._indices.get(sequence)
        if index is None:
            index = self._indices[sequence] = NgramIndex(sequence.prediction, self._longest)
        return index.find(sequence, k)
