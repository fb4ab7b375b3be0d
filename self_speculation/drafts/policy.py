"""Which round to make next, by what drafts were worth so far and what rounds take.

Numbers in, numbers out; knows nothing of models, tokens or tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy

from self_speculation.drafts.costs import RoundTimes
from self_speculation.drafts.estimates import DecayedMean

PLAIN = ""  # the name of a round without a draft
_PLAIN_STEPS = (PLAIN, 0)


@dataclass(frozen=True)
class Arm:
    """A source that adaptive decoding may draft with, as the policy sees it.

    Args:
        draft_ratio: estimated cost of one drafted token, in plain steps.
        priors: [i] the chance that a drafted token is accepted after accepted ones, before anything is known,
            where i tokens matched; [0] alone for a source that compares none.
        trust: observations that the priors count as, where no answer has confirmed them yet.
        below: the arm of the next shallower exit. Until more is known, this one is taken to guess
            a bit better.
    """

    draft_ratio: float = 0.0
    priors: Sequence[float] = (0.4,)
    trust: float = 1.0
    below: str = ""


class Plan(NamedTuple):
    """One round: so many tokens to be drafted by a source; none, and no source, is a plain step."""

    source: str = PLAIN
    length: int = 0


class Memory:
    """What was learnt of the sources of a model, and is kept from one answer to the next.

    Answers differ: one repeats itself, and lookups are right all the time, the next does not. So an answer
    counts once, however long it is, and is forgotten after some more of them. Bounded in size by the sources
    and the tokens that they compare.
    """

    # Observations of an answer from which on it counts in full; what of an answer still counts one later.
    _ENOUGH, _DECAY = 5.0, 0.9
    # The prior's weight among answers, and that of all answers among the observations of a new one.
    _OF_PRIOR, _OF_ANSWERS = 0.3, 8.0
    # The share of wrong guesses of an exit that the next deeper one is hoped to guess right.
    _BETTER = 0.15

    def __init__(self, times: RoundTimes | None = None) -> None:
        self.times = times or RoundTimes()
        self.num_rounds = 0
        self.tried_plain_step = False  # in the last trial
        self.heard: dict[tuple[str, int], int] = {}  # by what, the round that told of it last
        self._of_answers: dict[tuple[str, int], DecayedMean] = {}
        self._of_answer: dict[tuple[str, int], DecayedMean] = {}

    def begin_answer(self, arms: Mapping[str, Arm]) -> Mapping[tuple[str, int], DecayedMean]:
        """The chances that a token is accepted, by source and tokens matched, for the answer to fill in."""
        for key, mean in self._of_answer.items():
            self._of_answers[key].taught_by(mean, self._ENOUGH)
        self._of_answer = {}
        for name, arm in arms.items():
            for matched, prior in enumerate(arm.priors):
                new = DecayedMean(prior, self._OF_PRIOR * arm.trust, self._DECAY)
                known = self._of_answers.setdefault((name, matched), new)
                # A prior that no answer has confirmed gives way to the first observations, or soon.
                weight = min(self._OF_ANSWERS, arm.trust + self._OF_ANSWERS * known.count)
                self._of_answer[name, matched] = DecayedMean(self._prior(known, arm.below), weight)
        return self._of_answer

    def _prior(self, known: DecayedMean, below: str) -> Callable[[], float]:
        if not below or known.count:
            return lambda: known.value
        shallower = self._of_answer[below, 0]
        return lambda: shallower.value + self._BETTER * (1.0 - shallower.value)


class AdaptivePolicy:
    """Chooses the round that promises most tokens for its time (after Zarch et al., DEL, arXiv 2504.05598).

    The chance that a drafted token is accepted after accepted ones is kept for every source, and for every
    length of a match, as a decayed mean, whose prior is what earlier answers of the model have taught.
    A share of the time goes into trials: a short draft by the source that has not been tried for longest and
    a plain step, in turn.

    Args:
        arms: by the name of their source.
        longest: tokens that a draft may have.
        memory: of the model; None: there is nothing to remember.
        searching: the share of the time that trials may cost beyond the rounds that they replace.
    """

    # Drafting must promise so much more than a plain step: what it promises is an estimate.
    _MARGIN = 1.05
    # Tokens of a draft that is made to see what its source is worth.
    _TRIAL = 2

    def __init__(
        self, arms: Mapping[str, Arm], longest: int, memory: Memory | None = None, searching: float = 0.02
    ) -> None:
        self._memory = memory = memory or Memory()
        self._arms, self._longest, self._searching = {PLAIN: Arm(), **arms}, longest, searching
        self._means, self._times = memory.begin_answer(arms), memory.times
        self._for_trials = 0.0  # seconds that a trial may cost

    def plan(self, matched: Mapping[str, Sequence[int | None]], rooms: Sequence[int]) -> Plan:
        """One round of all rows.

        Args:
            matched: by source, [B] how many tokens of each row it has matched; None where it cannot draft.
            rooms: [B] tokens that may be drafted at most.
        """
        num_rows, longest = len(rooms), min(max(rooms), self._longest)
        names = [PLAIN, *matched]
        lengths = numpy.arange(longest + 1)
        # [sources, B, lengths]: the chance that all of a draft is right. One token more comes for sure.
        right = self._chances(matched, num_rows)[..., None] ** lengths
        if min(rooms) < longest:
            right *= lengths <= numpy.array(rooms)[:, None]
        tokens = right.sum(1).cumsum(-1)  # [sources, lengths]
        a, b = numpy.array([self._line(name, num_rows) for name in names]).T[..., None]  # [sources, 1] each
        seconds = a + b * lengths
        rates = tokens / seconds
        can_draft = right[1:, :, 1:].max((1, 2), initial=0.0) > 0.0
        rates[1:][~can_draft] = 0.0  # their rounds would be plain steps
        best = at, k = (0, 0)
        if len(names) > 1 and longest:
            at, k = divmod(int(rates[1:, 1:].argmax()), longest)
            if rates[at + 1, k + 1] > self._MARGIN * rates[0, 0]:
                best = (at + 1, k + 1)
        self._memory.num_rounds += 1
        self._for_trials += self._searching * float(seconds[best])
        others = [key for key in self._can_draft(matched) if key[0] != names[best[0]]]
        if others and longest:
            # Every second one is a plain step, where that is none of the others: all are compared with it.
            is_due = _PLAIN_STEPS in others and not self._memory.tried_plain_step
            heard = self._memory.heard
            name, _ = _PLAIN_STEPS if is_due else min(others, key=lambda key: heard.get(key, 0))
            trial = Plan(name, 0 if name == PLAIN else min(self._TRIAL, longest))
            tried = (names.index(name), trial.length)
            # The time that the best one would need for fewer tokens, or saves for more.
            price = float(seconds[tried]) * (1.0 - min(1.0, float(rates[tried] / rates[best])))
            if price <= self._for_trials:
                self._for_trials -= price
                self._memory.tried_plain_step = is_due
                return trial
        return Plan(names[best[0]], best[1])

    def learn(
        self, plan: Plan, matched: Sequence[int], drafted: Sequence[int], accepted: Sequence[int]
    ) -> None:
        """Hear what became of a round of this plan.

        Args:
            matched, drafted, accepted: [B] tokens of each row.
        """
        if plan.source == PLAIN:
            self._hear(_PLAIN_STEPS)
        for number, num_drafted, num_accepted in zip(matched, drafted, accepted, strict=True):
            for i in range(min(num_accepted + 1, num_drafted)):
                self._means[plan.source, number].add(float(i < num_accepted))
                self._hear((plan.source, number))

    def _hear(self, key: tuple[str, int]) -> None:
        self._memory.heard[key] = self._memory.num_rounds

    def took(self, plan: Plan, num_rows: int, seconds: float) -> None:
        """Hear how long a round of this plan took."""
        ratio = self._arms[plan.source].draft_ratio
        self._times.add(plan.source, num_rows, ratio, plan.length, seconds)

    def _line(self, name: str, num_rows: int) -> tuple[float, float]:
        return self._times.line(name, num_rows, self._arms[name].draft_ratio)

    def _chances(self, matched: Mapping[str, Sequence[int | None]], num_rows: int) -> numpy.ndarray:
        """[sources, B] that a token drafted after accepted ones is accepted; without a draft, 0. Plain steps
        come first.
        """
        of_sources = [
            [0.0 if number is None else self._means[name, number].value for number in numbers]
            for name, numbers in matched.items()
        ]
        return numpy.array([[0.0] * num_rows, *of_sources])

    def _can_draft(self, matched: Mapping[str, Sequence[int | None]]) -> list[tuple[str, int]]:
        """What can draft for some row now, and a plain step."""
        found = {(name, n) for name, numbers in matched.items() for n in numbers if n is not None}
        return [_PLAIN_STEPS, *sorted(found)]
