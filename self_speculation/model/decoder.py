"""Runs a range of the layers of a transformers decoder, over a cache of ours.

Knows nothing of tokens' meaning, sampling or strategies. Everything above sees token ids go in, and logits
and exit hidden states come out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from self_speculation.model.families import check_supported, context_length
from self_speculation.model.kv_cache import Appendable, KVCache
from self_speculation.model.lean_layers import NARROW, lean_head, lean_layer
from self_speculation.model.prepared import prepared

# Positions beyond the prompt that the cache starts with, where the generation may become longer than that.
_FIRST_ALLOCATION = 1024

# Prompts run through the layers in pieces of so many positions.
PREFILL_CHUNK = 1024


@dataclass(frozen=True)
class ForwardResult:
    logits: Tensor  # [1, n, V] for the n positions asked for; empty when n is 0
    hidden: Tensor  # [1, T, H] after the last layer that ran, before the norm: the exit query


class PlainLayer:
    """A decoder layer of transformers, called as a lean one is."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer

    def __call__(self, hidden: Tensor, span: Span | StaticSpan, cache: Appendable) -> Tensor:
        mask = span.mask  # [T, S]
        return self._layer(
            hidden[None],
            attention_mask=None if mask is None else mask[None, None],
            position_embeddings=span.rotary,
            cache=cache,
            use_cache=True,
        )[0]


class Span:
    """The T positions from `start` on that a pass adds, as its layers ask for them; made when asked for."""

    def __init__(self, decoder: Decoder, start: int, width: int) -> None:
        self._decoder, self._start, self._width = decoder, start, width

    @cached_property
    def rotary(self) -> tuple[Tensor, Tensor]:
        """cos and sin, [1, T, head_dim]."""
        cos, sin = self._decoder.rotary.narrow(1, self._start, self._width).split(1)
        return cos, sin

    def rotate(self, heads: Tensor) -> Tensor:
        """[T, n, head_dim] of queries or keys, each turned by the angles of its position."""
        if self._width > NARROW:
            return _rotated(heads, *self.rotary)
        return torch.bmm(heads, self._rotations)

    @cached_property
    def _rotations(self) -> Tensor:
        """[T, head_dim, head_dim]: a product with these is one kernel, `_rotated` takes half a dozen."""
        cos, sin = (table.transpose(0, 1) for table in self.rotary)  # [T, 1, head_dim]
        return torch.addcmul(self._decoder.unit * cos, self._decoder.half_turn, sin)

    @cached_property
    def mask(self) -> Tensor | None:
        """[T, start + T], added to the scores; None where none is needed."""
        return self._masked(1)

    @cached_property
    def grouped_mask(self) -> Tensor | None:
        """[G * T, start + T] for the queries of G heads that share their keys, head by head."""
        return self._masked(self._decoder.groups)

    def _masked(self, groups: int) -> Tensor | None:
        # A single position sees everything; how to mask a prompt's first pass sdpa knows by itself.
        if self._width == 1 or (self._start == 0 and not self._decoder.is_eager):
            return None
        end = self._start + self._width
        # Attention kernels want rows at multiples of 16 bytes, or copy the mask in every layer.
        shape = (self._width, round_up(end, 8))
        mask = self._decoder.lowest.expand(shape).triu(self._start + 1)
        return (mask if groups == 1 else mask.repeat(groups, 1))[:, :end]


class StaticSpan:
    """As `Span`, of positions [T] that are data, over all `capacity` positions of the cache."""

    def __init__(self, decoder: Decoder, positions: Tensor, capacity: int) -> None:
        self.rotary = decoder.rotary.index_select(1, positions).split(1)  # [1, T, head_dim] each
        later = torch.arange(capacity, device=positions.device) > positions[:, None]
        self.mask = later.to(decoder.rotary.dtype) * torch.finfo(decoder.rotary.dtype).min  # [T, capacity]
        self.grouped_mask = self.mask.repeat(decoder.groups, 1)

    def rotate(self, heads: Tensor) -> Tensor:
        """See `Span`; the compiler makes one kernel of it."""
        return _rotated(heads, *self.rotary)


