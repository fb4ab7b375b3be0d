"""What a draft is, and what its source does: `draft` proposes, `learn` is told what became of it.

Verification makes any draft safe, as long as it says what distribution its tokens were drawn from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from torch import Tensor

from self_speculation.decoding.output import Output
from self_speculation.decoding.rows import Rows
from self_speculation.decoding.sampling import Sampler, SamplerOfRows

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

    def matched(self, rows: Rows) -> list[int | None]:
        """[B] how many tokens a draft of each row would match now; 0 for a source that compares none, None
        where it has nothing to draft.
        """
        return [0] * len(rows)


class PerOutput(Generic[T]):
    """What a source keeps of each output, made when it is first asked for."""

    def __init__(self, make: Callable[[Output], T]) -> None:
        self._make = make
        self._made: WeakKeyDictionary[Output, T] = WeakKeyDictionary()

    def __getitem__(self, output: Output) -> T:
        if output not in self._made:
            self._made[output] = self._make(output)
        return self._made[output]
