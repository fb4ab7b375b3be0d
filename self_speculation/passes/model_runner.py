"""Runs ranges of a transformers model's layers over a KV cache: ids or hidden states in, logits and hidden
states out.

A runner has weights and kernels. The cache is an argument. Knows nothing of sampling or strategies.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import PreTrainedModel

from self_speculation.config import check_kind
from self_speculation.devices import round_up
from self_speculation.families import AttentionType, attention_types, check_supported
from self_speculation.passes.attention_context import AttentionContext, AttentionTables
from self_speculation.passes.decode_attention import DecodeContext, why_no_kernels
from self_speculation.passes.fused_layers import FusedLayer, parts_of
from self_speculation.passes.kv_cache import ALIGNMENT, Buffers, KVCache, ScatteredCache
from self_speculation.weights.linear import Product

# Most positions of one pass over a prompt: they bound its memory.
PREFILL_CHUNK = 1024


@dataclass(frozen=True)
class ForwardResult:
    logits: Tensor  # [B, n, V] for the n positions asked for; empty when n is 0
    hidden: Tensor  # [B, T, H] after the last layer that ran, before the norm; after [:E] the exit states


class Layer(Protocol):
    """A decoder layer."""

    @property
    def linears(self) -> Sequence[Product]:
        """Its products; of a layer of transformers, none are known."""

    def __call__(self, hidden: Tensor, context: AttentionContext) -> Tensor:
        """[B * T, H] -> [B * T, H], maybe in place; appends keys and values to the cache of the pass."""


class Head(Protocol):
    """Final norm and head."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """[T, H] -> [T, V]"""

    @property
    def norm(self) -> Callable[[Tensor], Tensor]:
        """[T, H] -> [T, H]"""


class PlainLayer:
    """A decoder layer of transformers.

    Args:
        linears: see `Layer`; of a copy, those in its layer.
    """

    def __init__(self, layer: nn.Module, linears: tuple[Product, ...] = ()) -> None:
        self.module, self.linears = layer, linears

    def __call__(self, hidden: Tensor, context: AttentionContext) -> Tensor:
        return self.module(
            hidden.view(context.rows, context.width, -1),
            attention_mask=context.mask(1),
            position_embeddings=context.rotary,
            cache=context,  # for its `update`
            use_cache=True,
        ).flatten(0, 1)


class PlainHead:
    """Final norm and head of transformers."""

    def __init__(self, norm: nn.Module, head: nn.Module) -> None:
        self.modules = norm, head

    def __call__(self, hidden: Tensor) -> Tensor:
        norm, head = self.modules
        return head(norm(hidden[None]))[0]

    def norm(self, hidden: Tensor) -> Tensor:
        return self.modules[0](hidden[None])[0]


class ModelRunner:
    """Embeds, runs layers [first:last] over a KV cache, applies norm and head. Valid until weights change.

    Args:
        model: a `...ForCausalLM` of a supported type, fused or not.

    Attributes:
        parts: what is made of the model's weights; the runner is valid while the model has it.
        key_shape: [kv_heads, head_dim]
        why_no_kernels: see `decode_attention.why_no_kernels`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        check_supported(model.config)
        self.model, self.config = model, model.config
        base, head = model.base_model, model.get_output_embeddings()
        parts = parts_of(model)
        fused: Mapping[nn.Module, Any] = parts.fused
        self.parts, self.dtype = ref(parts), parts.dtype
        self.layers: Sequence[Layer] = [fused.get(layer) or PlainLayer(layer) for layer in base.layers]
        self.attention_types = attention_types(self.config)  # [L]
        self._devices = [next(layer.parameters()).device for layer in base.layers]
        self._embed = base.embed_tokens
        self.head: Head = fused.get(head) or PlainHead(base.norm, head)
        self.tables = AttentionTables(model, self.dtype)
        self.device = self.tables.device  # of ids and logits
        head_dim = getattr(self.config, "head_dim", None)
        head_dim = head_dim or self.config.hidden_size // self.config.num_attention_heads
        self.key_shape = self.config.num_key_value_heads, head_dim
        if len({*self._devices, self.device}) > 1:
            self.why_no_kernels: str | None = "the model is on several devices"
        elif not any(isinstance(layer, FusedLayer) for layer in self.layers):
            self.why_no_kernels = "its layers are not fused"
        else:
            self.why_no_kernels = why_no_kernels(self.device, self.dtype, head_dim)
        if self.device.type == "cuda" and any(isinstance(layer, PlainLayer) for layer in self.layers):
            # In this process: these layers call `scaled_dot_product_attention` themselves.
            torch.backends.cuda.enable_cudnn_sdp(False)

    def new_cache(self, prompt_length: int, num_positions: int, num_slots: int = 1) -> KVCache:
        """A cache of one empty row for all layers.

        Args:
            prompt_length, num_positions: see `KVCache.reserve`.
            num_slots: the most rows at a time.
        """
        devices = self._devices[: len(self.layers)]
        cache = KVCache(Buffers(devices, num_slots))
        cache.reserve(prompt_length, num_positions)
        return cache

    def with_layers(self, layers: Sequence[Layer], head: Head) -> ModelRunner:
        """A runner of the same kind with other layers and another head."""
        other = copy.copy(self)
        other._replace(layers, head)
        return other

    def _replace(self, layers: Sequence[Layer], head: Head) -> None:
        self.layers, self.head = layers, head

    def run(
        self,
        cache: KVCache,
        inputs: Tensor,
        first: int,
        last: int,
        num_logits: int,
    ) -> ForwardResult:
        """Layers first..last-1 over T new positions, norm and head over the last `num_logits` of them.

        Args:
            inputs: [B, T] ids if `first` is 0, else [B, T, H] the input of layer `first`, which fused layers
                overwrite.
        """
        hidden = self.run_layers(cache, inputs if first else self.embed(inputs), first, last)
        return ForwardResult(self.logits(hidden, num_logits), hidden)

    def embed(self, input_ids: Tensor) -> Tensor:
        """[B, T] ids -> [B, T, H]"""
        scale = getattr(self._embed, "scalar_embed_scale", None)
        if scale is None or self._embed.weight.dtype in (self.dtype, torch.uint8):
            return self._embed(input_ids).to(self.dtype)
        return embedding(input_ids, self._embed.weight).to(self.dtype) * scale  # not rounded to 16 bits

    def run_layers(self, cache: KVCache, hidden: Tensor, first: int, last: int) -> Tensor:
        """Layers first..last-1 over T new positions.

        Args:
            hidden: [B, T, H] the input of layer `first`. Fused layers overwrite it.

        Returns:
            [B, T, H] the output of layer `last - 1`.
        """
        rows, width, _ = hidden.shape
        kinds, lengths = self.attention_types[first:last], cache.lengths(first)
        layers, states = self.layers[first:last], hidden.flatten(0, 1)  # [B * T, H]
        if self.decodes_by_kernels(cache, layers):
            positions = cache.positions(first, width, self.device)
            cache.extend(first, last, width, states.new_empty(0, *self.key_shape))
            self.tables.reserve(max(lengths) + width)
            decode = partial(DecodeContext, self.tables, cache.buffers.of_layers, positions)
            return run_through([*zip(layers, kinds, strict=True)], decode, states).view(rows, width, -1)
        way: KVCache | ScatteredCache = cache
        if not cache.is_uniform:
            positions = cache.positions(first, width, self.device)
            cache.extend(first, last, width)
            num_keys = round_up(max(lengths) + width, ALIGNMENT)
            way = ScatteredCache(cache.buffers.of_layers, positions, num_keys)
        make = partial(AttentionContext, self.tables, way, min(lengths), width)
        return run_through([*zip(layers, kinds, strict=True)], make, states).view(rows, width, -1)

    def decodes_by_kernels(self, cache: KVCache, layers: Sequence[Layer]) -> bool:
        """Whether these layers decode by the kernels of a card. Prompts are read by torch's."""
        are_fused = all(isinstance(layer, FusedLayer) for layer in layers)
        return are_fused and not cache.is_prompt and self.why_no_kernels is None

    def capture(
        self, cache: KVCache, passes: Iterable[PassRange], num_rows: int, num_positions: int, longest: int
    ) -> None:
        """Capture these passes for up to so many rows, where passes are captured. The cache has room for
        `num_positions`, and for `longest` if memory has.
        """

    def logits(self, hidden: Tensor, num_logits: int) -> Tensor:
        """[B, T, H] -> [B, n, V] for the last n positions."""
        rows = hidden.shape[0]
        if num_logits == 0:
            return hidden.new_empty(rows, 0, 0)
        states = hidden[:, -num_logits:].flatten(0, 1)
        # The head may be elsewhere; callers expect the embedding's device.
        return self.head(states).view(rows, num_logits, -1).to(self.device)


