"""Drafts that are looked up (prompt lookup decoding): the last tokens occurred before, in a predicted output,
in the prompt, in the output or in an earlier answer, and the tokens that followed them there are the draft.
"""

from __future__ import annotations

from collections import abc
from threading import Lock
from weakref import WeakKeyDictionary

from torch import nn

from self_speculation.decoding.sequence import Sequence
from self_speculation.drafts.draft import Arm, LookupDrafts, Match
from self_speculation.model_cache import cached

# Ends a predicted output: no model has this id.
_END = -1
# Sizes of the n-grams that find an output in an earlier answer. Each takes 130 bytes a token.
_LONG, _SHORT = 6, 3


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
    """Where the end of a sequence occurred before in its text: prediction, prompt and output. The output is
    taken to begin as the prediction does.

    A match of the longest n-gram goes on while the output does as the text did, however often the n-gram
    occurs: so the next one of many equal lines is found.
    """

    def __init__(self, prediction: abc.Sequence[int], longest: int, least: int) -> None:
        self._longest, self._least = longest, least
        self._index = NgramIndex(range(longest, least - 1, -1), [*prediction, _END] if prediction else [])
        self._matched, self._position = least if prediction else 0, 0

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
        longest: tokens of the longest n-gram.
        least: tokens that must match.
    """

    def __init__(self, longest: int, least: int) -> None:
        self._longest, self._least = longest, min(least, longest)
        self._places: WeakKeyDictionary[Sequence, _Place] = WeakKeyDictionary()
        priors = [0.3 + 0.6 * matched / longest for matched in range(longest + 1)]
        self.arms = {"prediction": Arm(priors=priors), "n-grams": Arm(priors=priors)}

    def find(self, sequence: Sequence, k: int) -> Match | None:
        place = self._places.get(sequence)
        if place is None:
            place = self._places[sequence] = _Place(sequence.prediction, self._longest, self._least)
        return place.find(sequence, k)


class FinishedAnswers:
    """N-grams of the last answers, across threads. The older half is dropped whenever the newer half is full.

    Args:
        num_tokens: the most tokens that it keeps.
    """

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens, self._lock = num_tokens, Lock()
        self._old, self._new = NgramIndex((_LONG, _SHORT)), NgramIndex((_LONG, _SHORT))

    def add(self, sequence: Sequence) -> None:
        """Add an answer and the end of its prompt."""
        ids = sequence.ids_from(max(0, len(sequence.prompt) - _LONG))[: self.num_tokens // 2]
        with self._lock:
            if len(self._new.ids) + len(ids) > self.num_tokens // 2:
                self._old, self._new = self._new, NgramIndex((_LONG, _SHORT))
            self._new.extend(ids)

    def find(self, end: abc.Sequence[int], num_tokens: int) -> tuple[int, list[int]]:
        """See `NgramIndex`: how many tokens match, and at most so many that followed."""
        with self._lock:
            found = [(*index.locate(end), index) for index in (self._new, self._old)]
            matched, position, index = max(found, key=lambda place: place[0])
            return matched, index.follow(position, num_tokens) if matched else []


def finished_answers(model: nn.Module, num_tokens: int) -> FinishedAnswers:
    """Those of a model, since ids are those of its tokenizer; empty if the number of tokens is another one
    than before. A change of weights does not matter: these are guesses.
    """
    return cached(model, FinishedAnswers, lambda _: num_tokens, lambda: FinishedAnswers(num_tokens))


class SharedDrafts(LookupDrafts):
    """What followed the end of a sequence in finished answers.

    Args:
        is_sure: only after the longer n-gram.
    """

    def __init__(self, answers: FinishedAnswers, is_sure: bool) -> None:
        self._answers, self._least = answers, _LONG if is_sure else _SHORT
        self.arms = {"shared": Arm(priors=[0.2 + 0.1 * matched for matched in range(_LONG + 1)])}

    def find(self, sequence: Sequence, k: int) -> Match | None:
        matched, ids = self._answers.find(sequence.ids_from(max(0, sequence.length - _LONG)), k)
        return Match("shared", matched, ids) if matched >= self._least else None
