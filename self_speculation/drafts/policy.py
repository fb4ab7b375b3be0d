"""What drafting learns while it goes on: decayed means, when a draft had better end, and which to make next.

Numbers in, numbers out; knows nothing of models, tokens or tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy

from self_speculation.drafts.costs import Costs

_BINS = 10


class DecayedMean:
    """The mean of what was seen, the latest most, and of a prior.

    Args:
        prior: a number, or another mean, whose value counts as it is at the time.
        weight: observations that the prior counts as.
        decay: the share of an observation that counts one later.
    """

    def __init__(self, prior: float | DecayedMean, weight: float = 2.0, decay: float = 0.95) -> None:
        self._prior, self._weight, self._decay = prior, weight, decay
        self._sum = self._count = 0.0

    @property
    def value(self) -> float:
        prior = self._prior.value if isinstance(self._prior, DecayedMean) else self._prior
        return (prior * self._weight + self._sum) / (self._weight + self._count)

    @property
    def count(self) -> float:
        """Observations that still count."""
        return self._count

    def add(self, value: float) -> None:
        self.fade()
        self._sum += value
        self._count += 1.0

    def fade(self, observations: float = 1.0) -> None:
        """Back towards the prior, as far as so many other observations would bring what was seen."""
        share = self._decay**observations
        self._sum *= share
        self._count *= share

    def taught_by(self, other: DecayedMean, enough: float) -> None:
        """All that another one has seen counts as one observation; below `enough` of them, as a part of one.
        Where it has seen little, what was known is forgotten slowly.
        """
        weight = min(1.0, other._count / enough)
        self.fade(max(weight, 0.2))
        if other._count:
            self._sum += weight * other._sum / other._count
            self._count += weight


class FixedThreshold:
    """A draft ends with the first token whose own probability is below a threshold."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def goes_on(self, probabilities: Sequence[float]) -> bool:
        """Whether to draft another token after those with these probabilities."""
        return probabilities[-1] >= self.threshold

    def learn(self, probabilities: Sequence[float], num_accepted: int) -> None:
        """A fixed one does not."""


class LearnedThreshold:
    """A draft ends when another token would cost more time than it is likely to save.

    How often a drafted token of a probability is accepted after accepted ones is learnt by ranges of
    probability. The product over a draft is the chance that all of it is right; times the acceptance of the
    next token, that is what another step is worth. It costs the tokens that could be had in the same time.

    Args:
        draft_step: cost of one drafted token, in plain steps.
        verifications: [k] what follows a draft of k tokens, in plain steps; the last one holds for longer
            ones too.
    """

    def __init__(self, draft_step: float, verifications: Sequence[float] = (1.0,)) -> None:
        self.now_costs(draft_step, verifications)
        self._acceptance = [DecayedMean((i + 0.5) / _BINS, weight=1.0, decay=0.98) for i in range(_BINS)]
        self._next = DecayedMean(0.5)
        self._tokens, self._cost = DecayedMean(2.0), DecayedMean(self._round(2))

    def now_costs(self, draft_step: float, verifications: Sequence[float]) -> None:
        """At another context, or in another batch, what was learnt holds, but not what it costs."""
        self._draft_step, self._verifications = draft_step, verifications

    def threshold(self, num_drafted: int) -> float:
        """Drafting goes on while the chance that all of the draft is right is above this."""
        another = self._round(num_drafted + 1) - self._round(num_drafted)
        return min(1.0, another * self._tokens.value / self._cost.value / self._next.value)

    def goes_on(self, probabilities: Sequence[float]) -> bool:
        """Whether to draft another token after those with these probabilities."""
        right = 1.0
        for probability in probabilities:
            right *= self._of(probability).value
        return right >= self.threshold(len(probabilities))

    def learn(self, probabilities: Sequence[float], num_accepted: int) -> None:
        """Hear what became of a draft; its tokens after the first rejected one tell nothing."""
        for i, probability in enumerate(probabilities[: num_accepted + 1]):
            accepted = float(i < num_accepted)
            self._of(probability).add(accepted)
            self._next.add(accepted)
        self._tokens.add(num_accepted + 1.0)
        self._cost.add(self._round(len(probabilities)))

    def _round(self, num_drafted: int) -> float:
        last = len(self._verifications) - 1
        return num_drafted * self._draft_step + self._verifications[min(num_drafted, last)]

    def _of(self, probability: float) -> DecayedMean:
        return self._acceptance[min(int(probability * _BINS), _BINS - 1)]


Threshold = FixedThreshold | LearnedThreshold


