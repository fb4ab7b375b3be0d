"""The interface of draft sources: `draft` proposes tokens, `learn` gets the outcome.

The output is exact for any draft that states the distribution its tokens were sampled from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import abc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor

from self_speculation.decoding.batch import Batch
from self_speculation.decoding.sequence import Sequence
from self_speculation.model.captured_runner import PassRange
from self_speculation.model.kv_cache import KVCache
from self_speculation.model.model_runner import ModelRunner, forward

T = TypeVar("T")

Confidences = abc.Sequence[abc.Sequence[float]]  # [B][k] probabilities of drafted tokens
ShouldContinue = Callable[[Confidences], abc.Sequence[bool]]  # [B] whether to draft another token


@dataclass(frozen=True)
class Draft:
    """At most k >= 0 tokens for each row, and the hidden states that verification starts from."""

    sources: abc.Sequence[str]  # [B] names
    tokens: Tensor  # [B, k]
    probabilities: Tensor | None  # [B, k, V] that they were sampled from; None when greedy, or if k is 0
    lengths: abc.Sequence[int]  # [B] of the k tokens; the rest is padding
    exit_layer: int = 0  # layers that have processed the draft; 0: none, or a copy of them
    # k or k+1 states [B, 1, H]: inputs of the drafted tokens, then optionally the last one
    exit_hidden: list[Tensor] = field(default_factory=list)
    confidences: Confidences = ()  # empty unless drafts end by them
    matched: abc.Sequence[int] = ()  # [B] tokens that an n-gram matched


class DraftSource(ABC):
    """Makes the drafts of one batch."""

    @abstractmethod
    def draft(self, batch: Batch, cache: KVCache, limits: abc.Sequence[int]) -> Draft:
        """Draft tokens for each row.

        Layers that draft may append to the cache. If `Draft.exit_layer` is 0, that is rolled back.

        Args:
            limits: [B] the most tokens of each row.
        """

    def read_prompt(
        self,
        runner: ModelRunner,
        cache: KVCache,
        sequence: Sequence,  # noqa: ARG002
        tokens: Tensor,
    ) -> Tensor:
        """Prefill the last tokens [1, T] of a prompt; returns the logits [1, 1, V] after them."""
        return forward(runner, cache, tokens).logits

    def learn(self, batch: Batch, draft: Draft, num_accepted: abc.Sequence[int]) -> None:  # noqa: B027
        """Learn from the outcome of the last draft; num_accepted: [B]."""

    def passes(self, runner: ModelRunner, longest: int) -> Iterator[PassRange]:
        """The passes that draft up to `longest` tokens, and those of `runner` that verify them."""
        yield PassRange(runner, 0, len(runner.layers), longest + 1)


class PerSequence(Generic[T]):
    """A value for each sequence, made on first access and dropped with the sequence."""

    def __init__(self, make: Callable[[Sequence], T]) -> None:
        self._make = make
        self._made: WeakKeyDictionary[Sequence, T] = WeakKeyDictionary()

    def __getitem__(self, sequence: Sequence) -> T:
        value = self._made.get(sequence)
        if value is None:
            value = self._made[sequence] = self._make(sequence)
        return value


def no_draft(batch: Batch) -> Draft:
    """A draft of no tokens."""
    return Draft(["none"] * len(batch), *batch.stack([]), [0] * len(batch))
