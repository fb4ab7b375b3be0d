"""A bandit over draft sources: plans each round by acceptance so far and the time of passes.

Knows nothing of models, tokens or tensors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy

from self_speculation.drafts.costs import PassTimes
from self_speculation.drafts.estimates import AcceptanceByConfidence, DecayedMean

PLAIN = ""  # no source


@dataclass(frozen=True)
class Arm:
    """A draft source as the policy sees it.

    Args:
        draft_ratio: estimated cost of a drafted token of one row, in plain steps; 0: free.
        growth: estimated cost of a draft step of n rows, relative to one row.
        priors: [i] prior acceptance of a token after i matched ones; only [0] for sources without n-grams.
        weight: of the priors, in observations.
        deeper: name of an arm whose acceptance is at least as high.
    """

    draft_ratio: float = 0.0
    growth: Callable[[int], float] = lambda num_rows: 1.0
    priors: Sequence[float] = (0.4,)
    weight: float = 2.0
    deeper: str = ""


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

    @property
    def drafts(self) -> bool:
        return self.length > 0


@dataclass
class _Trials:
    """When to try an arm again, in rounds; the wait doubles with each trial."""

    wait: int
    due: int


@dataclass
class ArmStats:
    """Statistics of a model's sources, across requests. Bounded by the number of sources."""

    times: PassTimes
    num_rounds: int = 0
    acceptance: dict[tuple[str, int], DecayedMean] = field(
        default_factory=dict
    )  # by (source, tokens matched)
    by_confidence: defaultdict[str, AcceptanceByConfidence] = field(  # by source
        default_factory=lambda: defaultdict(AcceptanceByConfidence)
    )
    trials: dict[str, _Trials] = field(default_factory=dict)
    # Time that trials may take, in plain steps. It begins above 0, so that a good source is found early.
    credit: float = 4.0


