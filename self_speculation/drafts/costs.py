"""The cost of rounds: estimated from the bytes that passes read, corrected by those of adaptive decoding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy

from self_speculation.model.experts import bytes_per_layer, with_experts
from self_speculation.model.few_bits import is_in_few_bits
from self_speculation.model.kernels import cpu_operators
from self_speculation.model.quantized_layers import bytes_per_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from self_speculation.config import DraftWeights
    from self_speculation.model.model_runner import ModelRunner


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


def draft_ratio(
    model: PreTrainedModel, exit_layer: int, draft_weights: DraftWeights, draft_vocabulary: int | None = None
) -> float:
    """c of the formula: the cost of a drafted token in plain steps, estimated from bytes of weights.

    c = (E + h) / (L + h), where the head is as large as h layers, or (E + h N / V) / (L + h) for N of its V
    rows. Copies in four bits have fewer bytes; their kernel may take longer than reading them.
    """
    layers = model.base_model.layers
    head = model.get_output_embeddings().weight.nbytes / bytes_per_layer(model)
    rows = model.get_output_embeddings().out_features
    draft_head = head * min(draft_vocabulary or rows, rows) / rows
    own_layer, own_head = bytes_per_weight(model, "exact")
    layer_bytes, head_bytes = bytes_per_weight(model, draft_weights)
    if draft_weights == "int4":
        layer_bytes *= _costs(model, draft_weights)[0]
        head_bytes = layer_bytes if draft_head < head else head_bytes  # a short head is a copy, too
    read = layer_bytes / own_layer * exit_layer + head_bytes / own_head * draft_head
    return read / (len(layers) + head)


# Cost of a pass over n tokens by what computes it, in times to read its weights; linear in between. The last
# is proportional.
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 64_000)
_COSTS: Mapping[str, Sequence[float]] = {
    # Our operators on weights in 16 bits and, in four, on copies.
    "AVX512_VNNI": (1.0, 1.05, 1.2, 1.9, 3.4, 6.6, 13.0),
    "AVX2": (1.0, 1.05, 1.2, 2.0, 4.5, 8.5, 17.0),
    "AVX512_VNNI, few bits": (1.0, 1.1, 1.2, 1.5, 2.8, 5.5, 11.0),
    "AVX2, few bits": (1.1, 1.35, 1.8, 3.2, 6.2, 12.4, 25.0),
    "torch": (1.0, 1.1, 1.3, 1.6, 2.2, 3.5, 6.0),
    "torch, few bits": (1.7, 2.3, 3.0, 5.8, 11.0, 21.0, 42.0),
    "gpu": (1.0, 1.0, 1.01, 1.03, 1.06, 1.12, 1.25),  # bound by memory
}


def relative_pass_cost(runner: ModelRunner, draft_weights: DraftWeights = "exact") -> Callable[[int], float]:
    """Estimates the cost of a pass over n tokens, relative to one token, through a model or its copy."""
    costs = _costs(runner.model, draft_weights)
    costs = [*costs, 1000 * costs[-1]]
    return cache(
        with_experts(lambda number: float(numpy.interp(number, _TOKENS, costs)) / costs[0], runner.model)
    )


def _costs(model: PreTrainedModel, draft_weights: DraftWeights) -> Sequence[float]:
    if model.device.type != "cpu":
        return _COSTS["gpu"]
    kind = cpu_operators().variant or "torch"
    in_few_bits = draft_weights != "exact" or is_in_few_bits(model)
    return _COSTS[f"{kind}, few bits" if in_few_bits else kind]


class PassTimes:
    """Seconds of passes, learnt from rounds: one curve over the tokens of a verification, and one number for
    each source's drafted token.

    Both begin as estimates, for which a plain step of one row takes a second. Old observations decay.

    Args:
        relative_pass_cost: estimated cost of a pass over n tokens, relative to one.
    """

    # Longer times count as this many times the expected time.
    _TOO_LONG = 3.0
    # The estimated slope weighs as much as one pass that costs this many plain steps more than a plain step.
    # On a GPU two tokens more cost half a hundredth of a step, and the noise of a pass is ten times that.
    _PRIOR_EXCESS = 0.3

    def __init__(self, relative_pass_cost: Callable[[int], float]) -> None:
        self._pass_cost = relative_pass_cost
        self._plain_steps: dict[int, DecayedMean] = {}  # by rows
        self._slopes: dict[int, DecayedMean] = {}  # measured over estimated slope of the curve, by rows
        self._draft_steps: dict[tuple[str | None, int], DecayedMean] = {}

    def verification(self, num_rows: int) -> Callable[[int], float]:
        """Number of drafted tokens in each row -> time of their verification."""
        plain, slope = self.plain_step(num_rows), self._slope(num_rows).value
        return lambda num_drafted: plain * (1.0 + slope * self._estimated_excess(num_rows, num_drafted))

    def plain_step(self, num_rows: int) -> float:
        """A pass over one token of each row."""
        if not self._plain_steps:
            return self._pass_cost(num_rows)
        known = min(self._plain_steps, key=lambda rows: abs(rows - num_rows))
        return self._plain_steps[known].value * self._pass_cost(num_rows) / self._pass_cost(known)

    def draft_step(self, source: str | None, num_rows: int, estimate: Callable[[int], float]) -> float:
        """A drafted token of each row.

        Args:
            source: None: as estimated.
            estimate: see `Arm.draft_step`.
        """
        expected = self.plain_step(num_rows) / self._pass_cost(num_rows) * estimate(num_rows)
        known = self._draft_steps.get((source, num_rows))
        if known is None:
            return expected
        # A slow first draft must not rule out a second one.
        return known.value if known.count > 1.0 else min(known.value, expected)

    def bounded(self, seconds: float, expected: float) -> float:
        """A stall of the machine counts as a few times the expected time. Nothing is expected of a first
        round.
        """
        return min(seconds, self._TOO_LONG * expected) if self._plain_steps else seconds

    def add_draft(self, source: str, num_rows: int, seconds: float, estimate: Callable[[int], float]) -> None:
        """Learn the time of a drafted token, see `draft_step`."""
        expected = self.draft_step(source, num_rows, estimate)
        known = self._draft_steps.setdefault((source, num_rows), DecayedMean(0.0, weight=0.0))
        known.add(self.bounded(seconds, expected))

    def add_verification(self, num_rows: int, num_drafted: int, seconds: float) -> None:
        """Learn the time of a verification of so many tokens in each row."""
        excess = self._estimated_excess(num_rows, num_drafted)
        expected = 1.0 + self._slope(num_rows).value * excess  # in plain steps
        # The first round may include warm-up; use it for plain steps only.
        if not self._plain_steps or (num_rows not in self._plain_steps and num_drafted):
            self._plain_steps[num_rows] = DecayedMean(0.0, weight=0.0)
            self._plain_steps[num_rows].add(seconds / expected, weight=0.1)
            return
        seconds = self.bounded(seconds, self.plain_step(num_rows) * expected)
        if not num_drafted:
            self._plain_steps.setdefault(num_rows, DecayedMean(0.0, weight=0.0)).add(seconds)
        elif excess > 0.0:
            more = seconds / self.plain_step(num_rows) - 1.0
            weight = min(1.0, (excess / self._PRIOR_EXCESS) ** 2)
            self._slope(num_rows).add(max(0.0, more / excess), weight)

    def _slope(self, num_rows: int) -> DecayedMean:
        return self._slopes.setdefault(num_rows, DecayedMean(1.0, weight=1.0))

    def _estimated_excess(self, num_rows: int, num_drafted: int) -> float:
        """Cost of a verification beyond a plain step, in plain steps."""
        return self._pass_cost(num_rows * (1 + num_drafted)) / self._pass_cost(num_rows) - 1.0
