"""What a draft is, and what its source does: `draft` proposes, `learn` is told what became of it.

Verification makes any draft safe, as long as it says what distribution its tokens were drawn from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad

from self_speculation.decoding.output import Output
from self_speculation.decoding.rows import Rows
from self_speculation.decoding.sampling import Sampler, SamplerOfRows
from self_speculation.transfers import on_device

T = TypeVar("T")


@dataclass(frozen=True)
class Draft:
    """k >= 0 guesses for each row, the work that verification can go on from, and what the source needs to
    learn from the verdict.

    Raises:
        ValueError: tokens that were drawn, without the distribution that they were drawn from.
    """

    sampler: Sampler | SamplerOfRows  # that picked the tokens
    sources: Sequence[str]  # [B] what drafted, by name
    tokens: Tensor  # [B, k]
    probabilities: Tensor | None  # [B, k, V] what they were drawn from; None when greedy
    lengths: Sequence[int]  # [B] how many of the k are the row's draft, the rest being padding
    exit_layer: int = 0  # the first layer that has not seen them: none has where it is 0
    # k of [B, 1, H], of the token before each guess; and that of the last guess, if it is known already
    exit_hidden: list[Tensor] = field(default_factory=list)
    confidences: Sequence[
        Sequence[float]
    ] = ()  # of each row's guesses, where they decided how many there are
    matched: Sequence[int] = ()  # [B] tokens that a lookup found again

    def __post_init__(self) -> None:
        q = self.probabilities
        if not self.sampler.greedy and (q is None or q.shape[:2] != self.tokens.shape):
            raise ValueError("a sampled draft needs the distribution of each of its tokens")


class Guess(NamedTuple):
    """Of the first token of a draft."""

    matched: int = 0  # how many tokens a lookup matched; 0 for a source that compares none
    next_id: int | None = None  # the token; None where only a draft tells it


class DraftSource(ABC):
    """Makes the drafts of one generation, or of one batch."""

    @abstractmethod
    def draft(self, rows: Rows, k: int, wanted: Sequence[bool] | None = None) -> Draft:
        """Propose at most k tokens after each output, and no more than there is room for, see `Rows.rooms`.

        The cache may hold what the draft's layers left; where its `exit_layer` is 0, that is forgotten.

        Args:
            wanted: [B] the rows that tokens are wanted for; None: all.
        """

    def learn(self, rows: Rows, draft: Draft, num_accepted: Sequence[int]) -> None:  # noqa: B027
        """Hear what became of the last draft, row by row."""

    def guesses(self, rows: Rows) -> list[Guess | None]:
        """[B] what is known of a draft of each row before it is made; None: there is nothing to draft."""
        return [Guess()] * len(rows)

    def end_drafts_by(self, goes_on: Callable[[Sequence[Sequence[float]]], bool]) -> None:  # noqa: B027
        """Ask after each token whether another one is to be drafted, by the probabilities [B][k] of those so
        far. Sources whose drafts cost nothing do not ask.
        """


class PerOutput(Generic[T]):
    """What a source keeps of each output, made when it is first asked for."""

    def __init__(self, make: Callable[[Output], T]) -> None:
        self._make = make
        self._made: WeakKeyDictionary[Output, T] = WeakKeyDictionary()

    def __getitem__(self, output: Output) -> T:
        if output not in self._made:
            self._made[output] = self._make(output)
        return self._made[output]


def no_draft(rows: Rows, vocab_size: int) -> Draft:
    """No tokens for any row."""
    tokens, drawn_from = rows.joined([], vocab_size)
    return Draft(rows.sampler, ["none"] * len(rows), tokens, drawn_from, [0] * len(rows))


def mixed(rows: Rows, first: Draft, second: Draft, from_first: Sequence[bool]) -> Draft:
    """Some rows of one draft, the others of another. No layer has seen the tokens of all rows, so all of them
    verify.
    """
    width = max(first.tokens.shape[1], second.tokens.shape[1])
    taken = on_device(from_first, first.tokens.device).bool()[:, None]  # [B, 1]

    def widened(draft: Draft) -> tuple[Tensor, Tensor | None]:
        """Its tokens [B, k], padded as in `Rows.choose`, and what they were drawn from."""
        missing, q = width - draft.tokens.shape[1], draft.probabilities
        tokens = torch.cat((draft.tokens, rows.last.expand(-1, missing)), 1)
        return tokens, None if q is None else pad(q, (0, 0, 0, missing))

    def chosen(a: Sequence, b: Sequence) -> list:
        return [x if wins else y for x, y, wins in zip(a, b, from_first, strict=True)]

    none, nothing = [0] * len(from_first), [()] * len(from_first)
    (tokens, q), (other_tokens, other_q) = widened(first), widened(second)
    return Draft(
        first.sampler,
        chosen(first.sources, second.sources),
        torch.where(taken, tokens, other_tokens),
        # Both are None, or neither.
        None if q is None or other_q is None else torch.where(taken[..., None], q, other_q),
        chosen(first.lengths, second.lengths),
        confidences=chosen(first.confidences or nothing, second.confidences or nothing),
        matched=chosen(first.matched or none, second.matched or none),
    )
