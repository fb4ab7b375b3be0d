"""Passes over few tokens on a CPU: one operator for a range of layers, over weights where they lie.

The bits of a token do not depend on the pass: drafts, verifications, plain steps and batches agree exactly.
Nothing is made of the weights, so what decodes is always the weights of now.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from self_speculation.model.few_bits import is_in_few_bits
from self_speculation.model.fused_layers import FusedLayer
from self_speculation.model.kernels import cpu_operators
from self_speculation.model.kv_cache import KVCache
from self_speculation.model.linear import MAX_NARROW_TOKENS, Slot, tensors_in
from self_speculation.model.model_runner import ModelRunner


class _Range(NamedTuple):
    """What the operator takes for some layers, see `run_layers` of cpp/layers.cpp."""

    slots: list[Slot]  # of their weights
    numbers: Tensor  # [layers, 7]
    factors: Tensor  # [layers, 7]
    rotations: list[str | None]
    key_shape: tuple[int, int]


# The most tokens of a pass over weights in few bits: a core's cache has the inputs of so many.
_PIECE = 64


class InPlaceRunner(ModelRunner):
    """Runs fused layers by the operator, but for long passes over prompts by weights in 16 and more bits."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._ranges: dict[tuple[int, int], _Range | None] = {}
        self._is_in_few_bits = is_in_few_bits(model)

    def run_layers(self, cache: KVCache, hidden: Tensor, first: int, last: int) -> Tensor:
        rows, width, _ = hidden.shape
        own = self._range(first, last)
        is_long = cache.is_prompt and rows * width > MAX_NARROW_TOKENS
        if own is None or (is_long and not self._is_in_few_bits):
            return super().run_layers(cache, hidden, first, last)
        if self._is_in_few_bits and rows * width > _PIECE:
            pieces = hidden.split(max(1, _PIECE // rows), 1)
            return torch.cat([self._run_range(own, cache, piece, first, last) for piece in pieces], 1)
        return self._run_range(own, cache, hidden, first, last)

    def _run_range(self, own: _Range, cache: KVCache, hidden: Tensor, first: int, last: int) -> Tensor:
        rows, width, size = hidden.shape
        states = hidden.reshape(rows * width, size).contiguous()
        caches = cache.buffers_of(first, last, width, states.new_empty(0, *own.key_shape))
        self._rotary.reserve(cache.longest(first) + width)
        starts = torch.tensor([cache.length(first, row) for row in range(rows)])
        rotations = [self._rotary.tables[kind] for kind in own.rotations]
        torch.ops.self_speculation.run_layers(
            states,
            starts,
            cache.first_slot,
            own.numbers,
            own.factors,
            tensors_in(own.slots),
            caches,
            rotations,
        )
        cache.advance(first, last, width)
        return states.view(rows, width, size)

    def with_layers(self, layers: list[Any], head: Callable[[Tensor], Tensor]) -> ModelRunner:
        other: Any = super().with_layers(layers, head)
        other._ranges = {}
        return other

    def _range(self, first: int, last: int) -> _Range | None:
        if (first, last) not in self._ranges:
            self._ranges[first, last] = self._make_range(first, last)
        return self._ranges[first, last]

    def _make_range(self, first: int, last: int) -> _Range | None:
        """None: the operator does not have all of these layers."""
        layers, kinds = self.layers[first:last], self.attention_types[first:last]
        if self.dtype != torch.float32 or cpu_operators().variant is None or not layers:
            return None
        for index, layer in enumerate(layers, first):
            if not isinstance(layer, FusedLayer) or layer.index != index or not layer.has_slots:
                return None
        rotations = [*dict.fromkeys(kind.rotation for kind in kinds)]
        pairs = zip(layers, kinds, strict=True)
        told = [layer.description(kind.window, rotations.index(kind.rotation)) for layer, kind in pairs]
        numbers, factors = zip(*told, strict=True)
        if len({tuple(own[1:4]) for own in numbers}) > 1:  # pruned layers differ in heads or width
            return None
        return _Range(
            [slot for layer in layers for slot in layer.slots()],
            torch.tensor(numbers),
            torch.tensor(factors, dtype=torch.float64),
            rotations,
            layers[0].key_shape,
        )
