"""A mean and a line that are learnt while they are used: what was seen last counts most.

Both begin at a prior, and return to it as what was seen fades.
"""

from __future__ import annotations

from collections.abc import Callable


class DecayedMean:
    """The mean of what was seen, the latest most, and of a prior.

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
        """Learn what another one has seen, as one observation; as a part of one where it has seen fewer than
        `enough`. Even then what was known fades a little.
        """
        weight = min(1.0, other._count / enough)
        self.fade(max(weight, 0.2))
        if other._count:
            self._sum += weight * other._sum / other._count
            self._count += weight


class DecayedLine:
    """y = a + b x by least squares over what was seen, the latest most, and over a prior line."""

    # The share of an observation that counts one later; what the prior counts as, and over how long an x.
    _DECAY, _WEIGHT, _SPAN = 0.95, 1.0, 4.0

    def __init__(self) -> None:
        self._n = self._x = self._xx = self._y = self._xy = 0.0  # decayed sums

    @property
    def count(self) -> float:
        """Observations that still count."""
        return self._n

    def add(self, x: float, y: float) -> None:
        seen = ((self._n, 1.0), (self._x, x), (self._xx, x * x), (self._y, y), (self._xy, x * y))
        self._n, self._x, self._xx, self._y, self._xy = (self._DECAY * total + new for total, new in seen)

    def fitted(self, prior_a: float, prior_b: float) -> tuple[float, float]:
        """a and b; neither is below 0."""
        of_a, of_b = self._WEIGHT, self._WEIGHT * self._SPAN**2
        n, xx = self._n + of_a, self._xx + of_b
        y, xy = self._y + of_a * prior_a, self._xy + of_b * prior_b
        b = max(0.0, (n * xy - self._x * y) / (n * xx - self._x**2))
        return max(0.0, (y - b * self._x) / n), b
