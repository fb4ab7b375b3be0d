"""Passes on a CPU: one operator for a range of layers, over weights where they lie.

The bits of a token do not depend on the pass: prompts in any pieces, drafts, verifications, plain steps and
batches agree exactly. On a processor with AVX512_BF16 tokens of a prompt are another kind than output: they
are rounded to bfloat16 where they meet a weight in bfloat16, see `KVCache.is_prompt`.
Nothing is made of the weights, so what decodes is always the weights of now. Activations are float32 whatever
format weights have.
"""

import itertools
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from self_speculation.passes.kv_cache import KVCache
from self_speculation.passes.layers import Head, Layer, LlamaLayer, Parts, RMSNorm
from self_speculation.passes.model_runner import ModelRunner
from self_speculation.passes.unsupported_hooks import difference
from self_speculation.weights.few_bits import project, weights_of
from self_speculation.weights.kernels import cpu_operators

# The most tokens of a pass: a core's cache has the inputs of so many.
_PIECE = 64


def rounds_prompts(model: PreTrainedModel) -> bool:
    """Whether tokens of a prompt are rounded to bfloat16."""
    return cpu_operators().variant == "AVX512_BF16" and model.dtype == torch.bfloat16


class InPlaceLayer(LlamaLayer):
    """A layer that the operator computes. Its products are modules."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        attention, mlp = layer.self_attn, layer.mlp
        self.products = [
            attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
            mlp.gate_proj, mlp.up_proj, mlp.down_proj,
        ]  # fmt: skip

    def tensors(self) -> list[Tensor]:
        """All that the operator reads, in its order."""
        norms = [norm.weight for norm in self.norms.values() if norm is not None]
        return norms + [tensor for product in self.products for tensor in weights_of(product)]

    def description(self, window: int | None, rotation: int) -> tuple[list[int | None], list[float]]:
        """What the operator is told of it, see `Layer` of cpp/layers.cpp.

        Args:
            rotation: the number of its tables.
        """
        options = [product.bias is not None for product in self.products]
        options += [self.norms[name] is not None for name in ("query", "attended", "output")]
        options += [self.norms["input"].is_centred]
        has = sum(is_there << bit for bit, is_there in enumerate(options))
        sizes = [self.num_heads, self.num_kv_heads, self.width]
        epsilons = [norm.epsilon if norm else 0.0 for norm in self.norms.values()]
        return [has, *sizes, window or 0, rotation, self.activation], [self.scaling, *epsilons]


class InPlaceHead(Head):
    """Final norm and head in one call of the operator."""

    norm: RMSNorm

    def __call__(self, hidden: Tensor) -> Tensor:
        return project(hidden, self.product, self.norm)


class InPlaceParts(Parts):
    """Plain layers and a plain head are the operator's. A model in 16 bits is so as a whole or not at all:
    layers of transformers would compute in 16 bits.
    """

    def replace(self, model: PreTrainedModel) -> None:
        if cpu_operators().variant is None or model.dtype == torch.float64:
            return
        base, head = model.base_model, model.get_output_embeddings()
        layers = [layer for layer in base.layers if difference(model, layer) is None]
        has_plain_head = difference(model, base.norm, head) is None
        if model.dtype.itemsize == 2:
            embed = base.embed_tokens  # `ModelRunner.embed` scales by itself
            is_as_built = not hasattr(embed, "scalar_embed_scale") or difference(model, embed) is None
            if not (len(layers) == len(base.layers) and has_plain_head and is_as_built):
                return
            self.dtype = torch.float32
        for weight in model.parameters():
            if weight.stride()[-1:] > (1,):  # it lies transposed
                weight.data = weight.data.contiguous()
        self.own = {layer: InPlaceLayer(layer) for layer in layers}
        if has_plain_head:
            self.own[head] = InPlaceHead(RMSNorm(base.norm), head)


class _Group(NamedTuple):
    """Consecutive layers of one shape, as the operator has them."""

    first: int  # layer of the runner
    layers: Sequence[InPlaceLayer]
    owner: Tensor  # of what the operator knows of them
    rotations: list[str | None]


class InPlaceRunner(ModelRunner):
    """Runs plain layers by the operator, and others one by one."""

    parts_kind = InPlaceParts

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._groups = dict[tuple[int, int], list[_Group]]()

    @property
    def is_in_place(self) -> bool:
        """Whether the operator has all layers."""
        return all(isinstance(layer, InPlaceLayer) for layer in self.layers)

    def with_layers(self, layers: Sequence[Layer], head: Head) -> ModelRunner:
        other: Any = super().with_layers(layers, head)
        other._groups = {}
        return other

    def run_layers(self, cache: KVCache, hidden: Tensor, first: int, last: int) -> Tensor:
        if (first, last) not in self._groups:  # the operator sees that a parameter has other memory
            self._groups[first, last] = [*self._grouped(first, last)]
        for group in self._groups[first, last]:
            hidden = super().run_layers(cache, hidden, first, group.first)
            hidden = self._run_group(cache, hidden, group)
            first = group.first + len(group.layers)
        return super().run_layers(cache, hidden, first, last)

    def _run_group(self, cache: KVCache, hidden: Tensor, group: _Group) -> Tensor:
        rows, width, size = hidden.shape
        if width > (most := max(1, _PIECE // rows)):
            pieces = hidden.tensor_split(-(-width // most), 1)  # of nearly equal size
            return torch.cat([self._run_group(cache, piece, group) for piece in pieces], 1)
        states, layer = hidden.reshape(rows * width, size).contiguous(), group.layers[0]
        lengths = cache.lengths(layer.index)
        num_positions = max(lengths) + width
        torch.ops.self_speculation.run_layers.default(
            states,
            torch.tensor(lengths),
            cache.first_slot,
            cache.is_prompt,
            group.owner,
            cache.extend(layer.index, layer.index + len(group.layers), width),
            [self.tables.cos_sin(rotation, num_positions) for rotation in group.rotations],
        )
        return states.view(rows, width, size)

    def _grouped(self, first: int, last: int) -> Iterator[_Group]:
        """Layers first..last-1 that the operator has."""
        numbers = [n for n in range(first, last) if isinstance(self.layers[n], InPlaceLayer)]

        def key(number: int) -> Hashable:
            layer: Any = self.layers[number]
            shape = layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.width
            # The cache has the keys of a layer by its own index.
            return number - numbers.index(number), number - layer.index, shape

        for _, group in itertools.groupby(numbers, key):
            yield self._make_group(*group)

    def _make_group(self, *numbers: int) -> _Group:
        layers: Any = [self.layers[number] for number in numbers]
        kinds = [self.attention_types[number] for number in numbers]
        rotations = [*dict.fromkeys(kind.rotation for kind in kinds)]
        told = [
            layer.description(kind.window, rotations.index(kind.rotation))
            for layer, kind in zip(layers, kinds, strict=True)
        ]
        of_layers, factors = zip(*told, strict=True)
        owner = torch.ops.self_speculation.make_layers.default(
            torch.tensor(of_layers),
            torch.tensor(factors, dtype=torch.float64),
            [tensor for layer in layers for tensor in layer.tensors()],
            self.config.hidden_size,
            layers[0].head_dim,
        )
        return _Group(numbers[0], layers, owner, rotations)
