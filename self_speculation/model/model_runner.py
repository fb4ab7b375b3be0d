"""Runs ranges of a transformers model's layers over a KV cache: ids or hidden states in, logits and hidden
states out.

A runner has weights and kernels. The cache is an argument. Knows nothing of sampling or strategies.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from transformers import PreTrainedModel

from self_speculation.model.attention import attention_kernel, disable_cudnn_attention
from self_speculation.model.attention_context import AttentionContext, cos_and_sin
from self_speculation.model.devices import num_ranks
from self_speculation.model.families import AttentionType, attention_types, check_supported, context_length
from self_speculation.model.fingerprint import fingerprint, structure
from self_speculation.model.fused_layers import fused_model, num_changes, prefills_in_bfloat16
from self_speculation.model.kv_cache import Appendable, Buffers, KVCache
from self_speculation.model.linear import MIN_BFLOAT16_PREFILL
from self_speculation.model.model_cache import lock

# Most positions of one pass over a prompt: they bound its memory. In bfloat16, a pass converts all weights.
PREFILL_CHUNK = 1024
_BFLOAT16_CHUNK = 2048


def prefill_chunk(model: PreTrainedModel) -> int:
    """Most positions of one pass over a prompt."""
    return _BFLOAT16_CHUNK if prefills_in_bfloat16(model) else PREFILL_CHUNK


@dataclass(frozen=True)
class ForwardResult:
    logits: Tensor  # [B, n, V] for the n positions asked for; empty when n is 0
    hidden: Tensor  # [B, T, H] after the last layer that ran, before the norm; after [:E] the exit states


class PlainLayer:
    """A decoder layer of transformers with the interface of `FusedLayer`."""

    def __init__(self, layer: nn.Module) -> None:
        self.module = layer

    def __call__(self, hidden: Tensor, context: AttentionContext, cache: Appendable) -> Tensor:
        mask = context.mask()
        return self.module(
            hidden.view(context.rows, context.width, -1),
            attention_mask=mask[None, None] if mask is not None and mask.dim() == 2 else mask,
            position_embeddings=context.rotary,
            cache=cache,
            use_cache=True,
        ).flatten(0, 1)


class PlainHead:
    """Final norm and head of transformers with the interface of `FusedHead`."""

    def __init__(self, norm: nn.Module, head: nn.Module) -> None:
        self.modules = norm, head

    def __call__(self, hidden: Tensor) -> Tensor:
        norm, head = self.modules
        return head(norm(hidden[None]))[0]

    def norm(self, hidden: Tensor) -> Tensor:
        return self.modules[0](hidden[None])[0]


class _Rotary:
    """Tables of cos and sin by kind of rotation."""

    def __init__(self, module: nn.Module, rotations: set[str | None], like: Tensor, context: int) -> None:
        self.module, self.like, self._context = module, like, context
        self.tables = dict.fromkeys(rotations, like.new_empty(2, 0, 0))  # [2, positions, head_dim] each
        self._size = 0
        self.reserve(1)

    def reserve(self, num_positions: int) -> None:
        """Have tables of at least so many positions."""
        if num_positions > self._size:
            # Twice as many, so that a longer and longer text rarely grows them. Only padding is beyond the
            # context.
            size = max(num_positions, min(2 * num_positions, self._context))
            positions = torch.arange(size, device=self.like.device)[None].clamp_(max=self._context - 1)
            with lock(self.module):  # some kinds of rotation change their module for longer positions
                tables = {
                    rotation: torch.cat(cos_and_sin(self.module, self.like, positions, rotation))
                    for rotation in self.tables
                }
            self.tables, self._size = tables, size  # once there was memory for all of them


class ModelRunner:
    """Embeds, runs layers [first:last] over a KV cache, applies norm and head. Valid until weights change.

    Args:
        model: a `...ForCausalLM` of a supported type, fused or not.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        check_supported(model.config)
        self.model, self.config = model, model.config
        base, head = model.base_model, model.get_output_embeddings()
        fused, self.dtype = fused_model(model)
        self._num_changes = num_changes(model)
        self.layers: list[Any] = [fused.get(layer) or PlainLayer(layer) for layer in base.layers]
        self.attention_types = attention_types(self.config)  # [L]
        self._prefills_in_bfloat16 = prefills_in_bfloat16(model)
        self._devices = [next(layer.parameters()).device for layer in base.layers]
        self._embed = base.embed_tokens
        self.head: Any = fused.get(head) or PlainHead(base.norm, head)

        like = torch.empty(0, dtype=self.dtype, device=self._embed.weight.device)
        rotations = {kind.rotation for kind in self.attention_types}
        self._rotary = _Rotary(base.rotary_emb, rotations, like, context_length(self.config))
        head_dim = self.rotary.shape[2]
        self.kernel = attention_kernel(like.device, self.dtype, head_dim)  # of fused layers
        if like.device.type == "cuda" and any(isinstance(layer, PlainLayer) for layer in self.layers):
            disable_cudnn_attention()
        # To rotate in one product: x @ unit is x, x @ rotate_half is transformers' `rotate_half(x)`.
        self.unit = torch.eye(head_dim, dtype=self.dtype, device=like.device)
        self.rotate_half = self.unit.roll(head_dim // 2, 1)
        self.rotate_half[:, : head_dim // 2].neg_()
        self.lowest = torch.full((), torch.finfo(self.dtype).min, dtype=self.dtype, device=like.device)

    @property
    def fingerprint(self) -> Hashable:
        """Changes with the structure of all modules and the contents of the rotary embedding: captured passes
        are valid while it is the same.
        """
        plain = [layer.module for layer in self.layers if isinstance(layer, PlainLayer)]
        rotary = fingerprint(self._rotary.module)
        return self._num_changes, structure(*plain), rotary, tuple(self.attention_types)

    @property
    def rotary(self) -> Tensor:
        """[2, positions, head_dim] cos and sin of the first layer; others' have its shape and device."""
        return self._rotary.tables[self.attention_types[0].rotation]

    def rotary_of(self, kind: AttentionType, num_positions: int) -> Tensor:
        """[2, at least so many positions, head_dim] cos and sin of layers of this kind."""
        self._rotary.reserve(num_positions)
        return self._rotary.tables[kind.rotation]

    def new_cache(self, prompt_length: int, num_positions: int, num_slots: int = 1) -> KVCache:
        """A cache of one empty row for all layers.

        Args:
            prompt_length, num_positions: see `KVCache.reserve`.
            num_slots: the most rows at a time.
        """
        number = len(self.layers)
        cache = KVCache(Buffers(number, num_slots, self._devices[:number], num_ranks(self.model)))
        cache.reserve(prompt_length, num_positions)
        return cache

    def with_layers(self, layers: list[Any], head: Callable[[Tensor], Tensor]) -> ModelRunner:
        """A runner of other layers and another head ([T, H] -> [T, V], norm included)."""
        other = copy.copy(self)
        other.layers, other.head = layers, head
        return other

    def run(self, cache: KVCache, inputs: Tensor, first: int, last: int, num_logits: int) -> ForwardResult:
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
        takes_keys: Appendable = cache
        kinds, shortest = self.attention_types[first:last], cache.shortest(first)
        if cache.is_uniform:
            contexts = {
                kind: AttentionContext.uniform(self, kind, rows, shortest, width) for kind in set(kinds)
            }
        else:
            positions = cache.positions(first, width, self.rotary.device)
            scattered = takes_keys = cache.scattered(positions, first, last)
            contexts = {
                kind: AttentionContext.ragged(self, kind, positions, scattered.length, shortest)
                for kind in set(kinds)
            }
        states = hidden.flatten(0, 1)  # [B * T, H]
        in_bfloat16 = self._prefills_in_bfloat16 and cache.is_prompt and len(states) >= MIN_BFLOAT16_PREFILL
        for layer, kind in zip(self.layers[first:last], kinds, strict=True):
            layer = layer.in_bfloat16() if in_bfloat16 else layer
            states = layer(states, context := contexts[kind], context.visible(takes_keys))
        return states.view(rows, width, -1)

    def logits(self, hidden: Tensor, num_logits: int) -> Tensor:
        """[B, T, H] -> [B, n, V] for the last n positions."""
        rows = hidden.shape[0]
        if num_logits == 0:
            return hidden.new_empty(rows, 0, 0)
        states = hidden[:, -num_logits:].flatten(0, 1)
        # The head may be elsewhere; callers expect the embedding's device.
        return self.head(states).view(rows, num_logits, -1).to(self.rotary.device)


class PassRange(NamedTuple):
    """Passes over 1 to `max_width` tokens of each row."""

    runner: ModelRunner
    first: int  # layer
    last: int  # the layer after the last one
    max_width: int = 1


def forward(runner: ModelRunner, cache: KVCache, input_ids: Tensor, num_logits: int = 1) -> ForwardResult:
    """All layers over T new tokens [B, T]; logits for the last `num_logits` of them."""
    return forward_early(runner, cache, input_ids, len(runner.layers), num_logits)


def forward_early(
    runner: ModelRunner, cache: KVCache, input_ids: Tensor, exit_layer: int, num_logits: int = 1
) -> ForwardResult:
    """Layers 0..exit_layer-1 over T new tokens [B, T]; logits for the last `num_logits` of them."""
    return runner.run(cache, input_ids, 0, exit_layer, num_logits)


def forward_remainder(
    runner: ModelRunner, cache: KVCache, exit_hidden: Tensor, exit_layer: int
) -> ForwardResult:
    """Layers exit_layer..L-1 over the exit hidden states [B, T, H] of T tokens; logits for all of them."""
    return runner.run(cache, exit_hidden.clone(), exit_layer, len(runner.layers), exit_hidden.shape[1])
