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
# The share of rounds that accepted trials may cost: a source may be right and still take too long.
_TRIAL_SHARE = 0.01


class Plan(NamedTuple):
    """The drafts of one round. At most one source computes."""

    source_names: list[str | None]  # [B] of each row's draft; None: no draft
    lengths: list[int]  # [B] tokens of each row
    rate: float = 1.0  # expected tokens of all rows per second
    trial: int | None = None  # the row whose draft is a trial
    trial_cost: float = 0.0  # of the trial, in plain rounds


class _Row(NamedTuple):
    """What a row may draft in a round."""

    limit: int  # the most tokens
    match: Match | None
    p_match: float  # probability that the next token of the match is accepted; 0: no match


class _Planner:
    """Plans of one round, by the times of passes.

    A plan grows by the drafted token with the highest probability of being accepted, of whichever row, while
    that probability over the cost of the token beats the tokens per second of the plan so far. Costs rise
    with the tokens of a pass. So once a token of the computing source no longer pays, that source stops. Once
    a looked-up token no longer pays, the plan is complete.

    Args:
        verify_seconds: number of tokens -> seconds of the pass that verifies them.
        draft_seconds: source, number of rows -> seconds of a pass that drafts a token of each.
    """

    # The least gain over cost of a drafted token, relative to the plan so far: both are estimates.
    MARGIN = 1.1
    # Where tokens cost nothing, a token that is hardly ever accepted still takes time to plan.
    LEAST_PROBABILITY = 0.02
    # The most tokens that layers draft: longer drafts are hardly ever accepted as a whole.
    LONGEST_BY_LAYERS = 8

    def __init__(
        self, verify_seconds: Callable[[int], float], draft_seconds: Callable[[str, int], float]
    ) -> None:
        self.verify_seconds = verify_seconds
        self.draft_seconds = draft_seconds

    def best_plan(self, source: str | None, p_accept: float, rows: Sequence[_Row]) -> Plan:
        """The plan with the most tokens per second. Rows draft by `source` where no match is likelier.

        Args:
            p_accept: probability that a token of the source is accepted after accepted ones.
        """
        source_limits = [
            0 if source is None or row.p_match > p_accept else min(row.limit, self.LONGEST_BY_LAYERS)
            for row in rows
        ]
        most_passes = max(source_limits)
        num_passes = 0  # of the source
        p_source = p_accept  # that the token of the next pass is reached and accepted
        # Of each match, minus the probability that the next token is reached and accepted.
        matches = [(-row.p_match, i) for i, row in enumerate(rows) if row.p_match > p_accept and row.limit]
        heapify(matches)
        lengths = [0] * len(rows)
        num_tokens = len(rows)
        verification = self.verify_seconds(num_tokens)
        seconds = verification
        expected = float(num_tokens)
        while matches or num_passes < most_passes:
            p_match = -matches[0][0] if matches else 0.0
            by_source = num_passes < most_passes and p_source >= p_match
            new_tokens = sum(limit > num_passes for limit in source_limits) if by_source else 1
            probability = p_source if by_source else p_match
            longer_verification = self.verify_seconds(num_tokens + new_tokens)
            cost = longer_verification - verification
            if by_source and source is not None:
                cost += self.draft_seconds(source, new_tokens)
            gain = probability * new_tokens
            pays = probability >= self.LEAST_PROBABILITY and gain * seconds >= self.MARGIN * cost * expected
            if not pays and not by_source:
                break
            if not pays:
                most_passes = num_passes  # a token that was looked up costs less
                continue
            num_tokens += new_tokens
            verification = longer_verification
            seconds += cost
            expected += gain
            if by_source:
                num_passes += 1
                p_source *= p_accept
                continue
            _, i = matches[0]
            _, match, p_next = rows[i]
            lengths[i] += 1
            if match is not None and lengths[i] < len(match.ids):
                heapreplace(matches, (-p_match * p_next, i))
            else:
                heappop(matches)
        sources: list[str | None] = [None] * len(rows)
        for i, row in enumerate(rows):
            if lengths[i] and row.match:
                sources[i] = row.match.source_name
            elif num_passes and source_limits[i]:
                sources[i] = source
                lengths[i] = min(source_limits[i], num_passes)
        return Plan(sources, lengths, expected / seconds)


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
    lock: AbstractContextManager[bool] = field(default_factory=RLock)
    _times: dict[int, PassTimes] = field(default_factory=dict)  # by number of threads

    @property
    def times(self) -> PassTimes:
        return self._times.setdefault(self.get_num_threads(), PassTimes(self.relative_pass_cost))


