"""Runs ranges of a transformers model's layers over a KV cache: ids or hidden states in, logits and hidden
states out.

A runner has weights and kernels. The cache is an argument. Knows nothing of sampling or strategies.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from self_speculation.backends.buffers import Buffers
from self_speculation.backends.kv_cache import KVCache
from self_speculation.backends.layers import FusedWeights, Head, Layer, PlainHead, PlainLayer
from self_speculation.backends.torch_attention import AttentionContext, RotaryTables
from self_speculation.config import CacheDtypeName
from self_speculation.machine.transfers import on_device
from self_speculation.models.families import (
    AttentionType,
    attention_types,
    check_supported,
    context_length,
    key_shape,
)

# Most positions of one pass over a prompt: they bound the memory of the pass.
PREFILL_CHUNK = 1024


@dataclass(frozen=True)
class ForwardResult:
    logits: Tensor  # [B, n, V] for the n positions asked for; empty when n is 0
    hidden: Tensor  # [B, T, H] after the last layer that ran, before the norm; after [:E] the exit states


class ModelRunner:
    """Embeds, runs a range of layers over a KV cache, applies norm and head. Valid until weights change.

    This one computes by torch and transformers; see `InPlaceRunner` for a CPU, `FusedRunner` for a GPU.

    Args:
        model: a `...ForCausalLM` of a supported type.
        fused_weights: what is made of the model; None: what this kind of runner makes.

    Attributes:
        dtype: of activations and logits.
        device: of ids and logits.
        devices: [L] of each layer.
        is_ragged: passes compute no padding.
        key_shape: kv_heads and head_dim.
        layers_key: equal for runners with the same layers and head; None: the model's.
    """

    weights_kind: type[FusedWeights] = FusedWeights
    layers_key: Hashable = None
    is_ragged = False

    def __init__(self, model: PreTrainedModel, fused_weights: FusedWeights | None = None) -> None:
        check_supported(model.config)
        self.model = model
        self.config = model.config
        self.fused_weights = fused_weights or self.weights_kind.of(model)
        self.dtype = self.fused_weights.dtype
        base = model.base_model
        head = model.get_output_embeddings()
        replaced = self.fused_weights.replaced
        self.layers: Sequence[Layer] = [replaced.get(layer) or PlainLayer(layer) for layer in base.layers]
        self.head: Head = replaced.get(head) or PlainHead(base.norm, head)
        self.attention_types = attention_types(self.config)  # [L]
        self._embed = base.embed_tokens
        self.tables = RotaryTables(model, self.dtype)
        self.device = self.tables.device
        self.key_shape = key_shape(self.config)
        devices = (next(layer.parameters()).device for layer in base.layers)
        # Offloaded layers, on "meta", run where the first ones do.
        self.devices = [self.device if device.type == "meta" else device for device in devices]

    def cache_dtype(self, name: CacheDtypeName) -> torch.dtype:
        """The dtype of keys and values. Raises ValueError for one that this device does not have."""
        dtype = self.dtype if name == "auto" else getattr(torch, name)
        if self.device.type != "cpu" and dtype != self.dtype:
            has = str(self.dtype).removeprefix("torch.")
            raise ValueError(f"cache_dtype {name}: on {self.device.type} it is auto, which is {has} here")
        return dtype

    def new_cache(
        self,
        prompt_length: int,
        num_positions: int,
        num_slots: int = 1,
        dtype: CacheDtypeName = "auto",
    ) -> KVCache:
        """A cache of one empty row for all layers.

        Args:
            prompt_length, num_positions: see `KVCache.reserve`.
            num_slots: the most rows at a time.
            dtype: see `cache_dtype`, and its errors.
        """
        devices = self.devices[: len(self.layers)]
        num_prefix_slots = num_slots // 2 if self.is_ragged else 0
        longest = context_length(self.config) + PREFILL_CHUNK  # a draft may end beyond the context
        of_keys = self.key_shape, self.cache_dtype(dtype)
        buffers = Buffers(devices, *of_keys, num_slots, num_prefix_slots, longest)
        cache = KVCache(buffers)
        cache.reserve(prompt_length, num_positions)
        return cache

    def with_layers(self, layers: Sequence[Layer], head: Head) -> ModelRunner:
        """A runner of the same kind with other layers and another head."""
        other = copy.copy(self)
        other.layers = layers
        other.head = head
        other.layers_key = object()
        return other

    def embed(self, input_ids: Tensor) -> Tensor:
        """[...] ids -> [..., H]"""
        scale = getattr(self._embed, "scalar_embed_scale", None)
        if scale is None or self._embed.weight.dtype in (self.dtype, torch.uint8):
            return self._embed(input_ids).to(self.dtype)
        return embedding(input_ids, self._embed.weight).to(self.dtype) * scale  # not rounded to 16 bits

    def run(
        self,
        cache: KVCache,
        inputs: Tensor,
        start_layer: int = 0,
        end_layer: int | None = None,
        num_logits: int = 1,
    ) -> ForwardResult:
        """Layers [start_layer:end_layer] over T new tokens; logits for the last `num_logits` of them.

        Args:
            inputs: [B, T] ids where `start_layer` is 0, else [B, T, H] states; not changed.
            end_layer: None: all layers from `start_layer` on.

        Raises:
            ValueError: the cache is another model's. The operators would write beyond such a cache.
        """
        buffers = cache.buffers
        has_dtype = buffers.dtype == self.dtype or (self.device.type == "cpu" and buffers.dtype.itemsize <= 4)
        if not has_dtype or buffers.key_shape != self.key_shape:
            what = f"keys {buffers.key_shape} in {buffers.dtype}, the runner {self.key_shape} in {self.dtype}"
            raise ValueError(f"cache: has {what}; take one of runner.new_cache")
        rows, width = inputs.shape[:2]
        hidden = inputs.to(self.dtype, copy=True) if start_layer else self.embed(inputs)
        end_layer = len(self.layers) if end_layer is None else end_layer
        hidden = self.run_layers(cache, hidden.flatten(0, 1), [width] * rows, start_layer, end_layer)
        hidden = hidden.view(rows, width, -1)
        if num_logits == 0:
            return ForwardResult(hidden.new_empty(rows, 0, 0), hidden)
        logits = self.logits(hidden[:, -num_logits:].flatten(0, 1))
        return ForwardResult(logits.view(rows, num_logits, -1), hidden)

    def run_layers(
        self, cache: KVCache, hidden: Tensor, query_lengths: Sequence[int], start_layer: int, end_layer: int
    ) -> Tensor:
        """Layers [start_layer:end_layer] over N new tokens.

        This one computes a rectangle, as long as the row with the most tokens. Padding is zeros, which are
        finite: masks do not stop NaN.

        Args:
            hidden: [N, H] input states, row by row; may be overwritten.
            query_lengths: [B] new tokens of each row, N together.

        Returns:
            [N, H] states after the last of these layers.
        """
        if start_layer == end_layer:
            return hidden
        if min(query_lengths) == max(query_lengths):
            states = self.run_rectangle(
                cache, hidden.view(len(query_lengths), -1, hidden.shape[1]), start_layer, end_layer
            )
            states = states.flatten(0, 1)
        else:
            padded = pad_sequence(hidden.split([*query_lengths]), batch_first=True)
            states = self.run_rectangle(cache, padded, start_layer, end_layer)
            states = torch.cat([row[:width] for row, width in zip(states, query_lengths, strict=True)])
        cache.extend(start_layer, end_layer, query_lengths)
        return states

    def run_rectangle(self, cache: KVCache, hidden: Tensor, start_layer: int, end_layer: int) -> Tensor:
        """Layers [start_layer:end_layer], [B, T, H] -> [B, T, H]; writes the next T positions of each row."""
        make = partial(AttentionContext, self.tables, cache, start_layer, hidden.shape[1])
        return run_through(self.typed_layers(start_layer, end_layer), make, hidden)

    def typed_layers(self, start_layer: int, end_layer: int) -> list[tuple[Any, AttentionType]]:
        """Layers [start_layer:end_layer] and their types."""
        return [*zip(self.layers, self.attention_types, strict=False)][start_layer:end_layer]

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, H] -> [N, V], by norm and head."""
        return self.head(hidden).to(self.device)  # the head may be elsewhere


