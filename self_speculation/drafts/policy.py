"""Plans each round of adaptive decoding: which source drafts how many tokens of which row.

`AdaptivePolicy` is a bandit over draft sources: it picks by acceptance so far and the time of passes. Knows
nothing of models or tokens.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from heapq import heapify, heappop, heapreplace
from threading import RLock
from typing import NamedTuple

from self_speculation.drafts.costs import DecayedMean, PassTimes
from self_speculation.drafts.draft import Draft, DraftCost, Match

# Rounds between two trials: at first, and at most.
_WAIT = 8
_LONGEST_WAIT = 128

# A row: its draft limit, its match, and the chance that the match's next token is right.
_Row = tuple[int, Match | None, float]


class Plan(NamedTuple):
    """One round. At most one source computes."""

    sources: list[str | None]  # [B] of each row's draft; None: it has none
    lengths: list[int]  # [B] tokens of each row
    rate: float = 1.0  # expected tokens of all rows per second
    trial: int | None = None  # the row whose draft is a trial


@dataclass
class SourceStats:
    """Statistics of a model's sources, across requests and threads. Bounded by the number of sources.

    Args:
        relative_pass_cost: estimated cost of a pass over n tokens, relative to one.
        get_num_threads: that the next pass will use. Times are valid for one number of threads.
    """

    relative_pass_cost: Callable[[int], float]
    get_num_threads: Callable[[], int] = lambda: 1
    num_rounds: int = 0
    # (source, matched tokens) -> acceptance.
    acceptance: dict[tuple[str, int], DecayedMean] = field(default_factory=dict)
    used_at: dict[str | None, int] = field(default_factory=dict)  # the last round of each source
    trial_at: int = _WAIT  # the round of the next trial
    wait: int = _WAIT
    trial_cost: float = 0.0  # of all trials, in plain rounds
    lock: AbstractContextManager[bool] = field(default_factory=RLock)
    _times: dict[int, PassTimes] = field(default_factory=dict)  # by number of threads

    @property
    def times(self) -> PassTimes:
        return self._times.setdefault(self.get_num_threads(), PassTimes(self.relative_pass_cost))


class AdaptivePolicy:
    """Picks the round with the most expected tokens per second (after Zarch et al., DEL, arXiv 2504.05598).

    A round grows by the drafted token that is most likely right, of whichever row, while chance over cost of
    that token beats the tokens per second of the round so far. Costs rise with the tokens of a pass. So once
    a token of the computing source no longer pays, that source stops. Once a looked-up token no longer pays,
    the round is complete.

    At growing intervals, the source that was used longest ago has a trial, of one token of one row, if drafts
    of it that are accepted as a whole would be faster than plain steps.

    Args:
        costs: by name of the source.
        stats: of the model. One thread at a time reads or writes them.
    """

    # The least chance over cost of a drafted token, relative to the round so far: both are estimates.
    _MARGIN = 1.1
    # Where tokens cost nothing, such a token still takes time to plan.
    _LEAST_CHANCE = 0.02
    # The most tokens that layers draft: longer drafts are hardly ever accepted as a whole.
    _LONGEST_BY_LAYERS = 8

    def __init__(self, costs: Mapping[str, DraftCost], stats: SourceStats) -> None:
        self._costs = costs
        self._stats = stats
        self._draft_steps = {name: cost.draft_step for name, cost in costs.items() if cost.draft_step}
        # Of this round.
        self._plan = Plan([], [])
        self._trial_cost = 0.0
        # A plan without drafts holds until `_plain_until`, for the same number of rows and times, while
        # no match is likelier right than `_plain_guess`.
        self._plain_in: tuple[int, PassTimes] | None = None
        self._plain_until = 0
        self._plain_guess = 0.0
        # Seconds in this round of a pass over so many tokens, and of one by a source for so many rows.
        self._verifying: Callable[[int], float] = float
        self._drafting: Callable[[str, int], float] = lambda *_: 0.0

    def plan(self, matches: Sequence[Match | None], limits: Sequence[int]) -> Plan | None:
        """Plan one round; None: a plain step, as planned a few rounds ago.

        Args:
            matches: [B] drafts that were looked up; None: none.
            limits: [B] the most tokens to draft.
        """
        with self._stats.lock:
            stats = self._stats
            num_rows = len(limits)
            stats.num_rounds += 1
            situation = (num_rows, stats.times)
            until = min(self._plain_until, stats.trial_at)
            guesses = [self._acceptance(*match[:2]).value if match else 0.0 for match in matches]  # [B]
            no_better = self._plain_in == situation and max(guesses) <= self._plain_guess
            if no_better and stats.num_rounds < until:
                return None
            self._verifying = stats.times.passes(num_rows)
            self._drafting = stats.times.draft_passes(num_rows, self._draft_steps)
            rows = [*zip(limits, matches, guesses, strict=True)]
            looked_up = self._choose(None, 0.0, rows)
            best = looked_up
            for source in self._draft_steps:
                if (chance := self._acceptance(source, 0).value) > self._LEAST_CHANCE:
                    plan = self._choose(source, chance, rows)
                    best = plan if plan.rate > best.rate else best
            used = {source if source in self._draft_steps else None for source in best.sources if source}
            stats.used_at |= dict.fromkeys(used, stats.num_rounds)
            if not used:
                self._plain_in = situation
                self._plain_until = stats.num_rounds + _WAIT
                self._plain_guess = max(guesses)
            self._plan = best
            if any(limits) and stats.num_rounds >= stats.trial_at:
                self._plan = self._trial(used, looked_up, rows) or best
            return self._plan

    def learn(self, draft: Draft, accepted: Sequence[int], seconds: tuple[float, float] | None) -> None:
        """Learn from the outcome of a round.

        Args:
            accepted: [B] tokens of each row.
            seconds: of drafting and of verifying; None: they are not typical.
        """
        with self._stats.lock:
            stats = self._stats
            drafted = draft.lengths
            num_rows = len(draft.lengths)
            if (row := self._plan.trial) is not None:
                stats.trial_cost += self._trial_cost - accepted[row] / num_rows
                if accepted[row] == drafted[row]:  # try it again soon
                    stats.wait = _WAIT
                    stats.trial_at = stats.num_rounds + _WAIT
                    name = draft.sources[row]
                    stats.used_at[name if name in self._draft_steps else None] = 0
            for row, source in enumerate(draft.sources):
                if source is None:
                    continue
                matched = draft.matched[row] if draft.matched else 0
                for i in range(min(accepted[row] + 1, drafted[row])):
                    self._acceptance(source, matched).add(float(i < accepted[row]))
            if seconds is None:
                return
            times = stats.times
            draft_seconds, verify_seconds = seconds
            for source in self._draft_steps.keys() & {*draft.sources}:
                of_source = [n for n, name in zip(drafted, draft.sources, strict=True) if name == source]
                if passes := [sum(length > i for length in of_source) for i in range(max(of_source))]:
                    times.add_drafts(source, num_rows, passes, draft_seconds, self._draft_steps[source])
            times.add_verification(num_rows, sum(draft.query_lengths), verify_seconds)

    def _choose(self, source: str | None, chance: float, rows: Sequence[_Row]) -> Plan:
        """The best round with the drafts of this source where rows have no better match.

        Args:
            chance: that a token of the source is right after accepted ones.
        """
        verifying = self._verifying
        num_tokens = len(rows)
        lengths = [0] * num_tokens
        num_passes = 0
        reached = chance
        limits = [
            0 if guess > chance else min(limit, self._LONGEST_BY_LAYERS) for limit, _, guess in rows
        ]  # of the source
        longest = 0 if source is None else max(limits)
        # Of each match, minus the chance that the next token is reached and right.
        matches = [(-guess, row) for row, (limit, _, guess) in enumerate(rows) if guess > chance and limit]
        heapify(matches)
        expected = float(num_tokens)
        verification = verifying(num_tokens)  # seconds of the pass
        seconds = verification
        while matches or num_passes < longest:
            # A pass of the source drafts for all rows of the source, whose chances are equal.
            by_source = num_passes < longest and not (matches and -matches[0][0] > reached)
            more = sum(limit > num_passes for limit in limits) if by_source else 1
            chances = reached * more if by_source else -matches[0][0]
            longer = verifying(num_tokens + more)
            cost = longer - verification
            if by_source and source is not None:
                cost += self._drafting(source, more)
            too_few = chances < self._LEAST_CHANCE * more
            if too_few or chances * seconds < self._MARGIN * cost * expected:
                if not by_source:
                    break
                longest = num_passes  # a token that was looked up costs less
                continue
            num_tokens += more
            verification = longer
            expected += chances
            seconds += cost
            if by_source:
                num_passes += 1
                reached *= chance
                continue
            negative, row = matches[0]
            _, match, guess = rows[row]
            lengths[row] += 1
            if match is not None and lengths[row] < len(match.ids):
                heapreplace(matches, (negative * guess, row))
            else:
                heappop(matches)
        sources: list[str | None] = [
            match.source if n and match else None for n, (_, match, _) in zip(lengths, rows, strict=True)
        ]
        for row, limit in enumerate(limits):
            if num_passes and limit:
                sources[row] = source
                lengths[row] = min(limit, num_passes)
        return Plan(sources, lengths, expected / seconds)

    def _trial(self, used: Set[str | None], looked_up: Plan, rows: Sequence[_Row]) -> Plan | None:
        """A trial of the source that was used longest ago, of those that would pay if whole drafts were
        accepted; None: there are none. Drafts that are looked up go on beside it.
        """
        stats = self._stats
        plain = self._verifying(len(rows))
        names = [name for name in (None, *self._draft_steps) if name not in used]
        for name in sorted(names, key=lambda name: stats.used_at.get(name, 0)):
            stats.used_at[name] = stats.num_rounds
            sure = [(limit, match, float(name is None and match is not None)) for limit, match, _ in rows]
            if not any(self._choose(name, float(name is not None), sure).lengths):
                continue
            stats.wait = min(2 * stats.wait, _LONGEST_WAIT)
            stats.trial_at = stats.num_rounds + stats.wait
            # The likeliest match, or the row that has none.
            order = sorted(
                (row for row, (limit, *_) in enumerate(rows) if limit), key=lambda row: rows[row][2]
            )
            tried = order[-1 if name is None else 0]
            _, match, _ = rows[tried]
            drafting = 0.0 if name is None else self._drafting(name, 1)
            looked_up.sources[tried] = match.source if name is None and match else name
            looked_up.lengths[tried] = 1
            self._trial_cost = (drafting + self._verifying(len(rows) + 1)) / plain - 1.0
            return looked_up._replace(trial=tried)
        stats.trial_at = stats.num_rounds + _WAIT
        return None

    def _acceptance(self, name: str, matched: int) -> DecayedMean:
        """Acceptance of a token after accepted ones."""
        cost = self._costs[name]
        key = (name, min(matched, len(cost.priors) - 1))
        known = self._stats.acceptance
        return known.get(key) or known.setdefault(key, DecayedMean(cost.priors[key[1]], cost.prior_strength))
