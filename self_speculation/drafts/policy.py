"""Plans each round: which source drafts for which row, and the most tokens.

Knows nothing of models, tokens or tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Confidences = Sequence[Sequence[float]]  # [B][k] probabilities of drafted tokens
ShouldContinue = Callable[[Confidences], Sequence[bool]]  # [B] whether to draft another token


@dataclass(frozen=True)
class Arm:
    """A draft source as a policy sees it.

    Args:
        draft_step: number of rows -> estimated cost of a drafted token of each, in plain steps of one row;
            None: none, since no layer runs.
        priors: [i] prior acceptance of a token after i matched ones, the last one also after more; only [0]
            for layers.
        weight: of the priors, in observations.
    """

    draft_step: Callable[[int], float] | None = None
    priors: Sequence[float] = (0.0,)
    weight: float = 2.0


class Match(NamedTuple):
    """A draft that was looked up."""

    source: str
    matched: int  # tokens
    ids: Sequence[int] = ()  # that followed


class Plan(NamedTuple):
    """One round."""

    source: str | None = None  # for the other rows; None: no draft
    max_drafted: int = 0  # the most tokens of a row
    lookups: Sequence[bool] = ()  # [B] whether a row has the draft that was looked up; empty: none has
    max_lookup: int = 0  # the most tokens of these
    tokens: float = 1.0  # expected, of all rows
    seconds: float = 1.0  # expected
    is_trial: bool = False

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


class RoundOutcome(NamedTuple):
    """What became of a round."""

    sources: Sequence[str | None]  # [B] that drafted
    matched: Sequence[int]  # [B] tokens that an n-gram matched
    confidences: Confidences  # empty if unknown
    drafted: Sequence[int]  # [B] tokens
    accepted: Sequence[int]  # [B] tokens
    seconds: tuple[float, float] | None  # of drafting and of verifying; None: not typical


class FixedPolicy:
    """Drafts up to the limits: by what was looked up, else by layers.

    Args:
        arms: by name of the source.
        confidence: ends a draft after a token whose own probability is below; None: nothing does.
    """

    should_continue: ShouldContinue | None = None  # None: drafts are as long as planned

    def __init__(self, arms: Mapping[str, Arm], confidence: float | None) -> None:
        *_, self._drafting = (name for name, arm in arms.items() if arm.draft_step)
        if confidence is not None:
            self.should_continue = lambda rows: [bool(row) and row[-1] >= confidence for row in rows]

    def plan(self, matches: Sequence[Match | None], limits: Sequence[int]) -> Plan:
        """See `AdaptivePolicy.plan`."""
        return Plan(self._drafting, max(limits), [match is not None for match in matches], max(limits))
