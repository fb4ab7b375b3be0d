"""Plans each round: which source drafts for which row, and the most tokens.

Knows nothing of models, tokens or tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

Confidences = Sequence[Sequence[float]]  # [B][k] probabilities of drafted tokens
ShouldContinue = Callable[[Confidences], Sequence[bool]]  # [B] whether to draft another token

PLAIN = ""  # no source


def _free(num_rows: int) -> float:  # noqa: ARG001
    return 0.0


@dataclass(frozen=True)
class Arm:
    """A draft source as a policy sees it.

    Args:
        draft_step: number of rows -> estimated cost of a drafted token of each, in plain steps of one row;
            by default free, since no layer runs.
        priors: [i] prior acceptance of a token after i matched ones, the last one also after more; only [0]
            for layers.
        weight: of the priors, in observations.
        is_judged: prompts tell its acceptance, see `AdaptivePolicy.judge`.
        least_match: tokens that must match before a fixed policy drafts with it.
    """

    draft_step: Callable[[int], float] = _free
    priors: Sequence[float] = (0.0,)
    weight: float = 2.0
    is_judged: bool = False
    least_match: int = 1

    @property
    def is_free(self) -> bool:
        return self.draft_step is _free


class Plan(NamedTuple):
    """One round."""

    source: str = PLAIN  # for rows without an n-gram
    length: int = 0  # the most tokens of a row
    lookups: Sequence[str] = ()  # [B] n-gram source of each row; PLAIN: none
    looked_up: int = 0  # the most n-gram tokens of a row
    tokens: float = 1.0  # expected, of all rows
    seconds: float = 1.0  # expected
    is_trial: bool = False

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


class RoundOutcome(NamedTuple):
    """What became of a round."""

    sources: Sequence[str]  # [B] that drafted
    matched: Sequence[int]  # [B] tokens that an n-gram matched
    confidences: Confidences  # empty if unknown
    drafted: Sequence[int]  # [B] tokens
    accepted: Sequence[int]  # [B] tokens
    seconds: tuple[float, float] | None  # of drafting and of verifying; None: not typical


class FixedPolicy:
    """Drafts up to the limits: by the first free source that matches enough, else by layers.

    Args:
        arms: by name of the source.
        confidence: ends a draft after a token whose own probability is below; None: nothing does.
    """

    should_continue: ShouldContinue | None = None  # None: drafts are as long as planned

    def __init__(self, arms: Mapping[str, Arm], confidence: float | None) -> None:
        self._arms = arms
        *_, self._drafting = (name for name, arm in arms.items() if not arm.is_free)
        if confidence is not None:
            self.should_continue = lambda rows: [bool(row) and row[-1] >= confidence for row in rows]

    def plan(self, matched: Mapping[str, Sequence[int | None]], limits: Sequence[int]) -> Plan:
        """See `AdaptivePolicy.plan`."""
        lookups = []
        for row in range(len(limits)):
            found = ((name, numbers[row] or 0) for name, numbers in matched.items())
            enough = (name for name, number in found if number >= self._arms[name].least_match)
            lookups.append(next(enough, PLAIN))
        return Plan(self._drafting, max(limits), lookups, max(limits))
