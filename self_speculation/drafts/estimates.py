"""Running means, and the acceptance of drafted tokens by their confidence."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

_BINS = 10  # ranges of confidence
_DECAY = 0.97  # of the weight of all observations, with each new one


class DecayedMean:
    """The mean of a prior and of observations, whose weight decays.

    Args:
        prior: the mean without observations.
        weight: of the prior, in observations.
    """

    def __init__(self, prior: float, weight: float = 2.0) -> None:
        self._prior, self._weight = prior, weight
        self._sum = self.count = 0.0  # count: weight of the observations

    @property
    def value(self) -> float:
        return (self._prior * self._weight + self._sum) / (self._weight + self.count)

    def add(self, value: float, weight: float = 1.0) -> None:
        """Add a value that counts as `weight` observations."""
        share = _DECAY**weight
        self._sum = share * self._sum + weight * value
        self.count = share * self.count + weight


class AcceptanceByConfidence:
    """How often drafted tokens of a probability are accepted, learnt by ranges of probability."""

    def __init__(self) -> None:
        self._means = [DecayedMean((i + 0.5) / _BINS) for i in range(_BINS)]

    def __getitem__(self, confidence: float) -> DecayedMean:
        return self._means[min(int(confidence * _BINS), _BINS - 1)]

    def all_accepted(self, confidences: Sequence[float]) -> float:
        """The chance that a draft of tokens with these probabilities is accepted as a whole."""
        return prod(self[confidence].value for confidence in confidences)
