"""A bandit over draft sources: plans each round by acceptance so far and the time of passes.

Knows nothing of models, tokens or tensors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from math import prod
from threading import RLock
from typing import Any, TypeVar

from self_speculation.drafts.costs import DecayedMean, PassTimes
from self_speculation.drafts.policy import Arm, Confidences, Match, Plan, RoundOutcome

T = TypeVar("T")

# Rounds before the first trial of an arm, and the most between two trials, or two prompts that judge exits.
_WAIT, _LONGEST_WAIT = 8, 512

_BINS = 10  # ranges of confidence


class AcceptanceByConfidence:
    """How often drafted tokens of a probability are accepted, learnt by ranges of probability."""

    def __init__(self) -> None:
        self._means = [DecayedMean((i + 0.5) / _BINS) for i in range(_BINS)]

    def __getitem__(self, confidence: float) -> DecayedMean:
        return self._means[min(int(confidence * _BINS), _BINS - 1)]

    def all_accepted(self, confidences: Sequence[float]) -> float:
        """The chance that a draft of tokens with these probabilities is accepted as a whole."""
        return prod(self[confidence].value for confidence in confidences)


@dataclass
class _Trials:
    """When to try an arm again, or to judge exits; the wait doubles each time."""

    due: int
    wait: int = _WAIT

    def postpone(self, now: int) -> None:
        self.wait = min(2 * self.wait, _LONGEST_WAIT)
        self.due = now + self.wait


@dataclass
class ArmStats:
    """Statistics of a model's sources, across requests and threads. Bounded by the number of sources.

    Args:
        relative_pass_cost: estimated cost of a pass over n tokens, relative to one.
        num_threads: that the next pass will use. Times are valid for one number of threads.
    """

    relative_pass_cost: Callable[[int], float]
    num_threads: Callable[[], int] = lambda: 1
    num_rounds: int = 0
    # By source and matched tokens.
    acceptance: dict[tuple[str, int], DecayedMean] = field(default_factory=dict)
    by_confidence: defaultdict[str, AcceptanceByConfidence] = field(  # by source
        default_factory=lambda: defaultdict(AcceptanceByConfidence)
    )
    trials: dict[str | None, _Trials] = field(default_factory=dict)
    judging: _Trials = field(default_factory=lambda: _Trials(due=0))  # of exits, by prompts
    # Time that trials may take, in plain steps. It begins above 0, so that a good source is found early.
    credit: float = 4.0
    lock: Any = field(default_factory=RLock)
    _times: dict[int, PassTimes] = field(default_factory=dict)  # by number of threads

    @property
    def times(self) -> PassTimes:
        number = self.num_threads()
        return self._times.get(number) or self._times.setdefault(number, PassTimes(self.relative_pass_cost))


def _alone(method: Callable[..., T]) -> Callable[..., T]:
    """Let one thread at a time read and write the statistics."""

    @wraps(method)
    def locked(self: AdaptivePolicy, *args: Any) -> T:
        with self._stats.lock:
            return method(self, *args)

    return locked


class AdaptivePolicy:
    """Picks the round with the most expected tokens per second (after Zarch et al., DEL, arXiv 2504.05598).

    Prompts judge early exits. Other arms get trials within a small share of the time, each after a longer
    wait, and only if they could beat plain steps. A draft ends when another token would cost more than it is
    expected to save.

    Args:
        arms: by name of the source.
        longest: the most tokens of a draft.
        stats: of the model.
    """

    # Expected speed of drafts over that of plain steps, at least: it is an estimate.
    _MARGIN = 1.03
    # Of the time, for trials.
    _SHARE = 0.01
    # The most tokens that layers draft: longer drafts are hardly ever accepted as a whole.
    _LONGEST_BY_LAYERS = 8

    def __init__(self, arms: Mapping[str, Arm], longest: int, stats: ArmStats) -> None:
        self._arms, self._longest, self._stats = arms, longest, stats
        self._draft_steps = {name: arm.draft_step for name, arm in arms.items() if arm.draft_step}
        self._judged = [name for name, arm in arms.items() if arm.is_judged]
        self._tried = (None, *self._draft_steps)
        for i, name in enumerate(self._tried, 1):
            stats.trials.setdefault(name, _Trials(stats.num_rounds + _WAIT * i))
        self._plan, self._plain = Plan(), Plan()
        # Valid until something is learnt of drafts.
        self._layer_plans: dict[tuple[PassTimes, int, int, int], Plan] = {}

    @_alone
    def plan(self, matches: Sequence[Match | None], limits: Sequence[int]) -> Plan:
        """Plan one round.

        Args:
            matches: [B] drafts that were looked up; None: none.
            limits: [B] the most tokens to draft.
        """
        stats, longest, num_rows = self._stats, min(max(limits), self._longest), len(limits)
        best = self._plain = Plan(tokens=float(num_rows), seconds=stats.times.plain_step(num_rows))
        if longest:
            num_drafting = sum(limit > 0 for limit in limits)
            layers = self._layers_alone(num_rows, num_drafting, min(longest, self._LONGEST_BY_LAYERS))
            plans = [layers]
            chances = [self._acceptance(*each[:2]).value if each else 0.0 for each in matches]
            if any(chances):
                plans.append(self._with_lookups(None, chances, longest))
                if layers.max_drafted:
                    plans.append(self._with_lookups(layers.source, chances, layers.max_drafted))
            promising = max(plans, key=lambda plan: plan.rate)
            if promising.rate > self._MARGIN * self._plain.rate:
                best = promising
        stats.num_rounds += 1
        stats.credit += self._SHARE * best.seconds / self._plain.seconds
        self._plan = self._trial(best, num_rows, longest) or best
        return self._plan

    @_alone
    def should_continue(self, confidences: Confidences) -> list[bool]:
        """[B] whether to draft another token: the rows of a batch end together.

        Args:
            confidences: [B] probabilities of the tokens drafted so far.
        """
        plan, num_rows, width = self._plan, len(confidences), max(map(len, confidences))
        if plan.is_trial:
            return [width < plan.max_drafted] * num_rows
        assert plan.source is not None, "nothing drafts"
        by_confidence = self._stats.by_confidence[plan.source]
        accepted = sum(by_confidence.all_accepted(row) for row in confidences if row)
        seconds = self._seconds(plan.source, num_rows)
        more = seconds(width + 1) - seconds(width)
        gain = accepted * self._acceptance(plan.source, 0).value
        return [gain > more * max(plan.rate, self._plain.rate)] * num_rows

    @_alone
    def to_be_judged(self) -> list[str]:
        """The exits that the next prompt shall judge: all, ever more rarely."""
        judging, now = self._stats.judging, self._stats.num_rounds
        if judging.due > now:
            return []
        judging.postpone(now)
        return self._judged

    @_alone
    def score_exits(self, num_right: Mapping[str, float], num_positions: int) -> None:
        """Learn from a prompt: at so many of its positions these exits would have drafted a right token."""
        for name, number in num_right.items():
            self._acceptance(name, 0).add(number / num_positions, weight=num_positions)
        self._layer_plans.clear()

    @_alone
    def see(self, source: str, matched: int, is_right: bool) -> None:
        """Learn whether the first token of a guess is right, drafted or not."""
        self._acceptance(source, matched).add(float(is_right))

    @_alone
    def learn(self, outcome: RoundOutcome) -> None:
        """Learn from the outcome of a round."""
        stats, plan = self._stats, self._plan
        sources, matched, confidences, drafted, accepted, seconds = outcome
        if plan.is_trial and plan.source is not None and sum(accepted) == sum(drafted):  # try it again soon
            stats.trials[plan.source] = _Trials(stats.num_rounds + _WAIT)
        if any(drafted) or stats.num_rounds % _WAIT == 0:
            self._layer_plans.clear()
        for row, source in enumerate(sources):
            if source is None:
                continue
            # `see` has learnt the first token of an n-gram.
            for i in range(0 if source in self._draft_steps else 1, min(accepted[row] + 1, drafted[row])):
                is_right = float(i < accepted[row])
                self._acceptance(source, matched[row]).add(is_right)
                if confidences and confidences[row]:
                    stats.by_confidence[source][confidences[row][i]].add(is_right)
        if seconds is None:
            return
        times, num_rows, (draft_seconds, verify_seconds) = stats.times, len(sources), seconds
        if plan.is_trial:  # the price was an estimate
            beyond = times.bounded(sum(seconds), plan.seconds) - plan.seconds
            stats.credit -= beyond / self._plain.seconds
        own = max((n for n, source in zip(drafted, sources, strict=True) if source == plan.source), default=0)
        if own and plan.source is not None:
            draft_step = self._draft_steps[plan.source]
            times.add_draft(plan.source, num_rows, draft_seconds / own, draft_step)
        times.add_verification(num_rows, max(drafted), verify_seconds)

    def _layers_alone(self, num_rows: int, num_drafting: int, longest: int) -> Plan:
        """Drafts of the best arm of layers, or a plain step."""
        key = (self._stats.times, num_rows, num_drafting, longest)
        if key not in self._layer_plans:
            plans = [self._plain]
            for name in self._draft_steps:
                acceptance = self._acceptance(name, 0).value
                chances = [acceptance] * num_drafting + [0.0] * (num_rows - num_drafting)
                plans.append(self._best_length(name, chances, longest))
            self._layer_plans[key] = max(plans, key=lambda plan: plan.rate)
        return self._layer_plans[key]

    def _with_lookups(self, source: str | None, chances: Sequence[float], longest: int) -> Plan:
        """N-grams, and drafts of the source for rows where more of them is expected to be accepted."""
        own = 0.0 if source is None else self._acceptance(source, 0).value
        plan = self._best_length(source, [max(chance, own) for chance in chances], longest)
        return plan._replace(lookups=[chance > own for chance in chances])

    def _trial(self, best: Plan, num_rows: int, longest: int) -> Plan | None:
        """A trial of the arm that has been due longest; None: none is due or affordable."""
        stats = self._stats
        if best.source is not None or not best.max_drafted:  # in use
            stats.trials[best.source] = _Trials(stats.num_rounds + _WAIT)
        due = [name for name in self._tried if stats.trials[name].due <= stats.num_rounds]
        # A single row drafts two tokens per trial, a batch one.
        length = min(2 if num_rows == 1 else 1, longest)
        for name in sorted(due, key=lambda name: stats.trials[name].due):
            trial = self._plain if name is None else self._hoped(name, num_rows, length)
            if trial is None:
                stats.trials[name].due += _WAIT
                continue
            # Priced as if nothing were accepted: the estimate must not pay for the trial.
            price = max(0.0, trial.seconds - num_rows / best.rate) / self._plain.seconds
            if price > stats.credit:
                return None  # cheaper arms must not use up the credit
            stats.credit -= price
            stats.trials[name].postpone(stats.num_rounds)
            return trial._replace(is_trial=True)
        return None

    def _hoped(self, name: str, num_rows: int, length: int) -> Plan | None:
        """A trial of an arm; None: it could not pay even if all its tokens were accepted. A judged arm, whose
        acceptance is known, is tried if it would pay at its estimated price.
        """
        known, is_judged = self._acceptance(name, 0).value, self._arms[name].is_judged
        hoped = self._best_length(
            name, [known if is_judged else 1.0] * num_rows, self._longest, is_estimate=is_judged
        )
        if not length or hoped.rate <= self._MARGIN * self._plain.rate:
            return None
        tokens = _expected_tokens([known] * num_rows, length)
        return Plan(name, length, (), 0, tokens[-1], self._seconds(name, num_rows)(length))

    def _best_length(
        self, name: str | None, chances: Sequence[float], longest: int, is_estimate: bool = False
    ) -> Plan:
        """The best round of rows with these chances per token."""
        tokens, seconds = _expected_tokens(chances, longest), self._seconds(name, len(chances), is_estimate)
        best = max(range(longest + 1), key=lambda k: tokens[k] / seconds(k))
        return Plan(name, longest, (), best, tokens[best], seconds(best))

    def _seconds(self, name: str | None, num_rows: int, is_estimate: bool = False) -> Callable[[int], float]:
        """Draft length -> time of a round; `is_estimate`: whatever drafts took so far."""
        verification, draft_step = self._stats.times.verification(num_rows), 0.0
        if name is not None:
            estimate = self._draft_steps[name]
            known = None if is_estimate else name
            draft_step = self._stats.times.draft_step(known, num_rows, estimate)
        return lambda k: draft_step * k + verification(k)

    def _acceptance(self, name: str, matched: int) -> DecayedMean:
        """Acceptance of a token after accepted ones."""
        means, arm = self._stats.acceptance, self._arms[name]
        key = name, min(matched, len(arm.priors) - 1)
        if key not in means:
            means[key] = DecayedMean(arm.priors[key[1]], arm.weight)
        return means[key]


def _expected_tokens(chances: Sequence[float], longest: int) -> list[float]:
    """Acceptance per token of each row -> [longest + 1] expected tokens of a round, by draft length."""
    tokens, accepted = [float(len(chances))], [1.0] * len(chances)  # P(the tokens so far are accepted)
    for _ in range(longest):
        accepted = [so_far * chance for so_far, chance in zip(accepted, chances, strict=True)]
        tokens.append(tokens[-1] + sum(accepted))
    return tokens
