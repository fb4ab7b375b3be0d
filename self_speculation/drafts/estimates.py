"""A running mean with a prior and exponential decay."""

from __future__ import annotations

from collections.abc import Callable


class DecayedMean:
    """The mean of a prior and of observations, whose weight decays.

    Args:
        prior: a number, or a function that returns it.
        weight: of the prior, in observations.
        decay: factor on all observations with each new one.
    """

    def __init__(self, prior: float | Callable[[], float], weight: float = 2.0, decay: float = 0.95) -> None:
        self._prior, self._weight, self._decay = prior, weight, decay
        self._sum = self._count = 0.0

    @property
    def value(self) -> float:
        prior = self._prior() if callable(self._prior) else self._prior
        return (prior * self._weight + self._sum) / (self._weight + self._count)

    @property
    def count(self) -> float:
        """Weight of the observations."""
        return self._count

    def add(self, value: float, weight: float = 1.0) -> None:
        """Add a value that counts as `weight` observations."""
        share = self._decay**weight
        self._sum = share * self._sum + weight * value
        self._count = share * self._count + weight
