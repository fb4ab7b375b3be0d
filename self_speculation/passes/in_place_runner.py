"""Passes on a CPU: one operator for a range of layers, over weights where they lie.

The bits of a token do not depend on the pass: prompts in any pieces, drafts, verifications, plain steps and
batches agree exactly. A pass reads tokens of a prompt or of output (`KVCache.is_prompt`). Those of a prompt
may be rounded, see `rounds_prompts`.
Nothing is made of the weights, but transposed ones are laid out by rows once. Activations are float32
whatever format weights have.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from self_speculation.passes.kv_cache import KVCache
from self_speculation.passes.layers import FusedWeights, Head, Layer, LlamaLayer, RMSNorm
from self_speculation.passes.model_runner import ModelRunner
from self_speculation.passes.unsupported_hooks import difference
from self_speculation.weights.few_bits import NONE, is_in_few_bits, linear
from self_speculation.weights.kernels import cpu_operators


def rounds_prompts(model: PreTrainedModel) -> bool:
    """Whether tokens of a prompt are rounded to bfloat16 where they meet a weight: with AVX512_BF16 one in
    bfloat16, with tiles (AMX) any that is not in float32.
    """
    operators = cpu_operators()
    if operators.has_tiles:
        return model.dtype != torch.float32 or is_in_few_bits(model)
    return operators.variant == "AVX512_BF16" and model.dtype == torch.bfloat16


class InPlaceLayer(LlamaLayer):
    """A layer that the operator computes. Its products are modules."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        attention = layer.self_attn
        mlp = layer.mlp
        self.products = [
            attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
            mlp.gate_proj, mlp.up_proj, mlp.down_proj,
        ]  # fmt: skip

    def tensors(self) -> list[Tensor]:
        """All that the operator reads, in the operator's order."""
        parts = [norm and norm.weight for norm in self.norms.values()]
        for product in self.products:
            parts += [product.weight, product.bias]
        return [NONE if part is None else part for part in parts]

    def description(self, window: int | None, rotation: int) -> tuple[list[int | None], list[float]]:
        """Integers and factors of the operator's `Layer`, see cpp/layers.cpp.

        Args:
            rotation: the number of the tables of rotation.
        """
        sizes = [self.num_heads, self.num_kv_heads, self.mlp_width, window or 0, rotation]
        epsilons = [norm.epsilon if norm else 0.0 for norm in self.norms.values()]
        return [*sizes, self.is_gelu, self.norms["input"].is_centred], [self.scaling, *epsilons]


class InPlaceHead(Head):
    """Final norm and head in one call of the operator."""

    norm: RMSNorm

    def __call__(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.product, self.norm)


class InPlaceWeights(FusedWeights):
    """The operator has all layers and the head of a model, or none. With a mixture, a token's bits would
    depend on the pass. If it has none of a model in 16 bits, layers of transformers compute in 16 bits.
    """

    def replace(self, model: PreTrainedModel) -> None:
        if cpu_operators().variant is None or model.dtype == torch.float64:
            return
        base = model.base_model
        head = model.get_output_embeddings()
        roots = [*([layer] for layer in base.layers), [base.norm, head]]
        if model.dtype.itemsize == 2 and hasattr(base.embed_tokens, "scalar_embed_scale"):
            roots.append([base.embed_tokens])  # `ModelRunner.embed` scales by itself
        if any(difference(model, *modules) is not None for modules in roots):
            return
        layers = [InPlaceLayer(layer) for layer in base.layers]
        if any(layer.is_gelu is None for layer in layers):
            return
        self.dtype = torch.float32
        for weight in model.parameters():
            if weight.stride()[-1:] > (1,):  # it lies transposed
                weight.data = weight.data.contiguous()
        self.replaced = dict(zip(base.layers, layers, strict=True))
        self.replaced[head] = InPlaceHead(RMSNorm(base.norm), head)


class InPlaceRunner(ModelRunner):
    """Runs layers by the operator, which has all of them."""

    layers: Sequence[InPlaceLayer]
    weights_kind = InPlaceWeights
    is_ragged = True

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        # (start_layer, end_layer) -> the handle of the operator's descriptions, and the kinds of rotation.
        self._ranges = dict[tuple[int, int], tuple[Tensor, list[str | None]]]()

    def with_layers(self, layers: Sequence[Layer], head: Head) -> ModelRunner:
        other = super().with_layers(layers, head)
        assert isinstance(other, InPlaceRunner)
        other._ranges = {}
        return other

    def run_layers(
        self, cache: KVCache, hidden: Tensor, query_lengths: Sequence[int], start_layer: int, end_layer: int
    ) -> Tensor:
        """No padding: the operator takes the tokens that there are."""
        if start_layer == end_layer:
            return hidden
        # Described once: in each pass the operator looks up where the weights are.
        if (start_layer, end_layer) not in self._ranges:
            self._ranges[start_layer, end_layer] = self._described(start_layer, end_layer)
        handle, rotations = self._ranges[start_layer, end_layer]
        states = hidden.contiguous()
        begin = 0
        ends = [*accumulate(query_lengths)]  # of each row's tokens
        num_pieces = -(-len(states) // cpu_operators().prompt_tokens)
        for piece in states.tensor_split(num_pieces):  # of nearly equal size
            end = begin + len(piece)
            parts = [
                max(0, min(end, row_end) - max(begin, row_end - width))
                for row_end, width in zip(ends, query_lengths, strict=True)
            ]
            by_slot = enumerate(zip(cache.lengths(start_layer), parts, strict=True), cache.first_slot)
            prefixes = cache.buffers.shared_prefixes
            rows = [(slot, length, part, *prefixes[slot]) for slot, (length, part) in by_slot if part]
            longest = max(length + part for _, length, part, *_ in rows)
            torch.ops.self_speculation.run_layers.default(
                piece,
                torch.tensor(rows),
                cache.is_prompt,
                handle,
                cache.make_room(start_layer, end_layer, parts),
                [self.tables.cos_sin(rotation, longest) for rotation in rotations],
            )
            cache.extend(start_layer, end_layer, parts)
            begin = end
        return states

    def _described(self, start_layer: int, end_layer: int) -> tuple[Tensor, list[str | None]]:
        """Layers [start_layer:end_layer] as the operator has them."""
        layers = self.layers[start_layer:end_layer]
        kinds = self.attention_types[start_layer:end_layer]
        rotations = [*dict.fromkeys(kind.rotation for kind in kinds)]
        descriptions = [
            layer.description(kind.window, rotations.index(kind.rotation))
            for layer, kind in zip(layers, kinds, strict=True)
        ]
        integers, factors = zip(*descriptions, strict=True)
        handle = torch.ops.self_speculation.make_layers.default(
            torch.tensor(integers),
            torch.tensor(factors, dtype=torch.float64),
            [tensor for layer in layers for tensor in layer.tensors()],
            self.config.hidden_size,
            layers[0].head_dim,
        )
        return handle, rotations
