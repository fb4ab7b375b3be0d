"""What drafting learns while it goes on: decayed means, and when a draft had better end.

Numbers in, numbers out; knows nothing of models, tokens or tensors. Costs are in full passes over one token.
"""

from __future__ import annotations

from collections.abc import Sequence

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
