"""Passes on a CPU: one operator for a range of layers, over weights where they lie.

The bits of a token do not depend on the pass: prompts in any pieces, drafts, verifications, plain steps and
batches agree exactly. A pass reads tokens of a prompt or of output (`KVCache.is_prompt`). Tokens of a prompt
may be rounded, see `rounds_prompts`. Activations are float32 for every format of weights. No weight is
copied; a transposed one is laid out by rows once.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from self_speculation.backends.kv_cache import KVCache
from self_speculation.backends.layers import FusedWeights, Head, Layer, LlamaLayer, RMSNorm
from self_speculation.backends.runner import ModelRunner
from self_speculation.backends.unsupported_hooks import why_not_plain
from self_speculation.weights.few_bits import NONE, apply_linear, is_in_few_bits
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
    """A layer that the operator computes. Linear modules are those of the model."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        attention = layer.self_attn
        mlp = layer.mlp
        self.linears = [
            attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
            mlp.gate_proj, mlp.up_proj, mlp.down_proj,
        ]  # fmt: skip

    def tensors(self) -> list[Tensor]:
        """All tensors that the operator reads, in the operator's order."""
        found = [norm and norm.weight for norm in self.norms.values()]
        for linear in self.linears:
            found += [linear.weight, linear.bias]
        return [NONE if tensor is None else tensor for tensor in found]

    def description(self, window: int | None, rotation: int) -> tuple[list[int | None], list[float]]:
        """Integers and factors of the operator's `Layer`, see cpp/layers.cpp.

        Args:
            rotation: index of the tables of rotation.
        """
        sizes = [self.num_heads, self.num_kv_heads, self.intermediate_size, window or 0, rotation]
        epsilons = [norm.epsilon if norm else 0.0 for norm in self.norms.values()]
        return [*sizes, self.is_gelu, self.norms["input"].is_centred], [self.scaling, *epsilons]


class InPlaceHead(Head):
    """Final norm and head in one call of the operator."""

    norm: RMSNorm

    def __call__(self, hidden: Tensor) -> Tensor:
        return apply_linear(hidden, self.linear, self.norm)


class InPlaceWeights(FusedWeights):
    """The operator computes all layers and the head of a model, or none of them: with a mixture, a token's
    bits would depend on the pass. Without the operator, layers of transformers compute in the model's dtype.
    """

    def replace(self, model: PreTrainedModel) -> None:
        if cpu_operators().variant is None or model.dtype == torch.float64:
            return
        base = model.base_model
        head = model.get_output_embeddings()
        roots = [*([layer] for layer in base.layers), [base.norm, head]]
        if model.dtype.itemsize == 2 and hasattr(base.embed_tokens, "scalar_embed_scale"):
            roots.append([base.embed_tokens])  # `ModelRunner.embed` scales by itself
        if any(why_not_plain(model, *modules) is not None for modules in roots):
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
        # (start_layer, end_layer) -> the handle of the layers' descriptions, and the kinds of rotation.
        self._ranges = dict[tuple[int, int], tuple[Tensor, list[str | None]]]()

    def with_layers(self, layers: Sequence[Layer], head: Head) -> ModelRunner:
        runner = super().with_layers(layers, head)
        assert isinstance(runner, InPlaceRunner)
        runner._ranges = {}
        return runner

    def run_layers(
        self, cache: KVCache, hidden: Tensor, query_lengths: Sequence[int], start_layer: int, end_layer: int
    ) -> Tensor:
        """No padding: the operator takes the tokens that there are."""
        if start_layer == end_layer:
            return hidden
        # A range is described once; the operator looks up in each pass where the weights are.
        if (start_layer, end_layer) not in self._ranges:
            self._ranges[start_layer, end_layer] = self._describe(start_layer, end_layer)
        handle, rotations = self._ranges[start_layer, end_layer]
        states = hidden.contiguous()
        piece_begin = 0
        row_ends = [*accumulate(query_lengths)]
        num_pieces = -(-len(states) // cpu_operators().max_pass_tokens)
        for piece in states.tensor_split(num_pieces):  # of nearly equal size
            piece_end = piece_begin + len(piece)
            row_tokens = [  # tokens of each row in this piece
                max(0, min(piece_end, row_end) - max(piece_begin, row_end - length))
                for row_end, length in zip(row_ends, query_lengths, strict=True)
            ]
            rows = enumerate(zip(cache.lengths(start_layer), row_tokens, strict=True), cache.first_slot)
            prefixes = cache.buffers.shared_prefixes
            # `Sequence` of cpp/layers.cpp: slot, start, tokens, and the shared prefix.
            sequences = [(slot, start, tokens, *prefixes[slot]) for slot, (start, tokens) in rows if tokens]
            longest = max(start + tokens for _, start, tokens, *_ in sequences)
            torch.ops.self_speculation.run_layers.default(
                piece,
                torch.tensor(sequences),
                cache.is_prompt,
                handle,
                cache.make_room(start_layer, end_layer, row_tokens),
                [self.tables.cos_sin(rotation, longest) for rotation in rotations],
            )
            cache.extend(start_layer, end_layer, row_tokens)
            piece_begin = piece_end
        return states

    def _describe(self, start_layer: int, end_layer: int) -> tuple[Tensor, list[str | None]]:
        """A handle of layers [start_layer:end_layer] for the operator, and the kinds of rotation."""
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