class LookupPolicy:
    """Whether a draft that was looked up is worth its round, by how many tokens matched.

    A round of lookup costs one pass and gives the tokens that are accepted and one more; so a match has to
    have been followed by at least what drafting with layers gives in the time of one pass.

    Args:
        longest: tokens matched at most.
        draft_step: cost of one token drafted with layers, in plain steps.
    """

    def __init__(self, longest: int, draft_step: float) -> None:
        self._draft_step = draft_step
        self._accepted = {n: DecayedMean(2.0) for n in range(1, longest + 1)}
        self._tokens, self._cost = DecayedMean(1.0), DecayedMean(1.0)

    def pays(self, matched: int) -> bool:
        return 1.0 + self._accepted[matched].value >= self._tokens.value / self._cost.value

    def learn_lookup(self, matched: int, num_accepted: int) -> None:
        for n, accepted in self._accepted.items():
            if n == matched:
                accepted.add(num_accepted)

    def learn_layers(self, num_drafted: int, num_accepted: int) -> None:
        self._tokens.add(num_accepted + 1.0)
        self._cost.add(1.0 + num_drafted * self._draft_step)
        # What did not pay is tried again some time.
        for accepted in self._accepted.values():
            accepted.fade()


@dataclass(frozen=True)
class Arm:
    """A source that adaptive decoding may draft with, as the policy sees it.

    Args:
        exit_layer: the exit that its drafts are made at, and so their cost; 0: they cost nothing.
        priors: [i] the chance that a drafted token is accepted after accepted ones, before anything is known,
            where i tokens matched; [0] alone for a source that compares none.
        trust: observations that the priors count as, where no answer has confirmed them yet.
        slack: tokens that a draft may have beyond the plan. It is for sources that end drafts themselves.
        leaves_layers: whether verification goes on from where the draft ended; else it begins with the first
            layer, and every exit can be read off it.
        like: the arm whose drafts these are but for a short head. As long as nothing else is known, they are
            as good.
    """

    exit_layer: int = 0
    priors: Sequence[float] = (0.4,)
    trust: float = 1.0
    slack: int = 0
    leaves_layers: bool = True
    like: str = ""


@dataclass(frozen=True)
class Plan:
    """One round: so many tokens to be drafted by a source; none, and no source, is a plain step."""

    source: str = ""
    length: int = 0
    at_most: int = 0  # the length that the draft may reach, if its source does not end it before
    probe: int = 0  # an exit layer to read at verification, whose guesses were not drafted; 0: none


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

    def __init__(self) -> None:
        self._of_answers: dict[tuple[str, int], DecayedMean] = {}
        self._of_answer: dict[tuple[str, int], DecayedMean] = {}
        self._thresholds: dict[str, LearnedThreshold] = {}

    def begin_answer(self, arms: Mapping[str, Arm]) -> Mapping[tuple[str, int], DecayedMean]:
        """The chances that a token is accepted, by source and tokens matched, for the answer to fill in."""
        for key, mean in self._of_answer.items():
            self._of_answers[key].taught_by(mean, self._ENOUGH)
        self._of_answer = {}
        for name, arm in arms.items():
            for matched, prior in enumerate(arm.priors):
                known = self._of_answers[arm.like, matched] if arm.like else prior
                new = DecayedMean(known, self._OF_PRIOR * arm.trust, self._DECAY)
                of_answers = self._of_answers.setdefault((name, matched), new)
                # A prior that no answer has confirmed gives way to the first observations, or soon.
                weight = min(self._OF_ANSWERS, arm.trust + self._OF_ANSWERS * of_answers.count)
                self._of_answer[name, matched] = DecayedMean(of_answers, weight)
        return self._of_answer

    def threshold(self, source: str, draft_step: float, verifications: Sequence[float]) -> LearnedThreshold:
        """Of a source whose drafts cost so much now, see `LearnedThreshold`."""
        known = self._thresholds.setdefault(source, LearnedThreshold(draft_step, verifications))
        known.now_costs(draft_step, verifications)
        return known


