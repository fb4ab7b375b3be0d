"""Passes on a CPU: one operator for a range of layers, over weights where they lie.

The bits of a token do not depend on the pass: prompts in any pieces, drafts, verifications, plain steps and
batches agree exactly. On a processor with AVX512_BF16 tokens of a prompt are another kind than output: they
are rounded to bfloat16 where they meet a weight in bfloat16, see `KVCache.is_prompt`.
Nothing is made of the weights, so what decodes is always the weights of now.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from self_speculation.passes.fused_layers import FusedLayer
from self_speculation.passes.kv_cache import KVCache
from self_speculation.passes.model_runner import Head, Layer, ModelRunner
from self_speculation.weights.kernels import cpu_operators


class _Range(NamedTuple):
    """Some layers as the operator has them."""

    owner: Tensor  # of them
    rotations: list[str | None]
    key_shape: tuple[int, int]


# The most tokens of a pass: a core's cache has the inputs of so many.
_PIECE = 64


def rounds_prompts(model: PreTrainedModel) -> bool:
    """Whether tokens of a prompt are rounded to bfloat16."""
    return cpu_operators().variant == "AVX512_BF16" and model.dtype == torch.bfloat16


class InPlaceRunner(ModelRunner):
    """Runs fused layers by the operator."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._ranges: dict[tuple[int, int], _Range | None] = {}

    @property
    def is_in_place(self) -> bool:
        """Whether the operator has all layers."""
        return self._range(0, len(self.layers)) is not None

    def _replace(self, layers: Sequence[Layer], head: Head) -> None:
        super()._replace(layers, head)
        self._ranges = {}

    def run_layers(self, cache: KVCache, hidden: Tensor, first: int, last: int) -> Tensor:
        rows, width, size = hidden.shape
        own = self._range(first, last)
        if own is None:
            return super().run_layers(cache, hidden, first, last)
        if width > (most := max(1, _PIECE // rows)):
            pieces = hidden.tensor_split(-(-width // most), 1)  # of nearly equal size
            return torch.cat([self.run_layers(cache, piece, first, last) for piece in pieces], 1)
        states, lengths = hidden.reshape(rows * width, size).contiguous(), cache.lengths(first)
        num_positions = max(lengths) + width
        torch.ops.self_speculation.run_layers.default(
            states,
            torch.tensor(lengths),
            cache.first_slot,
            cache.is_prompt,
            own.owner,
            cache.extend(first, last, width, states.new_empty(0, *own.key_shape)),
            [self.tables.cos_sin(rotation, num_positions) for rotation in own.rotations],
        )
        return states.view(rows, width, size)

    def _range(self, first: int, last: int) -> _Range | None:
        """The operator itself sees that a parameter has other memory."""
        if (first, last) not in self._ranges:
            self._ranges[first, last] = self._make_range(first, last)
        return self._ranges[first, last]

    def _make_range(self, first: int, last: int) -> _Range | None:
        """None: the operator does not have all of these layers."""
        layers, kinds = self.layers[first:last], self.attention_types[first:last]
        if self.dtype != torch.float32 or cpu_operators().variant is None:
            return None
        fused = [layer for layer in layers if isinstance(layer, FusedLayer) and layer.is_in_place]
        if [layer.index for layer in fused] != [*range(first, last)] or not fused:
            return None
        rotations = [*dict.fromkeys(kind.rotation for kind in kinds)]
        pairs = zip(fused, kinds, strict=True)
        told = [layer.description(kind.window, rotations.index(kind.rotation)) for layer, kind in pairs]
        numbers, factors = zip(*told, strict=True)
        if len({tuple(own[1:4]) for own in numbers}) > 1:  # pruned layers differ in heads or width
            return None
        owner = torch.ops.self_speculation.make_layers.default(
            torch.tensor(numbers),
            torch.tensor(factors, dtype=torch.float64),
            [tensor for layer in fused for tensor in layer.tensors()],
            self.config.hidden_size,
            fused[0].key_shape[1],
        )
        return _Range(owner, rotations, fused[0].key_shape)