def round_up(number: int, step: int) -> int:
    """To the next multiple."""
    return -(-number // step) * step


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[T, n, head_dim] heads, [1, T, head_dim] tables."""
    first, second = heads.chunk(2, -1)
    return heads * cos.transpose(0, 1) + torch.cat((-second, first), -1) * sin.transpose(0, 1)


class Decoder:
    """One model over one generation's cache: embeds, runs layers [first:last], applies norm and head.

    Rotary tables are made once and sliced by position ever after.

    Args:
        model: a `...ForCausalLM` of a supported type; what `fuse` has made of its layers is used.
        prompt_length: positions that come first.
        num_positions: the most positions that the generation can reach.
    """

    def __init__(self, model: PreTrainedModel, prompt_length: int, num_positions: int) -> None:
        check_supported(model.config)
        self.config = model.config
        base, head = model.base_model, model.get_output_embeddings()
        self.prepared = prepared(model)
        self.layers = [lean_layer(model, layer) or PlainLayer(layer) for layer in base.layers]
        self.cache = KVCache(len(self.layers), capacity=min(num_positions, prompt_length + _FIRST_ALLOCATION))
        self._embed = base.embed_tokens
        self.head = lean_head(model) or (lambda hidden: head(base.norm(hidden[None]))[0])
        self.groups = model.config.num_attention_heads // model.config.num_key_value_heads
        self.is_eager = model.config._attn_implementation == "eager"

        weight = self._embed.weight
        positions = torch.arange(num_positions, device=weight.device)[None]
        rotary = base.rotary_emb(weight, position_ids=positions.clamp_(max=context_length(self.config) - 1))
        self.rotary = torch.cat(rotary)  # [2, num_positions, head_dim]
        # x @ unit is x, and x @ half_turn its second half, negative, followed by its first.
        head_dim = self.rotary.shape[2]
        self.unit = torch.eye(head_dim, dtype=weight.dtype, device=weight.device)
        self.half_turn = self.unit.roll(head_dim // 2, 1)
        self.half_turn[:, : head_dim // 2].neg_()
        # Not of the weight's own kind, which may be spread over several processes.
        self.lowest = torch.full((), torch.finfo(weight.dtype).min, dtype=weight.dtype, device=weight.device)

    def over(self, layers: list[Any], head: Callable[[Tensor], Tensor]) -> Decoder:
        """Other layers and another head ([T, H] -> [T, V], with its norm) over the same cache."""
        other = copy.copy(self)
        other.layers, other.head = layers, head
        return other

    def run(self, inputs: Tensor, first: int, last: int, num_logits: int) -> ForwardResult:
        """Layers first..last-1 over T new positions, norm and head for the last `num_logits` of them.

        Args:
            inputs: [1, T] ids where `first` is 0, else [1, T, H] the input of layer `first`.
        """
        hidden = self.run_layers(inputs.clone() if first else self.embed(inputs), first, last)
        return ForwardResult(self.logits(hidden, num_logits), hidden)

    def embed(self, input_ids: Tensor) -> Tensor:
        """[1, T] ids -> [1, T, H]"""
        return self._embed(input_ids)

    def run_layers(self, hidden: Tensor, first: int, last: int) -> Tensor:
        """Run layers first..last-1 on T new positions after those that layer `first` has seen.

        Args:
            hidden: [1, T, H] the input of layer `first`. It is used up: lean layers add to it in place.

        Returns:
            [1, T, H] the output of layer `last - 1`; the keys and values are in the cache.
        """
        span = Span(self, self.cache.length(first), hidden.shape[1])
        states = hidden[0]  # [T, H]
        for layer in self.layers[first:last]:
            states = layer(states, span, self.cache)
        return states[None]

    def logits(self, hidden: Tensor, num_positions: int) -> Tensor:
        """[1, T, H] -> [1, n, V] for the last n positions; the head runs for no others."""
        if num_positions == 0:
            return hidden.new_empty(1, 0, 0)
        # With layers on several devices, everything but the layers is where the embedding is.
        return self.head(hidden[0, -num_positions:])[None].to(self.rotary.device)


def prefill(decoder: Decoder, input_ids: Tensor, exit_layer: int) -> ForwardResult:
    """Layers 0..exit_layer-1 over a prompt [1, P], with logits for its last position.

    It goes through in pieces of PREFILL_CHUNK positions: a long one needs no more memory than one of those.
    """
    *chunks, last = input_ids.split(PREFILL_CHUNK, dim=1)
    for chunk in chunks:
        forward_early(decoder, chunk, exit_layer, num_logits=0)
    return forward_early(decoder, last, exit_layer)


def forward(decoder: Decoder, input_ids: Tensor, num_logits: int = 1) -> ForwardResult:
    """All layers over T new tokens [1, T]; logits for the last `num_logits` of them."""
    return forward_early(decoder, input_ids, len(decoder.layers), num_logits)


def forward_early(decoder: Decoder, input_ids: Tensor, exit_layer: int, num_logits: int = 1) -> ForwardResult:
    """Layers 0..exit_layer-1 over T new tokens [1, T]; norm and head for the last `num_logits` of them."""
    return decoder.run(input_ids, 0, exit_layer, num_logits)


def forward_exits(
    decoder: Decoder, input_ids: Tensor, exit_layers: Iterable[int], num_logits: int
) -> Iterator[tuple[int, Tensor]]:
    """(exit layer, logits [1, n, V] of the last n tokens) of each exit, in one pass over [1, T] tokens."""
    hidden, done = decoder.embed(input_ids), 0
    for exit_layer in sorted(exit_layers):
        hidden, done = decoder.run_layers(hidden, done, exit_layer), exit_layer
        yield exit_layer, decoder.logits(hidden, num_logits)


def forward_remainder(decoder: Decoder, exit_hidden: Tensor, exit_layer: int) -> ForwardResult:
    """Layers exit_layer..L-1 over the exit hidden states [1, T, H] of T tokens; logits for all of them."""
    return decoder.run(exit_hidden, exit_layer, len(decoder.layers), exit_hidden.shape[1])