class AdaptivePolicy:
    """Picks the plan with the most expected tokens per second (after Zarch et al., DEL, arXiv 2504.05598).

    At growing intervals, the source that was used longest ago has a trial, of one token of one row, if drafts
    of it that are accepted as a whole would be faster than plain steps.

    Args:
        costs: by name of the source.
        stats: of the model. One thread at a time reads or writes them.
    """

    def __init__(self, costs: Mapping[str, DraftCost], stats: SourceStats) -> None:
        self._costs = costs
        self._stats = stats
        self._draft_steps = {name: cost.draft_step for name, cost in costs.items() if cost.draft_step}
        self._plan = Plan([], [])  # of this round
        # A plan without drafts holds until round `_plain_until`, for the same number of rows and times, while
        # no match is likelier than `_plain_p_match`.
        self._plain_in: tuple[int, PassTimes] | None = None
        self._plain_until = 0
        self._plain_p_match = 0.0

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
            p_matches = [self._acceptance(*match[:2]).value if match else 0.0 for match in matches]  # [B]
            no_better = self._plain_in == situation and max(p_matches) <= self._plain_p_match
            if no_better and stats.num_rounds < until:
                return None
            draft_seconds = stats.times.draft_seconds(num_rows, self._draft_steps)
            planner = _Planner(stats.times.verify_seconds(num_rows), draft_seconds)
            rows = [*map(_Row, limits, matches, p_matches)]
            looked_up = planner.best_plan(None, 0.0, rows)
            best = looked_up
            for source in self._draft_steps:
                if (p_accept := self._acceptance(source, 0).value) > planner.LEAST_PROBABILITY:
                    plan = planner.best_plan(source, p_accept, rows)
                    best = plan if plan.rate > best.rate else best
            used = {source if source in self._draft_steps else None for source in best.source_names if source}
            stats.used_at |= dict.fromkeys(used, stats.num_rounds)
            if not used:
                self._plain_in = situation
                self._plain_until = stats.num_rounds + _WAIT
                self._plain_p_match = max(p_matches)
            self._plan = best
            if any(limits) and stats.num_rounds >= stats.trial_at:
                self._plan = self._trial(planner, used, looked_up, rows) or best
            return self._plan

    def learn(self, draft: Draft, accepted: Sequence[int], seconds: tuple[float, float] | None) -> None:
        """Learn from the outcome of a round.

        Args:
            accepted: [B] tokens of each row.
            seconds: to draft and to verify; None: the round was not typical.
        """
        with self._stats.lock:
            stats = self._stats
            drafted = draft.lengths
            num_rows = len(draft.lengths)
            row = self._plan.trial
            if row is not None and accepted[row] == drafted[row]:  # try it again soon
                loss = self._plan.trial_cost - accepted[row] / num_rows
                stats.wait = max(_WAIT, min(round(loss / _TRIAL_SHARE), _LONGEST_WAIT))
                stats.trial_at = stats.num_rounds + stats.wait
                name = draft.source_names[row]
                stats.used_at[name if name in self._draft_steps else None] = 0
            for row, source in enumerate(draft.source_names):
                if source is None:
                    continue
                matched = draft.matched[row] if draft.matched else 0
                for i in range(min(accepted[row] + 1, drafted[row])):
                    self._acceptance(source, matched).add(float(i < accepted[row]))
            if seconds is None:
                return
            times = stats.times
            draft_seconds, verify_seconds = seconds
            for source in self._draft_steps.keys() & {*draft.source_names}:
                lengths = [n for n, name in zip(drafted, draft.source_names, strict=True) if name == source]
                if passes := [sum(length > i for length in lengths) for i in range(max(lengths))]:
                    times.add_drafts(source, num_rows, passes, draft_seconds, self._draft_steps[source])
            times.add_verification(num_rows, sum(draft.query_lengths), verify_seconds)

    def _trial(
        self, planner: _Planner, used: Set[str | None], looked_up: Plan, rows: Sequence[_Row]
    ) -> Plan | None:
        """A trial of the source that was used longest ago, of those that would pay if whole drafts were
        accepted; None: there are none. Drafts that are looked up go on beside it.
        """
        stats = self._stats
        plain = planner.verify_seconds(len(rows))
        names = [name for name in (None, *self._draft_steps) if name not in used]  # None: the lookups
        for name in sorted(names, key=lambda name: stats.used_at.get(name, 0)):
            stats.used_at[name] = stats.num_rounds
            sure = [row._replace(p_match=float(name is None and row.match is not None)) for row in rows]
            if not any(planner.best_plan(name, float(name is not None), sure).lengths):
                continue
            stats.wait = min(2 * stats.wait, _LONGEST_WAIT)
            stats.trial_at = stats.num_rounds + stats.wait
            can_draft = [i for i, row in enumerate(rows) if row.limit]
            likeliest = max if name is None else min  # the likeliest match, or the row that has none
            tried = likeliest(can_draft, key=lambda i: rows[i].p_match)
            match = rows[tried].match
            looked_up.source_names[tried] = match.source_name if name is None and match else name
            looked_up.lengths[tried] = 1
            drafting = 0.0 if name is None else planner.draft_seconds(name, 1)
            seconds = drafting + planner.verify_seconds(len(rows) + 1)
            return looked_up._replace(trial=tried, trial_cost=seconds / plain - 1.0)
        stats.trial_at = stats.num_rounds + _WAIT
        return None

    def _acceptance(self, name: str, matched: int) -> DecayedMean:
        """Acceptance of a source after accepted tokens, where an n-gram of `matched` tokens was found."""
        cost = self._costs[name]
        matched = min(matched, len(cost.priors) - 1)
        known = self._stats.acceptance
        if (name, matched) not in known:
            known[name, matched] = DecayedMean(cost.priors[matched], cost.prior_strength)
        return known[name, matched]
