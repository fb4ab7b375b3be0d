"""Drafts from n-grams (prompt lookup decoding): the last tokens occurred earlier in prompt or output, and the
tokens that followed them there are the draft.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import abc
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from self_speculation.decoding.batch import Batch
from self_speculation.decoding.sequence import Sequence
from self_speculation.drafts.draft import Draft, DraftSource, PerSequence, no_draft
from self_speculation.model.captured_runner import PassRange
from self_speculation.model.kv_cache import KVCache
from self_speculation.model.model_runner import ModelRunner
from self_speculation.transfers import on_device


class NgramIndex:
    """Maps every n-gram to the position after its last occurrence. A token is added in constant time.

    Args:
        lengths: values of n, in descending order.
    """

    def __init__(self, lengths: abc.Sequence[int]) -> None:
        self._lengths = lengths
        self._ids: list[int] = []
        self._followed_at: dict[tuple[int, ...], int] = {}  # n-gram -> position of the token that followed it

    def __len__(self) -> int:
        return len(self._ids)

    def extend(self, ids: abc.Sequence[int]) -> None:
        for token in ids:
            # N-grams that end before this token have a follower only now, so none finds itself.
            position = len(self._ids)
            for n in self._lengths:
                if n <= position:
                    self._followed_at[tuple(self._ids[position - n :])] = position
            self._ids.append(token)

    def lookup(self, num_tokens: int, end: abc.Sequence[int] | None = None) -> tuple[int, list[int]]:
        """The longest n-gram at the end that occurred before: its n, and the tokens that followed it there.

        >>> index = NgramIndex([3, 2, 1])
        >>> index.extend([7, 1, 2, 3, 9, 1, 2])
        >>> index.lookup(2)
        (2, [3, 9])

        Args:
            end: of another text; None: of the indexed one.

        Returns:
            (0, []) if there is none. The tokens that followed may run into the end: they repeat from there.
        """
        end = self._ids if end is None else end
        for n in self._lengths:
            position = self._followed_at.get(tuple(end[-n:])) if n <= len(end) else None
            if position is not None:
                period = len(self._ids) - position
                return n, [self._ids[position + i % period] for i in range(num_tokens)]
        return 0, []


class Copied(NamedTuple):
    """Tokens of one row that are copied from somewhere."""

    source: str = "none"
    matched: int = 0  # tokens before them that occurred before these tokens, too
    ids: abc.Sequence[int] = ()


class TokenDrafts(ABC):
    """Finds tokens to copy. They cost nothing: no layer runs."""

    name: str
    priors: abc.Sequence[float]  # [i] prior acceptance of a token after i matched ones
    least_match = 1  # tokens that must match to draft instead of another source

    def copied(self, sequence: Sequence, limit: int) -> Copied:
        """At most `limit` tokens, without what a grammar forbids: verification would reject it."""
        matched, ids = self._find(sequence, limit) if limit else (0, [])
        ids = sequence.allowed(ids)
        return Copied(self.name, matched, ids) if ids else Copied()

    @abstractmethod
    def _find(self, sequence: Sequence, k: int) -> tuple[int, list[int]]:
        """How many tokens match, and at most k tokens that follow; 0 and none if nothing matches."""


class NgramDrafts(TokenDrafts):
    """What followed the longest n-gram at the end where it occurred before.

    Args:
        longest: tokens to match at most.
    """

    name = "n-grams"

    def __init__(self, longest: int) -> None:
        self._longest, self._indices = longest, PerSequence(self._index)
        self.priors = [0.3 + 0.6 * matched / longest for matched in range(longest + 1)]
        self.least_match = min(2, longest)  # what followed a single token is mostly chance

    def _index(self, sequence: Sequence) -> NgramIndex:
        index = NgramIndex(range(self._longest, 0, -1))
        index.extend(sequence.prompt)
        return index

    def _find(self, sequence: Sequence, k: int) -> tuple[int, list[int]]:
        index = self._indices[sequence]
        index.extend(sequence.tokens[len(index) - len(sequence.prompt) :])
        return index.lookup(k)


class CopiedFirst(DraftSource):
    """Copies tokens where enough of them match; another source drafts for the other rows.

    Args:
        sources: the first one that matches is taken.
    """

    def __init__(self, sources: abc.Sequence[TokenDrafts], otherwise: DraftSource, vocab_size: int) -> None:
        self._sources, self._otherwise, self._vocab_size = sources, otherwise, vocab_size

    def draft(self, batch: Batch, cache: KVCache, limits: abc.Sequence[int]) -> Draft:
        copied = [self._copied(*row) for row in zip(batch.sequences, limits, strict=True)]
        rest = [0 if row.ids else limit for row, limit in zip(copied, limits, strict=True)]
        draft = self._otherwise.draft(batch, cache, rest) if any(rest) else None
        return with_copied(batch, copied, draft, self._vocab_size)

    def _copied(self, sequence: Sequence, limit: int) -> Copied:
        found = ((source, source.copied(sequence, limit)) for source in self._sources)
        return next((copied for source, copied in found if copied.matched >= source.least_match), Copied())

    def passes(self, runner: ModelRunner, longest: int) -> abc.Iterator[PassRange]:
        yield from super().passes(runner, longest)
        yield from self._otherwise.passes(runner, longest)

    def learn(self, batch: Batch, draft: Draft, num_accepted: abc.Sequence[int]) -> None:
        self._otherwise.learn(batch, draft, num_accepted)


def with_copied(batch: Batch, copied: abc.Sequence[Copied], draft: Draft | None, vocab_size: int) -> Draft:
    """The copied tokens of the rows that have some, and the drafted ones of the others.

    All layers verify the result, since none has processed all rows. The device is read only to show drafts.

    Args:
        copied: [B]
        draft: of the other rows; None: of no row.
        vocab_size: width of the logits.
    """
    draft = draft or no_draft(batch)
    numbers = [len(row.ids) for row in copied]
    if not any(numbers):
        return draft
    k = draft.tokens.shape[1]
    width = max(k, *numbers)
    # Padded with each row's last token, as in `Batch.sample_draft`.
    last = [sequence.ids_from(sequence.length - 1) for sequence in batch.sequences]
    padded = [[*row.ids, *end * (width - len(row.ids))] for row, end in zip(copied, last, strict=True)]
    tokens = on_device([id_ for ids in padded for id_ in ids], batch.last.device).view(len(batch), width)
    for i in range(max(numbers)):
        batch.record_draft(tokens[:, i], i, [i < number for number in numbers])
    q = None if batch.sampler.greedy else one_hot(tokens, vocab_size)
    if k:
        is_copied = on_device(numbers, tokens.device).bool()[:, None]  # [B, 1]
        tokens = torch.where(is_copied, tokens, torch.cat((draft.tokens, tokens[:, k:]), 1))
        if q is not None and draft.probabilities is not None:
            q = torch.where(is_copied[..., None], q, pad(draft.probabilities, (0, 0, 0, width - k)))
    return replace(
        draft,
        sources=[
            row.source if row.ids else source for row, source in zip(copied, draft.sources, strict=True)
        ],
        tokens=tokens,
        probabilities=q,
        lengths=[number or length for number, length in zip(numbers, draft.lengths, strict=True)],
        exit_layer=0,
        exit_hidden=[],
        matched=[row.matched for row in copied],
    )


def one_hot(tokens: Tensor, vocab_size: int) -> Tensor:
    """[...] tokens -> [..., V] the distribution of a draft that was not sampled."""
    q = torch.zeros(*tokens.shape, vocab_size, device=tokens.device)
    return q.scatter_(-1, tokens[..., None], 1.0)
