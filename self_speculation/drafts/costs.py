"""The cost of rounds: estimated from the bytes that passes read, corrected by rounds of adaptive decoding."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy

from self_speculation.backends.copies import copy_bytes_per_weight
from self_speculation.models.families import experts_per_token
from self_speculation.weights.few_bits import is_in_few_bits, mean_bytes_per_weight
from self_speculation.weights.kernels import cpu_operators

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from self_speculation.backends.runner import ModelRunner
    from self_speculation.config import DraftWeights


_DECAY = 0.97  # of the weight of earlier observations, with each new one


class DecayedMean:
    """The mean of a prior and of observations, whose weight decays.

    Args:
        prior: the mean without observations.
        prior_strength: number of observations that the prior counts as.
    """

    def __init__(self, prior: float, prior_strength: float = 2.0) -> None:
        self._prior = prior
        self._prior_strength = prior_strength
        self._sum = 0.0
        self.count = 0.0  # weight of the observations

    @property
    def value(self) -> float:
        total = self._prior * self._prior_strength + self._sum
        return total / (self._prior_strength + self.count)

    def add(self, value: float) -> None:
        """Add an observation."""
        self._sum = _DECAY * self._sum + value
        self.count = _DECAY * self.count + 1.0


def draft_ratio(model: PreTrainedModel, exit_layer: int, draft_weights: DraftWeights) -> float:
    """The cost of a drafted token in plain steps, c in docs/how-it-works.md, estimated from bytes of weights.

    c = (E + h) / (L + h), where the head is as large as h layers. Copies in four bits have fewer bytes; their
    kernel may take longer than reading them.
    """
    layers = model.base_model.layers
    head = model.get_output_embeddings().weight.nbytes / _bytes_per_layer(model)
    if draft_weights == "exact":
        return (exit_layer + head) / (len(layers) + head)
    layer_bytes = mean_bytes_per_weight(layers[0])
    head_bytes = mean_bytes_per_weight(model.get_output_embeddings())
    read = exit_layer / layer_bytes + head / head_bytes
    return copy_bytes_per_weight(model) * _costs(model, draft_weights)[0] * read / (len(layers) + head)


def _bytes_per_layer(model: PreTrainedModel) -> float:
    """Mean bytes that a pass over one token reads in a layer. Experts' weights have three dimensions and
    count by the share of experts that a token takes. All layers of a dense model are alike.
    """
    layers = model.base_model.layers
    chosen = experts_per_token(model.config)
    counted = layers[:1] if chosen is None else layers
    share = 1.0 if chosen is None else chosen / model.config.num_experts
    weights = (
        w for layer in counted for w in (*layer.parameters(), *layer.buffers())
    )  # few bits are buffers
    return sum(weight.nbytes * (share if weight.dim() == 3 else 1.0) for weight in weights) / len(counted)


# Cost of a pass over n tokens by what computes it, in units of the time to read the weights; linear in
# between. Beyond 64 tokens it grows in proportion.
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 64_000)
_COSTS: Mapping[str, Sequence[float]] = {
    # Our operators on weights in 16 bits and, in four, on copies.
    "AVX512_VNNI": (1.0, 1.05, 1.2, 1.9, 3.4, 6.6, 13.0),
    "AVX2": (1.0, 1.2, 1.45, 2.5, 4.1, 7.7, 15.4),
    "AVX_VNNI": (1.0, 1.2, 1.45, 2.5, 4.1, 7.7, 15.4),  # as AVX2
    "AVX512_VNNI, few bits": (1.0, 1.1, 1.2, 1.5, 2.8, 5.5, 11.0),
    "AVX512_VNNI, eight bits": (1.0, 1.06, 1.07, 1.2, 2.0, 3.7, 7.6),  # one scale for a block, no minimum
    "AVX_VNNI, few bits": (1.2, 1.3, 1.45, 2.2, 4.1, 8.1, 16.5),
    "AVX_VNNI, eight bits": (1.15, 1.2, 1.27, 1.35, 2.1, 4.0, 7.8),
    "AVX2, few bits": (1.25, 1.35, 1.7, 3.0, 5.6, 11.0, 22.0),
    "torch": (1.0, 1.1, 1.3, 1.6, 2.2, 3.5, 6.0),
    "gpu": (1.0, 1.0, 1.01, 1.03, 1.06, 1.12, 1.25),  # bound by memory
}


def relative_pass_cost(runner: ModelRunner, draft_weights: DraftWeights = "exact") -> Callable[[int], float]:
    """Estimates the cost of a pass over n tokens, relative to one token, through a model or a copy."""
    costs = _costs(runner.model, draft_weights)
    costs = [*costs, 1000 * costs[-1]]
    return cache(lambda number: float(numpy.interp(number, _TOKENS, costs)) / costs[0])


def _costs(model: PreTrainedModel, draft_weights: DraftWeights) -> Sequence[float]:
    if model.device.type != "cpu":
        return _COSTS["gpu"]
    variant = cpu_operators().variant or "torch"
    kind = {"AMX": "AVX512_VNNI", "AVX512_BF16": "AVX512_VNNI", "ARM": "AVX2"}.get(variant, variant)
    if draft_weights == "exact" and not is_in_few_bits(model):
        return _COSTS[kind]
    few = _COSTS[f"{kind}, few bits"]
    in_eight = draft_weights == "exact" and mean_bytes_per_weight(model.base_model.layers[0]) >= 1
    return _COSTS.get(f"{kind}, eight bits", few) if in_eight else few


class _Line:
    """Fits seconds = plain + slope * excess, where a pass costs 1 + excess plain steps, by least squares. Old
    observations decay.

    The estimated slope weighs as much as one pass with an excess of 0.3: on a GPU two more tokens cost 0.5 %
    of a pass, and the noise of a pass is 5 %.
    """

    _PRIOR = 0.3**2

    def __init__(self) -> None:
        self._sums = [0.0] * 5  # of 1, x, x^2, y, x y
        self.plain = self.slope = 0.0  # equal, until passes with an excess are observed

    def add(self, excess: float, seconds: float, weight: float) -> None:
        # Each round does this: for five numbers numpy takes longer.
        new = (1.0, excess, excess**2, seconds, excess * seconds)
        self._sums = [_DECAY * old + weight * more for old, more in zip(self._sums, new, strict=True)]
        n, x, xx, y, xy = self._sums
        n += self._PRIOR
        x -= self._PRIOR
        xx += self._PRIOR
        determinant = n * xx - x * x
        self.plain = (xx * y - x * xy) / determinant
        self.slope = max(0.0, (n * xy - x * y) / determinant)


class PassTimes:
    """Seconds of passes, learnt from rounds: a line for each number of rows, and a factor for each source's
    passes that draft.

    Both begin as estimates, for which a plain step of one row takes a second.

    Args:
        relative_pass_cost: estimated cost of a pass over n tokens, relative to one.
    """

    # Longer times count as this many times the expected time.
    _TOO_LONG = 3.0

    def __init__(self, relative_pass_cost: Callable[[int], float]) -> None:
        self._pass_cost = relative_pass_cost
        self._lines: dict[int, _Line] = {}  # by rows
        # Source -> rows of a draft's first pass -> measured over estimated time.
        self._drafts: defaultdict[str, dict[int, DecayedMean]] = defaultdict(dict)

    def verify_seconds(self, num_rows: int) -> Callable[[int], float]:
        """A function: number of tokens, of `num_rows` rows together -> seconds of a pass over them."""
        plain, slope = self._plain_and_slope(num_rows)
        cost = self._pass_cost
        fixed = plain - slope
        grows = slope / cost(num_rows)
        return lambda num_tokens: fixed + grows * cost(num_tokens)

    def draft_seconds(
        self, num_rows: int, estimates: Mapping[str, Callable[[int], float]]
    ) -> Callable[[str, int], float]:
        """A function: source, number of rows that draft -> seconds of a pass that drafts a token of each.

        Args:
            num_rows: of the batch.
            estimates: of each source, see `DraftCost.draft_step`.
        """
        unit = self._unit(num_rows)
        return lambda source, rows: unit * self._ratio(source, rows) * estimates[source](rows)

    def add_drafts(
        self,
        source: str,
        num_rows: int,
        passes: Sequence[int],
        seconds: float,
        estimate: Callable[[int], float],
    ) -> None:
        """Learn the time of a draft.

        Args:
            passes: number of rows of each pass.
            seconds: of all passes.
        """
        ratio = seconds / (self._unit(num_rows) * sum(map(estimate, passes)))
        expected = self._ratio(source, passes[0])
        known = self._drafts[source].setdefault(passes[0], DecayedMean(expected))
        known.add(self._bounded(ratio, expected))

    def add_verification(self, num_rows: int, num_tokens: int, seconds: float) -> None:
        """Learn the time of a verification; num_tokens: of all rows."""
        seconds = self._bounded(seconds, self.verify_seconds(num_rows)(num_tokens))
        weight = 1.0 if num_rows in self._lines else 0.1  # the first round may include warm-up
        excess = self._pass_cost(num_tokens) / self._pass_cost(num_rows) - 1.0
        self._lines.setdefault(num_rows, _Line()).add(excess, seconds, weight)

    def _ratio(self, source: str, num_rows: int) -> float:
        """Measured over estimated time of drafts, from the nearest number of rows that was measured."""
        known = self._drafts[source]
        return known[min(known, key=lambda rows: abs(rows - num_rows))].value if known else 1.0

    def _plain_and_slope(self, num_rows: int) -> tuple[float, float]:
        """Seconds of a plain step of `num_rows` rows, and more seconds for an excess of one. Both are scaled
        from the nearest number of rows that was measured.
        """
        if not self._lines:
            return self._pass_cost(num_rows), self._pass_cost(num_rows)
        nearest = min(self._lines, key=lambda rows: abs(rows - num_rows))
        ratio = self._pass_cost(num_rows) / self._pass_cost(nearest)
        return ratio * self._lines[nearest].plain, ratio * self._lines[nearest].slope

    def _unit(self, num_rows: int) -> float:
        """Seconds of a plain step of one row, as passes over `num_rows` rows tell."""
        return self._plain_and_slope(num_rows)[0] / self._pass_cost(num_rows)

    def _bounded(self, measured: float, expected: float) -> float:
        """A stall of the machine counts as a few times the expected time. Nothing is expected of a first
        round.
        """
        return min(measured, self._TOO_LONG * expected) if self._lines else measured
