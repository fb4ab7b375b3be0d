"""Drafts from the last finished answers: a question like an earlier one has a similar answer."""

from __future__ import annotations

from collections import abc
from threading import Lock

from torch import nn

from self_speculation.decoding.sequence import Sequence
from self_speculation.drafts.ngram import LookupDrafts, NgramIndex
from self_speculation.drafts.policy import Arm, Match
from self_speculation.model.model_cache import cached

# Sizes of the n-grams that find an output in an earlier answer. Each takes 130 bytes a token.
_LONG, _SHORT = 6, 3


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
