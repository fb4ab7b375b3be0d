"""The interface of draft sources: `draft` proposes tokens, `learn` gets the outcome.

The output is exact for any draft that states the distribution its tokens were sampled from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import abc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad

from self_speculation.decoding.batch import Batch
from self_speculation.decoding.sampling import Sampler, SamplerOfRows
from self_speculation.decoding.sequence import Sequence
from self_speculation.model.captured_runner import PassRange
from self_speculation.model.model_runner import ModelRunner
from self_speculation.transfers import on_device

T = TypeVar("T")

Confidences = abc.Sequence[abc.Sequence[float]]  # [B][k] probabilities of drafted tokens


@dataclass(frozen=True)
class Draft:
    """At most k >= 0 tokens for each row, and the hidden states that verification starts from.

    Raises:
        ValueError: sampled tokens without their distribution.
    """

    sampler: Sampler | SamplerOfRows
    sources: abc.Sequence[str]  # [B] names
    tokens: Tensor  # [B, k]
    probabilities: Tensor | None  # [B, k, V] that they were sampled from; None when greedy
    lengths: abc.Sequence[int]  # [B] of the k tokens; the rest is padding
    exit_layer: int = 0  # layers that have processed the draft; 0: none, or a copy of them
    # k times [B, 1, H]: the state of the token before each drafted one; and of the last one, if it is known
    exit_hidden: list[Tensor] = field(default_factory=list)
    confidences: Confidences = ()  # empty unless drafts end by them
    matched: abc.Sequence[int] = ()  # [B] tokens that an n-gram matched

    def __post_init__(self) -> None:
        q = self.probabilities
        if not self.sampler.greedy and (q is None or q.shape[:2] != self.tokens.shape):
            raise ValueError("a sampled draft needs the distribution of each of its tokens")


class Guess(NamedTuple):
    """The first token of a draft that was not made yet."""

    matched: int = 0  # tokens that an n-gram matched; 0 for other sources
    next_id: int | None = None  # None: unknown before drafting


class DraftSource(ABC):
    """Makes the drafts of one batch."""

    @abstractmethod
    def draft(self, batch: Batch, k: int, wanted: abc.Sequence[bool] | None = None) -> Draft:
        """Draft up to `Batch.draft_limits` tokens for each row.

        Layers that draft may append to the cache. If `Draft.exit_layer` is 0, that is rolled back.

        Args:
            wanted: [B] rows to draft for; None: all.
        """

    def learn(self, batch: Batch, draft: Draft, num_accepted: abc.Sequence[int]) -> None:  # noqa: B027
        """Learn from the outcome of the last draft; num_accepted: [B]."""

    def passes(self, runner: ModelRunner, longest: int) -> Iterator[PassRange]:
        """The passes that draft up to `longest` tokens, and those of `runner` that verify them."""
        yield PassRange(runner, 0, len(runner.layers), longest + 1)

    def guesses(self, batch: Batch) -> list[Guess | None]:
        """[B] what is known before drafting; None: no draft for the row. Asked if drafts cost nothing."""
        return [Guess()] * len(batch)

    def end_drafts_by(self, goes_on: Callable[[Confidences], bool]) -> None:  # noqa: B027
        """Draft another token only while `goes_on` is true of the tokens so far.

        Sources whose drafts cost nothing ignore it.
        """


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


def no_draft(batch: Batch, vocab_size: int) -> Draft:
    """A draft of no tokens."""
    tokens, q = batch.stack([], vocab_size)
    return Draft(batch.sampler, ["none"] * len(batch), tokens, q, [0] * len(batch))


def draft_by_rows(batch: Batch, parts: Iterable[tuple[DraftSource, int, abc.Sequence[bool]]]) -> Draft | None:
    """Draft for some rows with one source and for other rows with another; None: for no row.

    Args:
        parts: (source, most tokens of a row, [B] rows)
    """
    draft = None
    for source, k, rows in parts:
        if any(rows):
            other, draft = draft, source.draft(batch, k, rows)
            draft = draft if other is None else mixed(batch, draft, other, rows)
    return draft


def mixed(batch: Batch, first: Draft, second: Draft, from_first: abc.Sequence[bool]) -> Draft:
    """Take some rows of one draft and the other rows of another.

    All layers verify the result: none of them has processed all rows.
    """
    width = max(first.tokens.shape[1], second.tokens.shape[1])
    taken = on_device(from_first, first.tokens.device).bool()[:, None]  # [B, 1]

    def padded(draft: Draft) -> tuple[Tensor, Tensor | None]:
        """Tokens and distributions, with padding as in `Batch.sample_draft`."""
        missing, q = width - draft.tokens.shape[1], draft.probabilities
        tokens = torch.cat((draft.tokens, batch.last.expand(-1, missing)), 1)
        return tokens, None if q is None else pad(q, (0, 0, 0, missing))

    def chosen(a: abc.Sequence, b: abc.Sequence) -> list:
        return [x if wins else y for x, y, wins in zip(a, b, from_first, strict=True)]

    none, nothing = [0] * len(from_first), [()] * len(from_first)
    (tokens, q), (other_tokens, other_q) = padded(first), padded(second)
    return Draft(
        first.sampler,
        chosen(first.sources, second.sources),
        torch.where(taken, tokens, other_tokens),
        None if q is None or other_q is None else torch.where(taken[..., None], q, other_q),
        chosen(first.lengths, second.lengths),
        confidences=chosen(first.confidences or nothing, second.confidences or nothing),
        matched=chosen(first.matched or none, second.matched or none),
    )
