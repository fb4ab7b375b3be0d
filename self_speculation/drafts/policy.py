"""What drafting learns while it goes on: decayed means, when a draft had better end, and which to make next.

Numbers in, numbers out; knows nothing of models, tokens or tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from self_speculation.drafts.costs import Costs

_BINS = 10


class DecayedMean:
    """The mean of what was seen, the latest most, and of a prior.

    Args:
        weight: observations that the prior counts as.
        decay: the share of an observation that counts one later.
    """

    def __init__(self, prior: float, weight: float = 2.0, decay: float = 0.95) -> None:
        self._prior, self._weight, self._decay = prior, weight, decay
        self._sum = self._count = 0.0

    @property
    def value(self) -> float:
        return (self._prior * self._weight + self._sum) / (self._weight + self._count)

    def add(self, value: float) -> None:
        self.fade()
        self._sum += value
        self._count += 1.0

    def fade(self) -> None:
        """Time passes without an observation: back towards the prior."""
        self._sum *= self._decay
        self._count *= self._decay


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
    """

    def __init__(self, draft_step: float) -> None:
        self._draft_step = draft_step
        self._acceptance = [DecayedMean((i + 0.5) / _BINS, weight=1.0, decay=0.98) for i in range(_BINS)]
        self._next = DecayedMean(0.5)
        self._tokens, self._cost = DecayedMean(2.0), DecayedMean(1.0 + 2 * draft_step)

    @property
    def threshold(self) -> float:
        """Drafting goes on while the chance that all of the draft is right is above this."""
        return min(1.0, self._draft_step * self._tokens.value / self._cost.value / self._next.value)

    def goes_on(self, probabilities: Sequence[float]) -> bool:
        """Whether to draft another token after those with these probabilities."""
        right = 1.0
        for probability in probabilities:
            right *= self._of(probability).value
        return right >= self.threshold

    def learn(self, probabilities: Sequence[float], num_accepted: int) -> None:
        """Hear what became of a draft; its tokens after the first rejected one tell nothing."""
        for i, probability in enumerate(probabilities[: num_accepted + 1]):
            accepted = float(i < num_accepted)
            self._of(probability).add(accepted)
            self._next.add(accepted)
        self._tokens.add(num_accepted + 1.0)
        self._cost.add(1.0 + len(probabilities) * self._draft_step)

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
        slack: tokens that a draft may have beyond the plan. It is for sources that end drafts themselves.
    """

    exit_layer: int = 0
    priors: Sequence[float] = (0.6,)
    slack: int = 0


@dataclass(frozen=True)
class Plan:
    """One round: so many tokens to be drafted by a source; none, and no source, is a plain step."""

    source: str = ""
    length: int = 0
    at_most: int = 0  # the length that the draft may reach, if its source does not end it before
    probe: int = 0  # an exit layer to read at verification, whose guesses were not drafted; 0: none


class AdaptivePolicy:
    """Chooses the round that promises most tokens for its cost (after Zarch et al., DEL, arXiv 2504.05598).

    The chance that a drafted token is accepted after accepted ones is kept for every source, and for every
    length of a match, as a decayed mean. Drafting tells about the source that drafted. About exits that are
    deeper, and about all exits where nothing is drafted, an exit that is read off the verification tells, as
    often as it costs a share of `probing` at most. A plain step is a round of no drafts.

    Args:
        arms: by the name of their source.
        readable: exit layer -> the name of the source that guesses what this exit of a verification does.
        longest: tokens that a draft may have.
        probing: the share of the time that may go into exits that were not drafted with.
    """

    # Drafting must promise so much more than a plain step: what it promises is an estimate.
    _MARGIN = 1.05

    def __init__(
        self,
        costs: Costs,
        arms: Mapping[str, Arm],
        readable: Mapping[int, str],
        longest: int,
        probing: float = 0.015,
    ) -> None:
        self._costs, self._arms, self._readable = costs, arms, readable
        self._longest, self._probing = longest, probing
        self._means = {
            (name, matched): DecayedMean(prior, weight=1.0)
            for name, arm in arms.items()
            for matched, prior in enumerate(arm.priors)
        }
        self._saved_up = 0.0
        self._next_probe = 0

    def plan(self, matched: Mapping[str, Sequence[int | None]], rooms: Sequence[int]) -> Plan:
        """One round of all rows.

        Args:
            matched: [B] by source, how many tokens it has matched of each row; None where it cannot draft.
            rooms: [B] tokens that may be drafted at most.
        """
        costs = self._costs.of(len(rooms))
        best, best_rate = Plan(), self._MARGIN * len(rooms) / costs.round(0, 0)
        for name, numbers in matched.items():
            # room and acceptance of the rows that it can draft for
            rows = [
                (room, self._means[name, number].value)
                for number, room in zip(numbers, rooms, strict=True)
                if number is not None
            ]
            expected, chances = float(len(rooms)), [1.0] * len(rows)
            for length in range(1, min(max(rooms), self._longest) + 1):
                chances = [
                    chance * acceptance if length <= room else 0.0
                    for chance, (room, acceptance) in zip(chances, rows, strict=True)
                ]
                expected += sum(chances)
                rate = expected / costs.round(self._arms[name].exit_layer, length)
                if rate > best_rate:
                    best, best_rate = Plan(name, length, length + self._arms[name].slack), rate
                elif max(chances, default=0.0) < 0.05:
                    break
        exit_layer = self._arms[best.source].exit_layer if best.source else 0
        self._saved_up += self._probing * costs.round(exit_layer, best.length)
        return replace(best, probe=self._probe(exit_layer))

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
            self._means[source, matched].add(float(i < num_accepted))
        for chance in agreement:
            self._means[self._readable[probe], 0].add(chance)

    def _probe(self, exit_layer: int) -> int:
        """The exit to read beyond the one that drafts, in turn; 0 where it is not time for one."""
        unread = [layer for layer in self._readable if layer > exit_layer]
        if self._saved_up < self._costs.probe or not unread:
            return 0
        self._saved_up -= self._costs.probe
        self._next_probe += 1
        return unread[self._next_probe % len(unread)]
