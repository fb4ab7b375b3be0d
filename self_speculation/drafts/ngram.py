"""Drafts from n-grams (prompt lookup decoding): the last tokens occurred earlier in prompt or output, and the
tokens that followed them there are the draft.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import abc
from itertools import takewhile
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from self_speculation.decoding.batch import Batch
from self_speculation.decoding.sequence import Sequence
from self_speculation.drafts.draft import Draft, DraftSource
from self_speculation.drafts.policy import Arm, ShouldContinue
from self_speculation.model.kv_cache import KVCache
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
        """Append tokens to the text."""
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


class LookupDrafts(DraftSource):
    """Copies tokens from somewhere. They cost nothing: no layer runs.

    Args:
        vocab_size: width of the logits.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    @abstractmethod
    def _find(self, sequence: Sequence, k: int) -> tuple[int, list[int]]:
        """How many tokens match, and at most k tokens that follow; 0 and none if nothing matches."""

    def lookup(self, sequence: Sequence, limit: int) -> tuple[int, list[int]]:
        """How many tokens match, as far as there are priors, and at most `limit` tokens to draft, up to one
        that the model lacks or a grammar forbids: verification would reject it.
        """
        matched, ids = self._find(sequence, limit) if limit else (0, [])
        known = [*takewhile(lambda id_: 0 <= id_ < self._vocab_size, ids)]
        return min(matched, len(self.arm.priors) - 1), sequence.allowed(known)

    def draft(
        self,
        batch: Batch,
        cache: KVCache,  # noqa: ARG002
        limits: abc.Sequence[int],
        numbers: Tensor | None,  # noqa: ARG002
        should_continue: ShouldContinue | None,  # noqa: ARG002
    ) -> Draft:
        """Reads nothing from the device."""
        found = [self.lookup(*row) for row in zip(batch.sequences, limits, strict=True)]
        lengths = [len(ids) for _, ids in found]
        # Padded with each row's last token, as in `Batch.sample_draft`.
        last = [sequence.ids_from(sequence.length - 1) for sequence in batch.sequences]
        padded = [[*ids, *end * (max(lengths) - len(ids))] for (_, ids), end in zip(found, last, strict=True)]
        tokens = on_device([id_ for ids in padded for id_ in ids], batch.last.device).view(len(batch), -1)
        for i in range(max(lengths)):
            ids = [row[i] for row in padded]
            batch.record_draft(tokens[:, i], i, [i < length for length in lengths], ids=ids)
        q = None if batch.sampler.greedy else one_hot(tokens, self._vocab_size)
        matched = [matched if ids else 0 for matched, ids in found]
        return Draft([self.name] * len(batch), tokens, q, lengths, matched=matched)


class NgramDrafts(LookupDrafts):
    """What followed the longest n-gram at the end where it occurred before.

    Args:
        longest: tokens to match at most.
    """

    name = "n-grams"

    def __init__(self, longest: int, vocab_size: int) -> None:
        super().__init__(vocab_size)
        self._longest = longest
        self._indices: WeakKeyDictionary[Sequence, NgramIndex] = WeakKeyDictionary()
        priors = [0.3 + 0.6 * matched / longest for matched in range(longest + 1)]
        # What followed a single token is mostly chance.
        self.arm = Arm(priors=priors, least_match=min(2, longest))

    def _find(self, sequence: Sequence, k: int) -> tuple[int, list[int]]:
        index = self._indices.get(sequence)
        if index is None:
            index = self._indices[sequence] = NgramIndex(range(self._longest, 0, -1))
        index.extend(sequence.ids_from(len(index)))
        return index.lookup(k)


def one_hot(tokens: Tensor, vocab_size: int) -> Tensor:
    """[...] tokens -> [..., V] the distribution of a draft that was not sampled."""
    q = torch.zeros(*tokens.shape, vocab_size, device=tokens.device)
    return q.scatter_(-1, tokens[..., None], 1.0)
