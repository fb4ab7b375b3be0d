"""What a draft is, and what its source does: `draft` proposes, `learn` is told what became of it.

Verification makes any draft safe, as long as it says what distribution its tokens were drawn from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from self_speculation.decoding.output import Output


@dataclass(frozen=True)
class Draft:
    """k guesses, k >= 0, what of the work for them verification can go on from, and what the source needs to
    remember of them.
    """

    source: str  # what drafted, by name
    tokens: Tensor  # [k]
    probabilities: Tensor | None  # [k, V] what they were drawn from; None when greedy
    exit_layer: int = 0  # the first layer that has not seen them: none has where it is 0
    # k of [1, 1, H], of the token before each guess; and that of the last guess, if it is known already
    exit_hidden: list[Tensor] = field(default_factory=list)
    probe: int = 0  # an exit layer beyond exit_layer to be read at verification; 0: none
    confidences: Sequence[float] = ()  # probabilities of the guesses, where they decided how long it is
    matched: int = 0  # tokens that a lookup found again


class DraftSource(ABC):
    """Makes the drafts of one generation."""

    @abstractmethod
    def draft(self, output: Output, k: int) -> Draft:
        """Propose at most k tokens after the output; the cache may hold what the draft's layers left."""

    def learn(self, draft: Draft, num_accepted: int, agreement: Sequence[float]) -> None:  # noqa: B027
        """Hear what became of the last draft.

        Args:
            agreement: for a probed exit, the chances that its guesses would have been accepted, one for each
                position up to the first rejected token.
        """

    def matched(self, output: Output) -> int | None:  # noqa: ARG002
        """How sure a draft would be now, in tokens that it matches; 0 of a source that compares none. None
        where there is nothing to draft.
        """
        return 0
