"""A bandit over draft sources: plans each round by acceptance so far and the time of passes.

Knows nothing of models, tokens or tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from math import prod
from threading import RLock
from typing import Any, TypeVar

from self_speculation.drafts.costs import DecayedMean, PassTimes
from self_speculation.drafts.policy import Arm, Confidences, Match, Plan, RoundOutcome

T = TypeVar("T")

_WAIT, _LONGEST_WAIT = 8, 128  # rounds between two trials


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
    # By source: rejections over those that the probabilities of drafted tokens tell.
    overconfidence: dict[str, DecayedMean] = field(default_factory=dict)
    used_at: dict[str | None, int] = field(default_factory=dict)  # the last round of each source
    trial_at: int = _WAIT  # the round of the next trial
    wait: int = _WAIT
    lock: Any = field(default_factory=RLock)
    _times: dict[int, PassTimes] = field(default_factory=dict)  # by number of threads

    @property
    def times(self) -> PassTimes:
        number = self.num_threads()
        return self._times.get(number) or self._times.setdefault(number, PassTimes(self.relative_pass_cost))


def _locked(method: Callable[..., T]) -> Callable[..., T]:
    """Let one thread at a time read and write the statistics."""

    @wraps(method)
    def locked(self: AdaptivePolicy, *args: Any) -> T:
        with self._stats.lock:
            return method(self, *args)

    return locked


class AdaptivePolicy:
    """Picks the round with the most expected tokens per second (after Zarch et al., DEL, arXiv 2504.05598).

    At growing intervals, the source that was used longest ago has a trial, unless even a draft that is
    accepted as a whole could not pay. A draft ends when another token would cost more than it is expected to
    save.

    Args:
        arms: by name of the source.
        longest: the most tokens of a draft.
        stats: of the model.
    """

    # Expected speed of drafts over that of plain steps, at least: it is an estimate.
    _MARGIN = 1.03
    # The share of a round's tokens that another drafted one must add.
    _TOO_FEW = 0.01
    # The most tokens that layers draft: longer drafts are hardly ever accepted as a whole.
    _LONGEST_BY_LAYERS = 8

    def __init__(self, arms: Mapping[str, Arm], longest: int, stats: ArmStats) -> None:
        self._arms, self._longest, self._stats = arms, longest, stats
        self._draft_steps = {name: arm.draft_step for name, arm in arms.items() if arm.draft_step}
        self._plan, self._plain = Plan(), Plan()

    @_locked
    def plan(self, matches: Sequence[Match | None], limits: Sequence[int]) -> Plan:
        """Plan one round.

        Args:
            matches: [B] drafts that were looked up; None: none.
            limits: [B] the most tokens to draft.
        """
        stats, longest, num_rows = self._stats, min(max(limits), self._longest), len(limits)
        best = self._plain = self._best_length(None, [0.0] * num_rows, 0)
        guesses = [self._acceptance(*each[:2]).value if each else 0.0 for each in matches]
        for source in (None, *self._draft_steps) if longest else ():
            # Rows have the draft that is more likely right.
            own = 0.0 if source is None else self._acceptance(source, 0).value
            pairs = zip(guesses, limits, strict=True)
            chances = [max(guess, own) if limit else 0.0 for guess, limit in pairs]
            plan = self._best_length(source, chances, longest)
            if plan.rate > max(best.rate, self._MARGIN * self._plain.rate):
                best = plan._replace(lookups=[guess > own for guess in guesses])
        stats.num_rounds += 1
        if best.max_drafted:
            stats.used_at[best.source] = stats.num_rounds
        self._plan = best
        if longest and stats.num_rounds >= stats.trial_at:
            self._plan = self._trial(best, [guess > 0.0 for guess in guesses], longest) or best
        return self._plan

    @_locked
    def should_continue(self, confidences: Confidences) -> list[bool]:
        """[B] whether to draft another token: the rows of a batch end together.

        Args:
            confidences: [B] probabilities of the tokens drafted so far.
        """
        plan, num_rows, width = self._plan, len(confidences), max(map(len, confidences))
        if plan.is_trial:
            return [width < plan.max_drafted] * num_rows
        assert plan.source is not None, "nothing drafts"
        doubt = self._overconfidence(plan.source).value
        accepted = sum(prod(max(0.0, 1.0 - doubt * (1.0 - c)) for c in row) for row in confidences if row)
        seconds = self._seconds(plan.source, num_rows)
        more = seconds(width + 1) - seconds(width)
        gain = accepted * self._acceptance(plan.source, 0).value
        return [gain > more * max(plan.rate, self._plain.rate)] * num_rows

    @_locked
    def learn(self, outcome: RoundOutcome) -> None:
        """Learn from the outcome of a round."""
        stats, plan = self._stats, self._plan
        sources, matched, confidences, drafted, accepted, seconds = outcome
        if plan.is_trial and sum(accepted) == sum(drafted):  # try it again soon
            stats.wait, stats.trial_at = _WAIT, stats.num_rounds + _WAIT
            stats.used_at[plan.source] = 0
        for row, source in enumerate(sources):
            if source is None:
                continue
            for i in range(min(accepted[row] + 1, drafted[row])):
                is_right = i < accepted[row]
                self._acceptance(source, matched[row]).add(float(is_right))
                if confidences and confidences[row]:
                    doubt = max(1e-3, 1.0 - confidences[row][i])
                    self._overconfidence(source).add((not is_right) / doubt, weight=doubt)
        if seconds is None:
            return
        times, num_rows, (draft_seconds, verify_seconds) = stats.times, len(sources), seconds
        own = max((n for n, source in zip(drafted, sources, strict=True) if source == plan.source), default=0)
        if own and plan.source is not None:
            draft_step = self._draft_steps[plan.source]
            times.add_draft(plan.source, num_rows, draft_seconds / own, draft_step)
        times.add_verification(num_rows, max(drafted), verify_seconds)

    def _trial(self, best: Plan, is_matched: Sequence[bool], longest: int) -> Plan | None:
        """A trial of the source that was used longest ago; None: none could pay."""
        stats = self._stats
        names = [name for name in (None, *self._draft_steps) if name != best.source or not best.max_drafted]
        for name in sorted(names, key=lambda name: stats.used_at.get(name, 0)):
            stats.used_at[name] = stats.num_rounds
            trial = self._optimistic_trial(name, is_matched, longest)
            if trial is not None:
                stats.wait = min(2 * stats.wait, _LONGEST_WAIT)
                stats.trial_at = stats.num_rounds + stats.wait
                return trial
        stats.trial_at = stats.num_rounds + _WAIT
        return None

    def _optimistic_trial(self, name: str | None, is_matched: Sequence[bool], longest: int) -> Plan | None:
        """A trial of layers, or of what was looked up; None: it could not pay even if all its tokens were
        accepted.
        """
        num_rows = len(is_matched)
        lookups = is_matched if name is None else ()
        chances = [1.0] * num_rows if name else [*map(float, is_matched)]
        if self._best_length(name, chances, longest).rate <= self._MARGIN * self._plain.rate:
            return None
        # A single row drafts two tokens per trial, a batch one.
        length = min(2 if num_rows == 1 else 1, longest)
        seconds = self._seconds(name, num_rows)(length)
        return Plan(name, length, lookups, length, float(num_rows), seconds, is_trial=True)

    def _best_length(self, name: str | None, chances: Sequence[float], longest: int) -> Plan:
        """The best round of rows whose drafts have these chances per token."""
        longest = longest if name is None else min(longest, self._LONGEST_BY_LAYERS)
        tokens, seconds = float(len(chances)), self._seconds(name, len(chances))
        best, counts = Plan(None, 0, (), 0, tokens, seconds(0)), Counter(filter(None, chances))
        for k in range(1, longest + 1):
            more = sum(number * chance**k for chance, number in counts.items())
            if more < self._TOO_FEW * tokens:  # nor do longer drafts, and planning takes time
                break
            tokens += more
            plan = Plan(name, longest, (), k, tokens, seconds(k))
            best = max(best, plan, key=lambda plan: plan.rate)
        return best

    def _seconds(self, name: str | None, num_rows: int) -> Callable[[int], float]:
        """Draft length -> time of a round."""
        times, draft_step = self._stats.times, 0.0
        if name is not None:
            draft_step = times.draft_step(name, num_rows, self._draft_steps[name])
        verification = times.verification(num_rows)
        return lambda k: draft_step * k + verification(k)

    def _acceptance(self, name: str, matched: int) -> DecayedMean:
        """Acceptance of a token after accepted ones."""
        arm = self._arms[name]
        key = name, min(matched, len(arm.priors) - 1)
        return self._stats.acceptance.setdefault(key, DecayedMean(arm.priors[key[1]], arm.weight))

    def _overconfidence(self, name: str) -> DecayedMean:
        return self._stats.overconfidence.setdefault(name, DecayedMean(1.0, weight=0.5))
