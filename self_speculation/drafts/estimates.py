"""A mean that is learnt while it is used: what was seen last counts most."""

from __future__ import annotations

from collections.abc import Callable


class DecayedMean:
    """The mean of a prior and of what was seen, the latest most.

    Args:
        prior: a number, or what gives it whenever it is asked for.
        weight: observations that the prior counts as.
        decay: the share of an observation that counts one later.
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
        """Observations that still count."""
        return self._count

    def add(self, value: float, weight: float = 1.0) -> None:
        """See a value, as so many observations."""
        share = self._decay**weight
        self._sum = share * self._sum + weight * value
        self._count = share * self._count + weight
