"""Drafts that are looked up (prompt lookup decoding): the last tokens occurred before, in a predicted output,
in the prompt or in the output, and the tokens that followed them there are the draft.
"""

from bisect import bisect_right
from collections import abc
from weakref import WeakKeyDictionary

from self_speculation.drafts.draft import DraftCost, LookupDrafts, Match
from self_speculation.requests.sequence import Sequence

# Ends a predicted output: no model has this id.
_END = -1


class NgramIndex:
    """The text of a sequence (prediction, prompt and output), and where the end of it occurred before.

    In prompt and output, the last occurrence of an n-gram counts; in the prediction, the first one after the
    place where the output left it. A token is added in constant time. A match goes on while the output does
    as the text did, however often the n-gram occurs: so the next one of many equal lines is found.

    Args:
        prediction: the output is expected to begin as it does.
        longest: tokens of the longest n-gram. Two must match, unless it is 1: after one it is chance.
    """

    def __init__(self, prediction: abc.Sequence[int], longest: int) -> None:
        self.ids: list[int] = []
        self._least = min(2, longest)
        self._lengths = range(longest, self._least - 1, -1)
        # N-gram -> positions of the tokens that followed it.
        self._predicted_at: dict[tuple[int, ...], list[int]] = {}
        self._last_at: dict[tuple[int, ...], int] = {}
        predicted = [*prediction, _END] if prediction else []
        for token in predicted:
            for ngram in self._ngrams():
                self._predicted_at.setdefault(ngram, []).append(len(self.ids))
            self.ids.append(token)
        self._num_predicted = len(predicted)
        self._left_at = 0  # the last predicted token that was not the output's
        self._matched = self._least if prediction else 0
        self._position = 0

    def extend(self, ids: abc.Iterable[int]) -> None:
        """Append tokens to the text."""
        for token in ids:
            # N-grams that end before this token have a follower only now, so none finds itself.
            self._last_at |= dict.fromkeys(self._ngrams(), len(self.ids))
            self.ids.append(token)

    def _ngrams(self) -> abc.Iterator[tuple[int, ...]]:
        """The n-grams at the end of the text, the longest one first."""
        return (tuple(self.ids[-n:]) for n in self._lengths if n <= len(self.ids))

    def locate(self) -> tuple[int, int]:
        """Find the longest n-gram at the end that the text has before.

        Returns:
            n, and the position after the earlier occurrence; (0, 0): there is none.
        """
        for ngram in self._ngrams():
            if positions := self._predicted_at.get(ngram):
                following = bisect_right(positions, self._left_at)
                return len(ngram), positions[min(following, len(positions) - 1)]
            if (position := self._last_at.get(ngram)) is not None:
                return len(ngram), position
        return 0, 0

    def find(self, sequence: Sequence, k: int) -> Match | None:
        """Follow the new tokens of the sequence, and draft k tokens. At the end of the text a draft repeats
        the tokens from the match on.
        """
        ids = self.ids
        start = len(self.ids)
        num_predicted = self._num_predicted
        self.extend(sequence.all_ids_from(start - num_predicted))
        for position in range(max(start, num_predicted + len(sequence.prompt_ids)), len(ids)):
            goes_on = self._matched > 0 and ids[self._position] == ids[position]
            if self._matched and not goes_on and self._position < num_predicted:
                self._left_at = self._position
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


class NgramDrafts(LookupDrafts):
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