class AdaptivePolicy:
    """Picks the round with the most expected tokens per second (after Zarch et al., DEL, arXiv 2504.05598).

    Other arms get trials within a small share of the time, each after a longer wait, and only if they could
    beat plain steps. A draft ends when another token would cost more than it is expected to save.

    Args:
        arms: by name of the source.
        longest: the most tokens of a draft.
        stats: of the model.
    """

    # Expected speed of drafts over that of plain steps, at least: it is an estimate.
    _MARGIN = 1.03
    # Tokens of a trial; rounds before the first one; the most rounds between plain steps; share of the time.
    _TRIAL, _WAIT, _WAIT_FOR_PLAIN, _SHARE = 2, 8, 64, 0.01
    # The most tokens that layers draft: longer drafts are hardly ever accepted as a whole.
    _LONGEST_OF_LAYERS = 8
    # A trial whose acceptance exceeds the estimate by this is repeated soon.
    _HOPE = 0.3

    def __init__(self, arms: Mapping[str, Arm], longest: int, stats: ArmStats) -> None:
        self._arms, self._longest, self._stats = arms, longest, stats
        self._layered = [name for name, arm in arms.items() if arm.draft_ratio > 0.0]
        self._plan, self._plain = Plan(), Plan()
        # Valid until something is learnt of drafts:
        self._of_layers: dict[tuple[int, int, int], Plan] = {}
        self._hopes: dict[tuple[str, int, int], Plan | None] = {}

    def plan(self, matched: Mapping[str, Sequence[int | None]], limits: Sequence[int]) -> Plan:
        """Plan one round.

        Args:
            matched: by free source, [B] tokens that an n-gram matched; None: no draft for the row.
            limits: [B] the most tokens to draft.
        """
        stats, longest, num_rows = self._stats, min(max(limits), self._longest), len(limits)
        best = self._plain = Plan(tokens=float(num_rows), seconds=stats.times.plain_step(num_rows))
        if longest:
            num_drafting = sum(limit > 0 for limit in limits)
            layers = self._layers_alone(num_rows, num_drafting, min(longest, self._LONGEST_OF_LAYERS))
            plans = [layers]
            lookups, chances = self._looked_up(matched, limits)
            if any(chances) and layers.drafts:
                plans.append(self._with_lookups(layers.source, lookups, chances, layers.length))
            # The most tokens that n-grams can give, with endless drafts. Most plain rounds need no more.
            if sum(1.0 / max(1.0 - chance, 1e-6) for chance in chances) > self._MARGIN * num_rows:
                plans.append(self._with_lookups(PLAIN, lookups, chances, longest))
            promising = max(plans, key=lambda plan: plan.rate)
            if promising.rate > self._MARGIN * self._plain.rate:
                best = promising
        stats.num_rounds += 1
        stats.credit += self._SHARE * best.seconds / self._plain.seconds
        self._plan = self._trial(best, num_rows, longest) or best
        return self._plan

    def goes_on(self, confidences: Sequence[Sequence[float]]) -> bool:
        """Whether to draft another token.

        Args:
            confidences: [B] probabilities of the tokens drafted so far.
        """
        plan, num_rows, width = self._plan, len(confidences), max(map(len, confidences))
        if plan.is_trial:
            return width < plan.length
        by_confidence = self._stats.by_confidence[plan.source]
        accepted = sum(by_confidence.all_accepted(row) for row in confidences if row)
        with_this, with_another = self._stats.times.verifications(num_rows, width + 1)[-2:]
        more = self._draft_step(plan.source, num_rows) + with_another - with_this
        return accepted * self._acceptance(plan.source, 0).value > more * max(plan.rate, self._plain.rate)

    def see(self, source: str, matched: int, is_right: bool) -> None:
        """Learn whether the first token of a guess is right, drafted or not."""
        self._acceptance(source, matched).add(float(is_right))

    def learn(
        self,
        sources: Sequence[str],
        matched: Sequence[int],
        confidences: Sequence[Sequence[float]],
        drafted: Sequence[int],
        accepted: Sequence[int],
        seconds: tuple[float, float] | None,
    ) -> None:
        """Learn from the outcome of a round.

        Args:
            sources: [B] that drafted.
            matched, drafted, accepted: [B] tokens.
            confidences: [B] probabilities of drafted tokens, if known.
            seconds: of drafting and of verifying; None: not typical.
        """
        stats, plan = self._stats, self._plan
        if plan.is_trial and plan.source != PLAIN:
            hoped = self._acceptance(plan.source, 0).value + self._HOPE
            if sum(accepted) > hoped * sum(drafted):
                stats.trials[plan.source] = _Trials(self._WAIT, stats.num_rounds + self._WAIT)
        if any(drafted) or stats.num_rounds % self._WAIT == 0:
            self._of_layers.clear()
            self._hopes.clear()
        for row, source in enumerate(sources if any(drafted) else ()):
            # `see` has learnt the first token of an n-gram.
            for i in range(0 if source in self._layered else 1, min(accepted[row] + 1, drafted[row])):
                is_right = float(i < accepted[row])
                self._acceptance(source, matched[row]).add(is_right)
                if confidences and confidences[row]:
                    stats.by_confidence[source][confidences[row][i]].add(is_right)
        own = max((n for n, source in zip(drafted, sources, strict=True) if source == plan.source), default=0)
        if seconds is not None:
            num_rows, (of_draft, of_verification) = len(sources), seconds
            if plan.is_trial:  # the price was an estimate; the bound is for stalls
                beyond = min(sum(seconds), 3.0 * plan.seconds) - plan.seconds
                stats.credit -= beyond / self._plain.seconds
            if own:
                expected = self._draft_step(plan.source, num_rows)
                stats.times.add_draft(plan.source, num_rows, of_draft / own, expected)
            stats.times.add_verification(num_rows, max(drafted), of_verification)

    def _looked_up(
        self, matched: Mapping[str, Sequence[int | None]], limits: Sequence[int]
    ) -> tuple[list[str], list[float]]:
        """[B] the best n-gram source of each row, and the acceptance of its tokens."""
        lookups, chances = [PLAIN] * len(limits), [0.0] * len(limits)
        for name, numbers in matched.items():
            for row, number in enumerate(numbers):
                if number is not None and limits[row]:
                    chance = self._acceptance(name, number).value
                    if chance > chances[row]:
                        lookups[row], chances[row] = name, chance
        return lookups, chances

    def _layers_alone(self, num_rows: int, num_drafting: int, longest: int) -> Plan:
        """Drafts of the best arm of layers, or a plain step."""
        key = (num_rows, num_drafting, longest)
        if key not in self._of_layers:
            plans = [self._plain]
            for name in self._layered:
                tokens = num_rows + num_drafting * (self._expected(name, longest) - 1.0)
                plans.append(self._best_length(name, num_rows, tokens))
            self._of_layers[key] = max(plans, key=lambda plan: plan.rate)
        return self._of_layers[key]

    def _with_lookups(
        self, source: str, lookups: Sequence[str], chances: Sequence[float], longest: int
    ) -> Plan:
        """N-grams, and drafts of the source for rows where more of them is expected to be accepted."""
        looked_up, drafted = _expected_tokens(chances, longest), self._expected(source, longest)
        plan = self._best_length(source, len(lookups), numpy.maximum(looked_up, drafted).sum(0))
        keeps = looked_up[:, plan.looked_up] > drafted[plan.looked_up]
        lookups = [name if keep else PLAIN for name, keep in zip(lookups, keeps, strict=True)]
        return plan._replace(lookups=lookups)

    def _best_length(self, source: str, num_rows: int, tokens: numpy.ndarray) -> Plan:
        """The best round with the source, given the expected tokens by draft length."""
        longest = len(tokens) - 1
        seconds = self._seconds(source, num_rows, longest)
        best = int((tokens / seconds).argmax())
        return Plan(source, longest, (), best, float(tokens[best]), float(seconds[best]))

    def _trial(self, best: Plan, num_rows: int, longest: int) -> Plan | None:
        """A trial of the arm that has been due longest; None: none is due or affordable."""
        stats = self._stats
        due: list[tuple[int, str]] = []
        for i, name in enumerate((PLAIN, *self._layered)):
            first = stats.num_rounds + self._WAIT * (i + 1)
            trials = stats.trials.setdefault(name, _Trials(self._WAIT, first))
            if name == best.source and (name != PLAIN or not best.drafts):
                trials.wait, trials.due = self._WAIT, stats.num_rounds + self._WAIT
            elif trials.due <= stats.num_rounds:
                due.append((trials.due, name))
        for _, name in sorted(due):
            trial = self._plain if name == PLAIN else self._hoped(name, num_rows, min(self._TRIAL, longest))
            if trial is None:
                continue
            # Priced as if nothing were accepted: the estimate must not pay for the trial.
            price = max(0.0, trial.seconds - num_rows / best.rate) / self._plain.seconds
            if price > stats.credit:
                return None  # cheaper arms must not use up the credit
            stats.credit -= price
            trials = stats.trials[name]
            most = self._WAIT_FOR_PLAIN if name == PLAIN else 2 * trials.wait
            trials.wait = min(2 * trials.wait, most)
            trials.due = stats.num_rounds + trials.wait
            return trial._replace(is_trial=True)
        return None

    def _hoped(self, name: str, num_rows: int, length: int) -> Plan | None:
        """A trial of an arm; None: it could not pay with the acceptance of its deeper arm, or with 1."""
        key = (name, num_rows, length)
        if key not in self._hopes:
            seconds = self._seconds(name, num_rows, self._longest)
            deeper = self._arms[name].deeper
            most = self._acceptance(deeper, 0).value if deeper else 1.0
            hoped = num_rows * _expected_tokens([most], self._longest)[0]
            pays = bool(length) and (hoped / seconds).max() > self._MARGIN * self._plain.rate
            tokens = num_rows * float(self._expected(name, length)[-1])
            self._hopes[key] = Plan(name, length, (), 0, tokens, float(seconds[length])) if pays else None
        return self._hopes[key]

    def _expected(self, name: str, longest: int) -> numpy.ndarray:
        """[longest + 1] expected tokens of a row, by draft length."""
        acceptance = 0.0 if name == PLAIN else self._acceptance(name, 0).value
        return _expected_tokens([acceptance], longest)[0]

    def _seconds(self, name: str, num_rows: int, longest: int) -> numpy.ndarray:
        """[longest + 1] of a round, by draft length."""
        draft_step = 0.0 if name == PLAIN else self._draft_step(name, num_rows)
        return draft_step * numpy.arange(longest + 1) + self._stats.times.verifications(num_rows, longest)

    def _draft_step(self, name: str, num_rows: int) -> float:
        arm = self._arms[name]
        return self._stats.times.draft_step(name, num_rows, arm.draft_ratio, arm.growth)

    def _acceptance(self, name: str, matched: int) -> DecayedMean:
        """Acceptance of a token after accepted ones."""
        means = self._stats.acceptance
        if (name, matched) not in means:
            arm = self._arms[name]
            prior = arm.priors[matched]
            deeper = self._acceptance(arm.deeper, 0) if arm.deeper else None
            means[name, matched] = DecayedMean(
                prior if deeper is None else lambda: min(prior, deeper.value), arm.weight, decay=0.97
            )
        return means[name, matched]


def _expected_tokens(chances: Sequence[float], longest: int) -> numpy.ndarray:
    """[n] acceptance per token -> [n, longest + 1] expected tokens of a round, by draft length."""
    return (numpy.array(chances)[:, None] ** numpy.arange(longest + 1)).cumsum(1)
