"""Drafts that are looked up (prompt lookup decoding): the last tokens occurred before, in a predicted output,
in the prompt or in the output, and the tokens that followed them there are the draft.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import abc
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from self_speculation.decoding.batch import Batch
from self_speculation.decoding.sequence import Sequence
from self_speculation.drafts.draft import Draft
from self_speculation.drafts.policy import Arm, Match
from self_speculation.transfers import on_device

# Ends a predicted output: no model has this id.
_END = -1


class NgramIndex:
    """Maps every n-gram to the position after its last occurrence. A token is added in constant time.

    Args:
        lengths: values of n, in descending order.
    """

    def __init__(self, lengths: abc.Sequence[int]) -> None:
        self._lengths = lengths
        self.ids: list[int] = []
        self._followed_at: dict[tuple[int, ...], int] = {}  # n-gram -> position of the token that followed it

    def extend(self, ids: abc.Iterable[int]) -> None:
        """Append tokens to the text."""
        for token in ids:
            # N-grams that end before this token have a follower only now, so none finds itself.
            position = len(self.ids)
            for n in self._lengths:
                if n <= position:
                    self._followed_at[tuple(self.ids[position - n :])] = position
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


class LookupDrafts(ABC):
    """Copies tokens from somewhere. They cost nothing: no layer runs."""

    arms: abc.Mapping[str, Arm]  # by source

    @abstractmethod
    def find(self, sequence: Sequence, k: int) -> Match | None:
        """The longest match of the end of a sequence, and at most k > 0 tokens that follow."""


class _Place:
    """Where the end of a sequence occurred before in its text: prediction, prompt and output.

    A match of the longest n-gram goes on while the output does as the text did, however often the n-gram
    occurs: so the next one of many equal lines is found.
    """

    def __init__(self, prediction: abc.Sequence[int], longest: int) -> None:
        self._longest, self._index = longest, NgramIndex(range(longest, 0, -1))
        self._index.extend([*prediction, _END] if prediction else [])
        self._num_predicted = len(self._index.ids)
        self.matched = self._position = 0

    @property
    def is_predicted(self) -> bool:
        return self._position < self._num_predicted

    def read(self, sequence: Sequence) -> None:
        """Move on with the new tokens of a sequence."""
        ids, start = self._index.ids, len(self._index.ids)
        self._index.extend(sequence.ids_from(start - self._num_predicted))
        for position in range(start, len(ids)):
            goes_on = self.matched and ids[self._position] == ids[position]
            self.matched, self._position = self.matched + 1 if goes_on else 0, self._position + 1
        matched, position = self._index.locate(ids[max(self._num_predicted, len(ids) - self._longest) :])
        if matched > self.matched:
            self.matched, self._position = matched, position

    def next(self, k: int) -> list[int]:
        return self._index.follow(self._position, k)


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
            place = self._places[sequence] = _Place(sequence.prediction, self._longest)
        place.read(sequence)
        if place.matched < self._least:
            return None
        name = "prediction" if place.is_predicted else "n-grams"
        return Match(name, place.matched, place.next(k))


def copied(batch: Batch, matches: abc.Sequence[Match | None], most: int, vocab_size: int) -> Draft:
    """The draft of what was looked up, at most so many tokens. Reads nothing from the device."""
    found = [match.ids[:most] if match else [] for match in matches]  # [B]
    width, lengths = max(map(len, found)), [*map(len, found)]
    # Padded with each row's last token, as in `Batch.sample_draft`.
    last = [sequence.ids_from(sequence.length - 1) for sequence in batch.sequences]
    padded = [[*ids, *end * (width - len(ids))] for ids, end in zip(found, last, strict=True)]
    tokens = on_device([id_ for ids in padded for id_ in ids], batch.last.device).view(len(batch), -1)
    for i in range(width):
        batch.record_draft(tokens[:, i], i, [i < n for n in lengths], ids=[row[i] for row in padded])
    q = None if batch.sampler.greedy else one_hot(tokens, vocab_size)
    sources = [match and match.source for match in matches]
    return Draft(sources, tokens, q, lengths, matched=[match.matched if match else 0 for match in matches])


def one_hot(tokens: Tensor, vocab_size: int) -> Tensor:
    """[...] tokens -> [..., V] the distribution of a draft that was not sampled."""
    q = torch.zeros(*tokens.shape, vocab_size, device=tokens.device)
    return q.scatter_(-1, tokens[..., None], 1.0)
