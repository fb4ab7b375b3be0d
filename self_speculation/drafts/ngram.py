"""Drafts that are looked up (prompt lookup decoding): the last tokens occurred before, in a predicted output,
in the prompt or in the output, and the tokens that followed them there are the draft.
"""

from collections import abc
from weakref import WeakKeyDictionary

from self_speculation.decoding.sequence import Sequence
from self_speculation.drafts.draft import Arm, LookupDrafts, Match

# Ends a predicted output: no model has this id.
_END = -1


class NgramIndex:
    """Maps every n-gram to the position after its last occurrence. A token is added in constant time.

    Args:
        lengths: values of n, in descending order.
        preferred: the beginning of the text. Its n-grams keep their positions when they occur again later.
    """

    def __init__(self, lengths: abc.Sequence[int], preferred: abc.Sequence[int] = ()) -> None:
        self._lengths, self.num_preferred = lengths, 0
        self.ids: list[int] = []
        self._followed_at: dict[tuple[int, ...], int] = {}  # n-gram -> position of the token that followed it
        self.extend(preferred)
        self.num_preferred = len(preferred)

    def extend(self, ids: abc.Iterable[int]) -> None:
        """Append tokens to the text."""
        for token in ids:
            # N-grams that end before this token have a follower only now, so none finds itself.
            position = len(self.ids)
            for n in self._lengths:
                if n <= position:
                    ngram = tuple(self.ids[position - n :])
                    if self._followed_at.get(ngram, position) >= self.num_preferred:
                        self._followed_at[ngram] = position
            self.ids.append(token)

    def locate(self, end: abc.Sequence[int]) -> tuple[int, int]:
        """n of the longest n-gram at this end that the text has, and the position after it; (0, 0): none.

        >>> index = NgramIndex([3, 2, 1])
        >>> index.extend([7, 1, 2, 3, 9, 1, 2])
        >>> index.locate([1, 2]), index.follow(3, 6)
        ((2, 3), [3, 9, 1, 2, 3, 9])
        """
        for n in self._lengths:
            position = self._followed_at.get(tuple(end[-n:])) if n <= len(end) else None
            if position is not None:
                return n, position
        return 0, 0

    def follow(self, position: int, num_tokens: int) -> list[int]:
        """The tokens from a position on. At the end of the text they repeat from there."""
        period = len(self.ids) - position
        return [self.ids[position + i % period] for i in range(num_tokens)]


class _Place:
    """Where the end of a sequence occurred before in its text: prediction, prompt and output. At first the
    output is expected to begin as the prediction does.

    A match of the longest n-gram goes on while the output does as the text did, however often the n-gram
    occurs: so the next one of many equal lines is found.
    """

    def __init__(self, prediction: abc.Sequence[int], longest: int) -> None:
        self._longest, self._least = longest, min(2, longest)
        self._index = NgramIndex(
            range(longest, self._least - 1, -1), [*prediction, _END] if prediction else []
        )
        self._matched, self._position = self._least if prediction else 0, 0

    def find(self, sequence: Sequence, k: int) -> Match | None:
        """Move on with the new tokens of a sequence, and look up what follows."""
        ids, start, num_predicted = self._index.ids, len(self._index.ids), self._index.num_preferred
        self._index.extend(sequence.ids_from(start - num_predicted))
        for position in range(max(start, num_predicted + len(sequence.prompt)), len(ids)):
            goes_on = self._matched and ids[self._position] == ids[position]
            self._matched, self._position = self._matched + 1 if goes_on else 0, self._position + 1
        matched, position = self._index.locate(ids[max(num_predicted, len(ids) - self._longest) :])
        if matched > self._matched:
            self._matched, self._position = matched, position
        if self._matched < self._least:
            return None
        name = "prediction" if self._position < num_predicted else "n-grams"
        return Match(name, self._matched, self._index.follow(self._position, k))


class TextDrafts(LookupDrafts):
    """What followed the end of a sequence where it occurred in its prediction, its prompt or its output.

    Args:
        longest: tokens of the longest n-gram. Two must match, unless it is 1: after one it is chance.
    """

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self._places: WeakKeyDictionary[Sequence, _Place] = WeakKeyDictionary()
        priors = [0.3 + 0.6 * matched / longest for matched in range(longest + 1)]
        self.arms = {"prediction": Arm(priors=priors), "n-grams": Arm(priors=priors)}

    def find(self, sequence: Sequence, k: int) -> Match | None:
        place = self._places.get(sequence)
        if place is None:
            place = self._places[sequence] = _Place(sequence.prediction, self._longest)
        return place.find(sequence, k)
