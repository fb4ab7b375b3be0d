"""What drafting learns while it goes on: decayed means, when a draft had better end, and which to make next.

Numbers in, numbers out; knows nothing of models, tokens or tensors. Costs are in full passes over one token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
        """Whether to draft another token behind those with these probabilities."""
        return probabilities[-1] >= self.threshold

    def learn(self, probabilities: Sequence[float], num_accepted: int) -> None:
        """A fixed one does not."""


class LearnedThreshold:
    """A draft ends when another token would cost more time than it is likely to save.

    How often a drafted token of a probability is accepted, behind accepted ones, is learnt by ranges of
    probability. The product over a draft is the chance that all of it is right; times the acceptance of the
    next token, that is what another step is worth. It costs the tokens that could be had in the same time.

    Args:
        draft_step: of one drafted token, see the module.
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
        """Whether to draft another token behind those with these probabilities."""
        right = 1.0
        for probability in probabilities:
            right *= self._of(probability).value
        return right >= self.threshold

    def learn(self, probabilities: Sequence[float], num_accepted: int) -> None:
        """What became of a draft; its tokens behind the first rejected one tell nothing."""
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
        draft_step: of one token drafted with layers.
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
class Costs:
    """Of what rounds are made of, in full passes over one token.

    Args:
        draft_step: exit layer -> one token drafted there.
        first_layers: exit layer -> its layers over one token; 0 where verification begins from the start.
        verification: exit layer -> the layers left to verify a draft of 0, 1, ... tokens; 0: all layers.
        exit: one exit read off a pass.
        readable: the exit layers that can be.
    """

    draft_step: Mapping[int, float]
    first_layers: Mapping[int, float]
    verification: Mapping[int, Sequence[float]]
    exit: float
    readable: Sequence[int]

    def round(self, exit_layer: int, num_drafted: int) -> float:
        """With tokens drafted at an exit layer; 0: with tokens that were looked up, or with none."""
        drafts = num_drafted * self.draft_step[exit_layer] if exit_layer else 0.0
        return drafts + self.first_layers[exit_layer] + self.verification[exit_layer][num_drafted]


@dataclass(frozen=True)
class Plan:
    """One round: draft so many tokens at an exit layer, or so many that were looked up; nothing where 0."""

    exit_layer: int = 0
    matched: int = 0  # tokens that a lookup matched
    length: int = 0
    probe: int = 0  # an exit layer to read at verification, whose guesses were not drafted; 0: none


class AdaptivePolicy:
    """Chooses the round that promises most tokens for its cost (after Zarch et al., DEL, arXiv 2504.05598).

    The chance that a drafted token is accepted behind accepted ones is kept for every exit layer and every
    length of a match, as a decayed mean. Drafting tells about the layer that drafted. About deeper ones, and
    about all where nothing is drafted, an exit read off the verification tells, now and then, such that all
    reading together costs at most a share of `probing`. A plain step is a round of no drafts.

    Args:
        longest: tokens that a lookup can match.
        probing: the share of the time that may go into exits that were not drafted with.
    """

    # Drafting must promise so much more than a plain step: what it promises is an estimate.
    _MARGIN = 1.05

    def __init__(self, costs: Costs, longest: int, probing: float = 0.015) -> None:
        self._costs, self._probing = costs, probing
        self._longest_draft = len(costs.verification[0]) - 1
        self._by_layer = {layer: DecayedMean(0.6, weight=1.0) for layer in costs.draft_step}
        self._by_match = {n: DecayedMean(0.3 + 0.6 * n / longest, weight=1.0) for n in range(1, longest + 1)}
        self._saved_up = 0.0
        self._next_probe = 0

    def plan(self, matched: int, room: int) -> Plan:
        """
        Args:
            matched: tokens that a lookup has matched; 0: it found nothing.
            room: tokens that may be drafted at most.
        """
        room = min(room, self._longest_draft)
        best, best_rate = Plan(), self._MARGIN / self._costs.round(0, 0)
        plans = [(Plan(exit_layer=layer), mean.value) for layer, mean in self._by_layer.items()]
        if matched:
            plans.append((Plan(matched=matched), self._by_match[matched].value))
        for plan, acceptance in plans:
            expected, chance = 1.0, 1.0
            for length in range(1, room + 1):
                chance *= acceptance
                expected += chance
                rate = expected / self._costs.round(plan.exit_layer, length)
                if rate > best_rate:
                    best, best_rate = Plan(plan.exit_layer, plan.matched, length), rate
                elif chance < 0.05:
                    break
        self._saved_up += self._probing * self._costs.round(best.exit_layer, best.length)
        return self._with_probe(best)

    def learn(self, plan: Plan, num_drafted: int, num_accepted: int, agreement: Sequence[float] = ()) -> None:
        """What became of a round.

        Args:
            agreement: the chance that a guess of the probed exit would have been accepted, for each position
                up to the first rejected one.
        """
        mean = self._by_match.get(plan.matched) or self._by_layer.get(plan.exit_layer)
        if mean is not None:
            for i in range(min(num_accepted + 1, num_drafted)):
                mean.add(float(i < num_accepted))
        for chance in agreement:
            self._by_layer[plan.probe].add(chance)

    def acceptance(self) -> dict[int, float]:
        """By exit layer, as it is believed now."""
        return {layer: mean.value for layer, mean in self._by_layer.items()}

    def _with_probe(self, plan: Plan) -> Plan:
        unread = [layer for layer in self._costs.readable if layer > plan.exit_layer]
        if self._saved_up < self._costs.exit or not unread:
            return plan
        self._saved_up -= self._costs.exit
        self._next_probe += 1
        return Plan(plan.exit_layer, plan.matched, plan.length, unread[self._next_probe % len(unread)])
