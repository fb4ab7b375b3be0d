"""Drafts from n-grams (prompt lookup decoding): the last tokens occurred earlier in prompt or output, and the
tokens that followed them there are the draft.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import abc

import torch
from torch import Tensor

from self_speculation.decoding.batch import Batch
from self_speculation.decoding.sequence import Sequence
from self_speculation.drafts.draft import Draft, DraftSource, Guess, PerSequence, draft_by_rows
from self_speculation.model.captured_runner import PassRange
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


class TokenDrafts(DraftSource):
    """Drafts that are copied from somewhere: no layer runs, and the device is read only to show drafts.

    Args:
        vocab_size: width of the logits.
    """

    name: str
    priors: abc.Sequence[float]  # [i] prior acceptance of a token after i matched ones
    least_match = 1  # tokens that must match to draft instead of another source

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    @abstractmethod
    def _find(self, sequence: Sequence, k: int) -> tuple[int, list[int]]:
        """How many tokens match, and at most k tokens that follow; 0 and none if nothing matches."""

    def guesses(self, batch: Batch) -> list[Guess | None]:
        found = [self._allowed(sequence, 1) for sequence in batch.sequences]
        return [Guess(matched, ids[0]) if ids else None for matched, ids in found]

    def draft(self, batch: Batch, k: int, wanted: abc.Sequence[bool] | None = None) -> Draft:
        limits = batch.draft_limits(k, wanted)
        pairs = zip(batch.sequences, limits, strict=True)
        found = [self._allowed(sequence, limit) for sequence, limit in pairs]
        lengths = [len(ids) for _, ids in found]
        width = max(lengths)
        # Padded with each row's last token, as in `Batch.sample_draft`.
        last = [(sequence.tokens or sequence.prompt)[-1] for sequence in batch.sequences]
        padded = [[*ids, *[id_] * (width - len(ids))] for (_, ids), id_ in zip(found, last, strict=True)]
        flat = [id_ for ids in padded for id_ in ids]
        tokens = on_device(flat, batch.last.device).view(len(batch), width)
        for i in range(width):
            batch.record_draft(tokens[:, i], i, [i < length for length in lengths])
        probabilities = None if batch.sampler.greedy else one_hot(tokens, self._vocab_size)
        matched = [number if length else 0 for (number, _), length in zip(found, lengths, strict=True)]
        sources = [self.name] * len(batch)
        return Draft(batch.sampler, sources, tokens, probabilities, lengths, matched=matched)

    def _allowed(self, sequence: Sequence, k: int) -> tuple[int, list[int]]:
        """Without what a grammar forbids: verification would reject it."""
        matched, ids = self._find(sequence, k) if k else (0, [])
        return matched, sequence.allowed(ids)


class NgramDrafts(TokenDrafts):
    """What followed the longest n-gram at the end where it occurred before.

    Args:
        longest: tokens to match at most.
        vocab_size: width of the logits.
    """

    name = "n-grams"

    def __init__(self, longest: int, vocab_size: int) -> None:
        super().__init__(vocab_size)
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


def one_hot(tokens: Tensor, vocab_size: int) -> Tensor:
    """[...] tokens -> [..., V] the distribution of a draft that was not sampled."""
    q = torch.zeros(*tokens.shape, vocab_size, device=tokens.device)
    return q.scatter_(-1, tokens[..., None], 1.0)


class NgramFirst(DraftSource):
    """Copied tokens are drafts where enough tokens match; another source drafts for the other rows."""

    def __init__(self, ngrams: TokenDrafts, otherwise: DraftSource) -> None:
        self._ngrams, self._otherwise = ngrams, otherwise

    def draft(self, batch: Batch, k: int, wanted: abc.Sequence[bool] | None = None) -> Draft:
        pairs = zip(self._ngrams.guesses(batch), batch.draft_limits(k, wanted), strict=True)
        least = self._ngrams.least_match
        found = [bool(limit and guess and guess.matched >= least) for guess, limit in pairs]
        rest = [
            is_wanted and not is_found
            for is_wanted, is_found in zip(wanted or [True] * len(batch), found, strict=True)
        ]
        draft = draft_by_rows(batch, [(self._ngrams, k, found), (self._otherwise, k, rest)])
        return draft or self._otherwise.draft(batch, k, wanted)

    def passes(self, runner: ModelRunner, longest: int) -> abc.Iterator[PassRange]:
        yield from self._ngrams.passes(runner, longest)
        yield from self._otherwise.passes(runner, longest)

    def learn(self, batch: Batch, draft: Draft, num_accepted: abc.Sequence[int]) -> None:
        self._otherwise.learn(batch, draft, num_accepted)
