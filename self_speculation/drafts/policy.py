"""Plans each round of adaptive decoding: which source drafts for which row, and the most tokens.

`AdaptivePolicy` is a bandit over draft sources: it picks by acceptance so far and the time of passes. Knows
nothing of models or tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import mul
from threading import RLock
from typing import Any, NamedTuple

from self_speculation.drafts.costs import DecayedMean, PassTimes
from self_speculation.drafts.draft import Arm, Draft, Match

_WAIT, _LONGEST_WAIT = 8, 128  # rounds between two trials


class Plan(NamedTuple):
    """One round."""

    source: str | None = None  # for the other rows; None: no draft
    max_drafted: int = 0  # the most tokens of a row
    lookups: Sequence[bool] = ()  # [B] whether a row has the draft that was looked up; empty: none has
    rate: float = 1.0  # expected tokens of all rows per second
    is_trial: bool = False


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
    used_at: dict[str | None, int] = field(default_factory=dict)  # the last round of each source
    trial_at: int = _WAIT  # the round of the next trial
    wait: int = _WAIT
    lock: Any = field(default_factory=RLock)
    _times: dict[int, PassTimes] = field(default_factory=dict)  # by number of threads

    @property
    def times(self) -> PassTimes:
        return self._times.setdefault(self.num_threads(), PassTimes(self.relative_pass_cost))


class AdaptivePolicy:
    """Picks the round with the most expected tokens per second (after Zarch et al., DEL, arXiv 2504.05598).

    At growing intervals, the source that was used longest ago has a trial, if a draft of it that is accepted
    as a whole would be faster than plain steps.

    Args:
        arms: by name of the source.
        longest: the most tokens of a draft.
        stats: of the model. One thread at a time reads or writes them.
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
        self._plan, self._plain_rate = Plan(), 1.0  # of this round; tokens per second without drafts
        # A plan without drafts holds until a round, for a number of rows, a longest draft, these times, and
        # matches that are no more likely right than then.
        self._plain_in: tuple[int, int, PassTimes] | None = None
        self._plain_until, self._plain_guesses = 0, 0.0
        # Seconds in this round of a drafted token of each row, and of verifying 0, 1, ... of them.
        self._drafting: dict[str | None, float] = {}
        self._verifying: Sequence[float] = ()

    def plan(self, matches: Sequence[Match | None], limits: Sequence[int]) -> Plan | None:
        """Plan one round; None: a plain step, as planned a few rounds ago.

        Args:
            matches: [B] drafts that were looked up; None: none.
            limits: [B] the most tokens to draft.
        """
        with self._stats.lock:
            stats, longest, num_rows = self._stats, min(max(limits), self._longest), len(limits)
            stats.num_rounds += 1
            situation, until = (num_rows, longest, stats.times), min(self._plain_until, stats.trial_at)
            guesses = [self._acceptance(*each[:2]).value if each else 0.0 for each in matches]
            no_better = self._plain_in == situation and sum(guesses) <= self._plain_guesses
            if no_better and stats.num_rounds < until:
                return None
            self._drafting = {None: 0.0}
            self._drafting.update(stats.times.draft_steps(num_rows, self._draft_steps))
            self._verifying = stats.times.verifications(num_rows, longest)
            self._plain_rate = num_rows / self._verifying[0]
            best = Plan(rate=self._plain_rate)
            for source in self._drafting if longest else ():
                # Rows have the draft that is more likely right.
                own = 0.0 if source is None else self._acceptance(source, 0).value
                pairs = zip(guesses, limits, strict=True)
                chances = [max(guess, own) if limit else 0.0 for guess, limit in pairs]
                plan = self._best_length(source, chances, longest)
                if plan.rate > max(best.rate, self._MARGIN * self._plain_rate):
                    best = plan._replace(lookups=[guess > own for guess in guesses])
            if best.max_drafted:
                stats.used_at[best.source] = stats.num_rounds
            else:
                self._plain_in, self._plain_until = situation, stats.num_rounds + _WAIT
                self._plain_guesses = sum(guesses)
            self._plan = best
            if longest and stats.num_rounds >= stats.trial_at:
                self._plan = self._trial(best, [guess > 0.0 for guess in guesses], longest) or best
            return self._plan

    def learn(self, draft: Draft, accepted: Sequence[int], seconds: tuple[float, float] | None) -> None:
        """Learn from the outcome of a round.

        Args:
            accepted: [B] tokens of each row.
            seconds: of drafting and of verifying; None: they are not typical.
        """
        with self._stats.lock:
            stats, plan, drafted = self._stats, self._plan, draft.lengths
            if plan.is_trial and sum(accepted) == sum(drafted):  # try it again soon
                stats.wait, stats.trial_at = _WAIT, stats.num_rounds + _WAIT
                stats.used_at[plan.source] = 0
            for row, source in enumerate(draft.sources):
                if source is None:
                    continue
                matched = draft.matched[row] if draft.matched else 0
                for i in range(min(accepted[row] + 1, drafted[row])):
                    self._acceptance(source, matched).add(float(i < accepted[row]))
            if seconds is None:
                return
            times, num_rows, (draft_seconds, verify_seconds) = stats.times, len(drafted), seconds
            pairs = zip(drafted, draft.sources, strict=True)
            own = max((length for length, source in pairs if source == plan.source), default=0)
            if own and plan.source is not None:
                times.add_draft(plan.source, num_rows, draft_seconds / own, self._draft_steps[plan.source])
            times.add_verification(num_rows, max(drafted), verify_seconds)

    def _trial(self, best: Plan, is_matched: Sequence[bool], longest: int) -> Plan | None:
        """A trial, with one token, of the source that was used longest ago, of those that would pay if whole
        drafts were accepted; None: there are none.
        """
        stats, num_rows = self._stats, len(is_matched)
        names = [name for name in self._drafting if name != best.source or not best.max_drafted]
        for name in sorted(names, key=lambda name: stats.used_at.get(name, 0)):
            stats.used_at[name] = stats.num_rounds
            lookups = is_matched if name is None else ()
            chances = [*map(float, lookups)] if name is None else [1.0] * num_rows
            if self._best_length(name, chances, longest).rate > self._MARGIN * self._plain_rate:
                stats.wait = min(2 * stats.wait, _LONGEST_WAIT)
                stats.trial_at = stats.num_rounds + stats.wait
                return Plan(name, 1, lookups, is_trial=True)
        stats.trial_at = stats.num_rounds + _WAIT
        return None

    def _best_length(self, name: str | None, chances: Sequence[float], longest: int) -> Plan:
        """The best round of rows whose drafts have these chances per token."""
        longest = longest if name is None else min(longest, self._LONGEST_BY_LAYERS)
        draft_step, tokens, arrives = self._drafting[name], float(len(chances)), chances
        best = Plan(rate=self._plain_rate)
        for k in range(1, longest + 1):
            more = sum(arrives)
            if more < self._TOO_FEW * tokens:  # nor do longer drafts, and planning takes time
                break
            tokens += more
            rate = tokens / (draft_step * k + self._verifying[k])
            if rate > best.rate:
                best = Plan(name, k, rate=rate)
            arrives = [*map(mul, arrives, chances)]  # that k + 1 tokens of a row are accepted
        return best

    def _acceptance(self, name: str, matched: int) -> DecayedMean:
        """Acceptance of a token after accepted ones."""
        arm = self._arms[name]
        key, known = (name, min(matched, len(arm.priors) - 1)), self._stats.acceptance
        return known.get(key) or known.setdefault(key, DecayedMean(arm.priors[key[1]], arm.weight))