def run_through(
    layers: Sequence[tuple[Any, AttentionType]],
    make: Callable[[AttentionType], Any],  # the context that the layers take
    hidden: Tensor,
) -> Tensor:
    """[B, T, H] through layers. Layers of one type share a context."""
    contexts = {kind: make(kind) for kind in {kind for _, kind in layers}}
    states = hidden.flatten(0, 1)
    for layer, kind in layers:
        states = layer(states, contexts[kind])
    return states.view_as(hidden)


def prefill(
    runner: ModelRunner, cache: KVCache, chunks: Sequence[list[int]], end_layer: int, ended: Sequence[int]
) -> Tensor:
    """Run layers [:end_layer] over the next tokens of each row's prompt, in one pass.

    Args:
        chunks: [B] the ids of these tokens.
        ended: the n rows whose prompts end with them.

    Returns:
        [n, V] logits after the last tokens of these rows; if there are none, an empty tensor.
    """
    hidden = runner.embed(on_device([id_ for piece in chunks for id_ in piece], runner.device))
    hidden = runner.run_layers(cache, hidden, [*map(len, chunks)], 0, end_layer)
    ends = [*accumulate(map(len, chunks))]
    finals = [hidden[ends[row] - 1] for row in ended]  # of each, [H]
    return runner.logits(torch.stack(finals)) if finals else hidden[:0]
