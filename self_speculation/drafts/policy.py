"""Which round to make next, by what drafts were worth so far and what passes take.

Numbers in, numbers out; knows nothing of models, tokens or tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

import numpy

from self_speculation.drafts.costs import PassTimes
from self_speculation.drafts.estimates import DecayedMean

PLAIN = ""  # the source of a round in which no layer drafts

# Ranges of confidence that have an acceptance each.
_BINS = 10


@dataclass(frozen=True)
class Arm:
    """A source that adaptive decoding may draft with, as the policy sees it.

    Args:
        draft_ratio: estimated cost of one drafted token, in plain steps of one row; 0: drafts cost nothing.
        growth: estimated cost of a draft step of n rows, in those of one.
        priors: [i] the chance that a drafted token is accepted, before anything is known, where i tokens matched; [0]
            alone for a source that compares none.
        weight: observations that a prior counts as.
        deeper: the arm that is right at least as often. Until more is known, this one is no better.
    """

    draft_ratio: float = 0.0
    growth: Callable[[int], float] = lambda num_rows: 1.0
    priors: Sequence[float] = (0.4,)
    weight: float = 2.0
    deeper: str = ""


class Plan(NamedTuple):
    """One round."""

    source: str = PLAIN  # drafts for rows without a lookup
    length: int = 0  # tokens at most, of any row
    lookups: Sequence[str] = ()  # [B] sources whose drafts cost nothing; PLAIN: none for this row
    tokens: float = 1.0  # expected, of all rows
    seconds: float = 1.0  # expected
    is_trial: bool = False

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds

    @property
    def drafts(self) -> bool:
        return self.length > 0


@dataclass
class _Trials:
    """When an arm that is not the best is tried again: after twice as many rounds each time."""

    wait: int
    due: int


@dataclass
class ArmStats:
    """What was learnt of a model's sources; kept from one answer to the next.

    Bounded in size by the sources and the tokens that they compare.
    """

    times: PassTimes
    num_rounds: int = 0
    acceptance: dict[tuple[str, int], DecayedMean] = field(
        default_factory=dict
    )  # by source and tokens matched
    by_confidence: dict[tuple[str, int], DecayedMean] = field(default_factory=dict)  # by source and range
    trials: dict[str, _Trials] = field(default_factory=dict)
    seconds_for_trials: float = 0.0


class AdaptivePolicy:
    """Chooses the round that promises most tokens for its time (after Zarch et al., DEL, arXiv 2504.05598).

    A source that is not the best is tried when a small share of the time allows it and its promise could beat plain
    steps, ever more rarely. A draft ends when another token would cost more than it is likely to save.

    Args:
        arms: by the name of their source.
        longest: tokens that a draft may have.
        stats: of the model.
    """

    # A round with drafts must promise so much more than a plain step: its promise is an estimate.
    _MARGIN = 1.03
    # Tokens of a trial; rounds until the first and, at most, between two plain steps; the share of the time for trials.
    _TRIAL, _WAIT, _WAIT_FOR_PLAIN, _SHARE = 2, 8, 64, 0.01
    # Layers draft no more tokens than this: the chance that all are right hardly ever pays for another one.
    _LONGEST_OF_LAYERS = 8
    # A trial must pay if the chance of acceptance is so much better than what is known.
    _HOPE = 0.3

    def __init__(self, arms: Mapping[str, Arm], longest: int, stats: ArmStats) -> None:
        self._arms, self._longest, self._stats = arms, longest, stats
        self._layered = {name: arm for name, arm in arms.items() if arm.draft_ratio > 0.0}
        self._plan, self._plain = Plan(), Plan()

    def plan(self, matched: Mapping[str, Sequence[int | None]], rooms: Sequence[int]) -> Plan:
        """One round of all rows.

        Args:
            matched: by source, [B] how many tokens of each row it has matched; None where it cannot draft.
            rooms: [B] tokens that may be drafted at most.
        """
        stats, longest = self._stats, min(max(rooms), self._longest)
        lookups, tokens = self._looked_up(matched, rooms, longest)
        plans = [self._lookups_only(lookups, tokens)]
        most = min(longest, self._LONGEST_OF_LAYERS)
        plans += [self._drafted(name, lookups, tokens, rooms, most) for name in self._layered if most]
        self._plain = Plan(tokens=float(len(rooms)), seconds=stats.times.plain_step(len(rooms)))
        best = max(plans, key=lambda plan: plan.rate)
        if best.rate <= self._MARGIN * self._plain.rate:
            best = self._plain
        stats.num_rounds += 1
        stats.seconds_for_trials += self._SHARE * best.seconds
        self._plan = self._trial(best, rooms, longest) or best
        return self._plan

    def goes_on(self, confidences: Sequence[Sequence[float]]) -> bool:
        """Whether to draft another token for the rows of the plan.

        Args:
            confidences: of each row, the probabilities of the tokens drafted so far.
        """
        plan, num_rows, width = self._plan, len(confidences), max(map(len, confidences))
        if plan.is_trial:
            return width < plan.length
        right = sum(prod(self._of(plan.source, each).value for each in row) for row in confidences if row)
        with_this, with_another = self._verifications(num_rows, width + 1)[-2:]
        more = self._draft_step(plan.source, num_rows) + with_another - with_this
        return right * self._acceptance(plan.source, 0).value > more * max(plan.rate, self._plain.rate)

    def learn(
        self,
        sources: Sequence[str],
        matched: Sequence[int],
        confidences: Sequence[Sequence[float]],
        drafted: Sequence[int],
        accepted: Sequence[int],
        seconds: tuple[float, float] | None,
    ) -> None:
        """See what became of the round, row by row.

        Args:
            sources: what drafted.
            matched, drafted, accepted: [B] tokens.
            confidences: the probabilities of drafted tokens, where there are any.
            seconds: of drafting and verifying; None: these say nothing of rounds to come.
        """
        stats, plan = self._stats, self._plan
        for row, source in enumerate(sources):
            for i in range(min(accepted[row] + 1, drafted[row])):
                is_right = float(i < accepted[row])
                self._acceptance(source, matched[row]).add(is_right)
                if confidences and confidences[row]:
                    self._of(source, confidences[row][i]).add(is_right)
        own = max((n for n, source in zip(drafted, sources, strict=True) if source == plan.source), default=0)
        if seconds is not None:
            num_rows, (of_draft, of_verification) = len(sources), seconds
            if own:
                expected = self._draft_step(plan.source, num_rows)
                stats.times.add_draft(plan.source, num_rows, of_draft / own, expected)
            stats.times.add_verification(num_rows, max(drafted), of_verification)

    def _looked_up(
        self, matched: Mapping[str, Sequence[int | None]], rooms: Sequence[int], longest: int
    ) -> tuple[list[str], numpy.ndarray]:
        """[B] the most promising lookups, and [B, lengths] the tokens that rounds with so many of theirs give."""
        lookups, chances = [PLAIN] * len(rooms), [0.0] * len(rooms)
        for name, numbers in matched.items():
            for row, number in enumerate(numbers):
                if name not in self._layered and number is not None and rooms[row]:
                    if (chance := self._acceptance(name, number).value) > chances[row]:
                        lookups[row], chances[row] = name, chance
        return lookups, _expected_tokens(numpy.array(chances), rooms, longest)

    def _lookups_only(self, lookups: Sequence[str], tokens: numpy.ndarray) -> Plan:
        seconds, of_all = self._verifications(len(lookups), tokens.shape[1] - 1), tokens.sum(0)
        length = int((of_all / seconds).argmax())
        return Plan(PLAIN, length, lookups if length else (), float(of_all[length]), float(seconds[length]))

    def _drafted(
        self, name: str, lookups: Sequence[str], looked_up: numpy.ndarray, rooms: Sequence[int], longest: int
    ) -> Plan:
        """Drafts of layers for all rows but those where a lookup promises more."""
        num_rows, chance = len(rooms), self._acceptance(name, 0).value
        tokens = _expected_tokens(numpy.full(num_rows, chance), rooms, longest)
        seconds = self._draft_step(name, num_rows) * numpy.arange(longest + 1)
        seconds = seconds + self._verifications(num_rows, longest)
        looked_up = looked_up[:, : longest + 1]
        both = numpy.maximum(tokens, looked_up).sum(0)  # [lengths]
        length = int((both[1:] / seconds[1:]).argmax()) + 1
        own = looked_up[:, length] > tokens[:, length]
        chosen = [lookup if is_own else PLAIN for lookup, is_own in zip(lookups, own, strict=True)]
        return Plan(name, longest, chosen, float(both[length]), float(seconds[length]))

    def _trial(self, best: Plan, rooms: Sequence[int], longest: int) -> Plan | None:
        """A short draft of the arm whose trial is due longest, or a plain step; None: none is due, or too dear."""
        stats, num_rows = self._stats, len(rooms)
        due: list[tuple[int, str]] = []
        for i, name in enumerate((PLAIN, *self._layered)):
            trials = stats.trials.setdefault(
                name, _Trials(self._WAIT, stats.num_rounds + self._WAIT * (i + 1))
            )
            if name == best.source and (name != PLAIN or not best.drafts):
                trials.wait, trials.due = self._WAIT, stats.num_rounds + self._WAIT
            elif trials.due <= stats.num_rounds:
                due.append((trials.due, name))
        for _, name in sorted(due):
            trial = self._plain if name == PLAIN else self._hoped(name, rooms, min(self._TRIAL, longest))
            if trial is None:
                continue
            price = trial.seconds * (1.0 - min(1.0, trial.rate / best.rate))
            if price <= stats.seconds_for_trials:
                stats.seconds_for_trials -= price
                trials = stats.trials[name]
                trials.wait *= 2
                if name == PLAIN:
                    trials.wait = min(trials.wait, self._WAIT_FOR_PLAIN)
                trials.due = stats.num_rounds + trials.wait
                return trial._replace(is_trial=True)
        return None

    def _hoped(self, name: str, rooms: Sequence[int], length: int) -> Plan | None:
        """A trial of an arm; None: it would not pay even if it were right as often as can be hoped."""
        num_rows, known = len(rooms), self._acceptance(name, 0).value
        step = self._draft_step(name, num_rows)

        def tokens(chance: float, most: int) -> numpy.ndarray:
            return _expected_tokens(numpy.full(num_rows, chance), rooms, most).sum(0)

        hoped = tokens(min(1.0, known + self._HOPE), self._longest)
        seconds = step * numpy.arange(self._longest + 1) + self._verifications(num_rows, self._longest)
        if not length or (hoped / seconds).max() <= self._MARGIN * self._plain.rate:
            return None
        return Plan(name, length, (), float(tokens(known, length)[-1]), float(seconds[length]))

    def _verifications(self, num_rows: int, longest: int) -> numpy.ndarray:
        return self._stats.times.verifications(num_rows, longest)

    def _draft_step(self, name: str, num_rows: int) -> float:
        arm = self._arms[name]
        return self._stats.times.draft_step(name, num_rows, arm.draft_ratio, arm.growth)

    def _acceptance(self, name: str, matched: int) -> DecayedMean:
        """The chance that a drafted token is accepted after accepted ones."""
        means = self._stats.acceptance
        if (name, matched) not in means:
            arm = self._arms[name]
            prior = arm.priors[matched]
            deeper = self._acceptance(arm.deeper, 0) if arm.deeper else None
            means[name, matched] = DecayedMean(
                prior if deeper is None else lambda: min(prior, deeper.value), arm.weight, decay=0.97
            )
        return means[name, matched]

    def _of(self, name: str, confidence: float) -> DecayedMean:
        """The chance that a token of such a probability is accepted."""
        at = min(int(confidence * _BINS), _BINS - 1)
        prior = (at + 0.5) / _BINS
        return self._stats.by_confidence.setdefault((name, at), DecayedMean(prior, weight=1.0, decay=0.98))


def _expected_tokens(chances: numpy.ndarray, rooms: Sequence[int], longest: int) -> numpy.ndarray:
    """[B, longest + 1]: tokens of a round with drafts of each length, where a drafted one is accepted by these chances
    [B]. One token more comes for sure.
    """
    lengths = numpy.arange(longest + 1)
    right = chances[:, None] ** lengths * (lengths <= numpy.array(rooms)[:, None])
    return right.cumsum(1)