class AdaptivePolicy:
    """Chooses the round that promises most tokens for its cost (after Zarch et al., DEL, arXiv 2504.05598).

    The chance that a drafted token is accepted after accepted ones is kept for every source, and for every
    length of a match, as a decayed mean, whose prior is what earlier answers of the model have taught.
    Drafting tells about the source that drafted. A share of the time goes into the others. Exits of the
    model are read off verifications, which tells as much as a draft and costs less. What cannot be read
    there drafts a token or two now and then, the one first that was not heard of for longest. A plain step is
    a round of no drafts.

    Args:
        arms: by the name of their source.
        readable: exit layer -> the name of the source that guesses what this exit of a verification does.
        longest: tokens that a draft may have.
        memory: of the model; None: there is nothing to remember.
        searching: the share of the time that may go into reading exits, and the same into trials.
    """

    # Drafting must promise so much more than a plain step: what it promises is an estimate.
    _MARGIN = 1.05
    # Tokens of a draft that is made to see what its source is worth.
    _TRIAL = 2

    def __init__(
        self,
        costs: Costs,
        arms: Mapping[str, Arm],
        readable: Mapping[int, str],
        longest: int,
        memory: Memory | None = None,
        searching: float = 0.01,
    ) -> None:
        self._costs, self._arms, self._readable = costs, arms, readable
        self._longest, self._searching = longest, searching
        self._means = (memory or Memory()).begin_answer(arms)
        self._known_rounds: dict[tuple[int, str], numpy.ndarray] = {}
        self._for_probes = self._for_trials = 0.0
        self._next_probe = 0
        # Round -> when a source was heard of that no verification tells about, nor about what it is like.
        self._now = 0
        read = {*readable.values()}
        self._heard = {key: 0 for key in self._means if read.isdisjoint((key[0], arms[key[0]].like))}

    def plan(self, matched: Mapping[str, Sequence[int | None]], rooms: Sequence[int]) -> Plan:
        """One round of all rows.

        Args:
            matched: [B] by source, how many tokens it has matched of each row; None where it cannot draft.
            rooms: [B] tokens that may be drafted at most.
        """
        self._now += 1
        num_rows, longest = len(rooms), min(max(rooms), self._longest)
        names = list(matched)
        plain_step = self._rounds(num_rows, "")[0]
        best = Plan()
        if names and longest:
            acceptance = numpy.array(
                [
                    [0.0 if number is None else self._means[name, number].value for number in matched[name]]
                    for name in names
                ]
            )  # [sources, B]
            lengths = numpy.arange(1, longest + 1)
            chances = acceptance[..., None] ** lengths  # [sources, B, lengths], that all of a draft is right
            if min(rooms) < longest:
                chances *= lengths <= numpy.array(rooms)[:, None]
            expected = num_rows + chances.sum(1).cumsum(-1)
            rates = expected / numpy.array([self._rounds(num_rows, name)[1 : longest + 1] for name in names])
            at, more = divmod(int(rates.argmax()), longest)
            if rates[at, more] > self._MARGIN * num_rows / plain_step:
                best = Plan(names[at], more + 1, more + 1 + self._arms[names[at]].slack)
        if (trial := self._trial(best.source, matched, rooms, plain_step)) is not None:
            return trial
        spent = self._searching * self._rounds(num_rows, best.source)[best.length]
        self._for_probes += spent
        self._for_trials += spent
        return replace(best, probe=self._probe(best.source))

    def learn(
        self,
        source: str,
        matched: int,
        num_drafted: int,
        num_accepted: int,
        probe: int = 0,
        agreement: Sequence[float] = (),
    ) -> None:
        """Hear what became of a round.

        Args:
            agreement: the chance that a guess of the probed exit would have been accepted, for each position
                up to the first rejected one.
        """
        for i in range(min(num_accepted + 1, num_drafted)):
            self._hear((source, matched), float(i < num_accepted))
        for chance in agreement:
            self._hear((self._readable[probe], 0), chance)

    def _hear(self, key: tuple[str, int], chance: float) -> None:
        self._means[key].add(chance)
        if key in self._heard:
            self._heard[key] = self._now

    def _rounds(self, num_rows: int, source: str) -> numpy.ndarray:
        """[k] as `Costs.round` says of drafts of k tokens, looked up: every round asks for all of them."""
        key = (num_rows, source)
        if key not in self._known_rounds:
            arm = self._arms[source] if source else Arm()
            costs = self._costs.of(num_rows)
            rounds = [costs.round(arm.exit_layer, k, bool(arm.like)) for k in range(self._longest + 1)]
            self._known_rounds[key] = numpy.array(rounds)
        return self._known_rounds[key]

    def _trial(
        self,
        chosen: str,
        matched: Mapping[str, Sequence[int | None]],
        rooms: Sequence[int],
        plain_step: float,
    ) -> Plan | None:
        """A short draft of the source that was not heard of for longest, where there is time for one."""
        length = min(self._TRIAL, max(rooms))
        able = [
            (self._heard[name, number], name)
            for name, numbers in matched.items()
            for number in numbers
            if number is not None and (name, number) in self._heard and name != chosen
        ]
        if not able or not length:
            return None
        _, name = min(able)
        price = self._rounds(len(rooms), name)[length] - plain_step
        if self._for_trials < price:
            return None
        self._for_trials -= max(price, 0.0)
        return Plan(name, length, length)

    def _probe(self, source: str) -> int:
        """The exit to read beyond the one that drafts, in turn; 0 where it is not time for one."""
        seen = self._arms[source].exit_layer if source and self._arms[source].leaves_layers else 0
        unread = [layer for layer in self._readable if layer > seen]
        if self._for_probes < self._costs.probe or not unread:
            return 0
        self._for_probes -= self._costs.probe
        self._next_probe += 1
        return unread[self._next_probe % len(unread)]
