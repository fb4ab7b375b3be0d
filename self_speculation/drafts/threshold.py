"""When a draft had better end: after a token that its own model gave a low probability.

Numbers in, numbers out; knows nothing of models, tokens or tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

from self_speculation.drafts.estimates import DecayedMean

_BINS = 10


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
        draft_step: cost of one drafted token, in plain steps. A verification takes one of them.
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