def run_through(
    layers: Sequence[tuple[Layer, AttentionType]],
    make: Callable[[AttentionType], Any],  # the context that these layers take
    hidden: Tensor,
) -> Tensor:
    """[B * T, H] through layers; those of one kind share a context."""
    contexts = {kind: make(kind) for kind in {kind for _, kind in layers}}
    for layer, kind in layers:
        hidden = layer(hidden, contexts[kind])
    return hidden


class PassRange(NamedTuple):
    """Passes over 1 to `max_width` tokens of each row."""

    runner: ModelRunner
    first: int  # layer
    last: int  # the layer after the last one
    max_width: int = 1


def forward(runner: ModelRunner, cache: KVCache, input_ids: Tensor, num_logits: int = 1) -> ForwardResult:
    """All layers over T new tokens [B, T]; logits for the last `num_logits` of them."""
    _check_runner(runner)
    return forward_early(runner, cache, input_ids, len(runner.layers), num_logits)


def forward_early(
    runner: ModelRunner,
    cache: KVCache,
    input_ids: Tensor,
    exit_layer: int,
    num_logits: int = 1,
) -> ForwardResult:
    """Layers 0..exit_layer-1 over T new tokens [B, T]; logits for the last `num_logits` of them."""
    _check_runner(runner)
    return runner.run(cache, input_ids, 0, exit_layer, num_logits)


def forward_remainder(
    runner: ModelRunner, cache: KVCache, exit_hidden: Tensor, exit_layer: int
) -> ForwardResult:
    """Layers exit_layer..L-1 over the exit hidden states [B, T, H] of T tokens; logits for all of them."""
    _check_runner(runner)
    return runner.run(cache, exit_hidden.clone(), exit_layer, len(runner.layers), exit_hidden.shape[1])


def _check_runner(runner: ModelRunner) -> None:
    """Raises ValueError for a model, which these functions take in the paper's code."""
    check_kind("runner", runner, ModelRunner, ", as docs/moving.md shows")
