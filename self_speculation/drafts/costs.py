"""The cost of rounds: estimated from the bytes that passes read, corrected by those of adaptive decoding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy

from self_speculation.drafts.estimates import DecayedMean
from self_speculation.model.experts import bytes_of_layer, with_experts
from self_speculation.model.kernels import int4_kernel
from self_speculation.model.quantized_layers import bytes_per_weight

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from self_speculation.config import DraftWeights
    from self_speculation.model.model_runner import ModelRunner


def draft_ratio(
    model: PreTrainedModel, exit_layer: int, draft_weights: DraftWeights, draft_vocabulary: int | None = None
) -> float:
    """c of the formula: the cost of a drafted token in plain steps, estimated from bytes of weights.

    c = (E + h) / (L + h), where the head is as large as h layers, or (E + h N / V) / (L + h) for N of its V
    rows. Copies in four bits have fewer bytes; their kernel may take longer than reading them.
    """
    layers = model.base_model.layers
    head = model.get_output_embeddings().weight.nbytes / bytes_of_layer(model)
    rows = len(model.get_output_embeddings().weight)
    head_of_draft = head * min(draft_vocabulary or rows, rows) / rows
    of_layers, of_head = bytes_per_weight(model, draft_weights)
    if draft_weights == "int4":
        of_layers *= _COSTS[_kernel_of_copies(model.device)][0]
        of_head = of_layers if head_of_draft < head else of_head  # a short head is a copy, too
    read = (of_layers * exit_layer + of_head * head_of_draft) / model.dtype.itemsize
    return read / (len(layers) + head)


# Cost of a pass over n tokens by kernel, in times to read its weights; linear in between. The last is
# proportional.
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 64_000)
_COSTS: Mapping[str, Sequence[float]] = {
    "float16": (1.0, 1.06, 1.18, 1.5, 2.5, 4.6, 9.0),  # W16A32 (FBGEMM)
    "packed": (1.0, 1.04, 1.1, 1.25, 1.5, 2.5, 4.0),  # oneDNN
    # Four bits: our own kernel with two kinds of instructions, and torch's.
    "AVX512_VNNI": (1.0, 1.1, 1.2, 1.5, 2.8, 5.5, 11.0),
    "AVX2": (1.1, 1.35, 1.8, 3.2, 6.2, 12.4, 25.0),
    "torch": (1.7, 2.3, 3.0, 5.8, 11.0, 21.0, 42.0),
    "gpu": (1.0, 1.0, 1.01, 1.03, 1.06, 1.12, 1.25),  # bound by memory
}


def growth(runner: ModelRunner, draft_weights: DraftWeights = "exact") -> Callable[[int], float]:
    """Estimates the cost of a pass over n tokens, relative to one token, through a model or its copy."""
    device = runner.rotary.device
    if draft_weights == "int4":
        kind = _kernel_of_copies(device)
    elif device.type != "cpu":
        kind = "gpu"
    else:
        kind = "float16" if runner.dtype != runner.model.dtype else "packed"
    costs = [*_COSTS[kind], 1000 * _COSTS[kind][-1]]
    return cache(
        with_experts(lambda number: float(numpy.interp(number, _TOKENS, costs)) / costs[0], runner.model)
    )


def _kernel_of_copies(device: torch.device) -> str:
    return "gpu" if device.type != "cpu" else int4_kernel().variant or "torch"


class PassTimes:
    """Seconds of passes, learnt from rounds: one curve over the tokens of a verification, and one number for
    each source's drafted token.

    Both begin as estimates, in plain steps of one row until the first round. Old observations decay.

    Args:
        growth: estimated cost of a pass over n tokens, relative to one.
    """

    # Longer times count as this many times the expected time.
    _TOO_LONG = 3.0
    # The estimated slope weighs as much as one pass that costs this many plain steps more than a plain step.
    _PRIOR_EXCESS = 0.3

    def __init__(self, growth: Callable[[int], float]) -> None:
        self._growth = growth
        self._units: dict[int, DecayedMean] = {}  # seconds of a plain step, by rows
        self._excess: dict[int, DecayedMean] = {}  # measured over estimated slope of the curve, by rows
        self._drafts: dict[tuple[str, int], DecayedMean] = {}

    def verification(self, num_rows: int) -> Callable[[int], float]:
        """Number of drafted tokens in each row -> time of their verification."""
        plain, slope = self.plain_step(num_rows), self._slope(num_rows).value
        return lambda num_drafted: plain * (1.0 + slope * self._estimated_excess(num_rows, num_drafted))

    def plain_step(self, num_rows: int) -> float:
        if not self._units:
            return self._growth(num_rows)
        known = min(self._units, key=lambda rows: abs(rows - num_rows))
        return self._units[known].value * self._growth(num_rows) / self._growth(known)

    def draft_step(self, source: str, num_rows: int, ratio: float, growth: Callable[[int], float]) -> float:
        """A drafted token of each row.

        Args:
            ratio: estimated cost for one row, in plain steps.
            growth: of the source's passes.
        """
        estimate = self.estimated_draft_step(num_rows, ratio, growth)
        known = self._drafts.get((source, num_rows))
        if known is None:
            return estimate
        # A slow first draft must not rule out a second one.
        return known.value if known.count > 1.0 else min(known.value, estimate)

    def estimated_draft_step(self, num_rows: int, ratio: float, growth: Callable[[int], float]) -> float:
        """See `draft_step`."""
        return self.plain_step(num_rows) / self._growth(num_rows) * ratio * growth(num_rows)

    def add_draft(self, source: str, num_rows: int, seconds: float, expected: float) -> None:
        """Learn the time of a drafted token; `expected`: that of `draft_step`."""
        known = self._drafts.setdefault((source, num_rows), DecayedMean(0.0, weight=0.0))
        known.add(min(seconds, self._TOO_LONG * expected) if self._units else seconds)

    def add_verification(self, num_rows: int, num_drafted: int, seconds: float) -> None:
        """Learn the time of a verification of so many tokens in each row."""
        steps = self._estimated_excess(num_rows, num_drafted)
        expected = 1.0 + self._slope(num_rows).value * steps  # in plain steps
        # A first round has no bound and may be slow: it tells of plain steps only.
        if not self._units or (num_rows not in self._units and num_drafted):
            self._units[num_rows] = DecayedMean(0.0, weight=0.0)
            self._units[num_rows].add(seconds / expected, weight=0.1)
            return
        seconds = min(seconds, self._TOO_LONG * self.plain_step(num_rows) * expected)
        if not num_drafted:
            self._units.setdefault(num_rows, DecayedMean(0.0, weight=0.0)).add(seconds)
        elif steps > 0.0:
            more = seconds / self.plain_step(num_rows) - 1.0
            self._slope(num_rows).add(
                max(0.0, more / steps), weight=min(1.0, (steps / self._PRIOR_EXCESS) ** 2)
            )

    def _slope(self, num_rows: int) -> DecayedMean:
        return self._excess.setdefault(num_rows, DecayedMean(1.0, weight=1.0))

    def _estimated_excess(self, num_rows: int, num_drafted: int) -> float:
        """Cost of a verification beyond a plain step, in plain steps."""
        return self._growth(num_rows * (1 + num_drafted)) / self._growth(num_rows) - 1.0
