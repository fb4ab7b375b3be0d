"""Drafts from the last finished answers: a question like an earlier one has a similar answer."""

from __future__ import annotations

from collections import abc
from threading import Lock

from torch import nn

from self_speculation.decoding.sequence import Sequence
from self_speculation.drafts.ngram import LookupDrafts, NgramIndex
from self_speculation.drafts.policy import Arm
from self_speculation.model.made import made

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
            if len(self._new) + len(ids) > self.num_tokens // 2:
                self._old, self._new = self._new, NgramIndex((_LONG, _SHORT))
            self._new.extend(ids)

    def lookup(self, num_tokens: int, end: abc.Sequence[int]) -> tuple[int, list[int]]:
        """See `NgramIndex.lookup`."""
        with self._lock:
            found = [index.lookup(num_tokens, end) for index in (self._new, self._old)]
        return max(found, key=lambda match: match[0])


def finished_answers(model: nn.Module, num_tokens: int) -> FinishedAnswers:
    """Those of a model, since ids are those of its tokenizer; empty if the number of tokens is another one
    than before. A change of weights does not matter: these are guesses.
    """
    return made(model, FinishedAnswers, lambda _: num_tokens, lambda: FinishedAnswers(num_tokens))


class SharedDrafts(LookupDrafts):
    """What followed the longest n-gram at the end of a sequence in finished answers."""

    name = "shared"
    arm = Arm(priors=[0.2 + 0.1 * matched for matched in range(_LONG + 1)], least_match=_LONG)

    def __init__(self, answers: FinishedAnswers, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self._answers = answers

    def _find(self, sequence: Sequence, k: int) -> tuple[int, list[int]]:
        return self._answers.lookup(k, sequence.ids_from(max(0, sequence.length - _LONG)))
