"""Runs a range of the layers of a transformers decoder, over a cache of ours.

Knows nothing of tokens' meaning, sampling or strategies. Everything above sees token ids go in, and logits
and exit hidden states come out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from self_speculation.model.devices import num_ranks
from self_speculation.model.families import check_supported, context_length
from self_speculation.model.fingerprint import fingerprint, structure
from self_speculation.model.kv_cache import ALIGNMENT, Appendable, KVCache, round_up
from self_speculation.model.lean_layers import lean_forms

# The cache starts with room for this many positions beyond the prompt, if the answer may be so long: of one
# row, or shared out among several.
_FIRST_ALLOCATION = 1024

# A prompt runs through the layers in pieces of this many positions.
PREFILL_CHUNK = 1024

# Up to this many tokens of a pass, queries and keys are rotated by one matrix product for each token.
_FEW_ROTATIONS = 64


@dataclass(frozen=True)
class ForwardResult:
    logits: Tensor  # [B, n, V] for the n positions asked for; empty when n is 0
    hidden: Tensor  # [B, T, H] after the last layer that ran, before the norm: the exit states


class PlainLayer:
    """A decoder layer of transformers, called as a lean one is."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer

    @property
    def structure(self) -> Hashable:
        return structure(self._layer)

    def __call__(self, hidden: Tensor, span: Span, cache: Appendable) -> Tensor:
        mask = span.mask
        return self._layer(
            hidden.view(span.rows, span.width, -1),
            attention_mask=mask[None, None] if mask is not None and mask.dim() == 2 else mask,
            position_embeddings=span.rotary,
            cache=cache,
            use_cache=True,
        ).flatten(0, 1)


class PlainHead:
    """Final norm and head of transformers, called as a lean one is."""

    def __init__(self, norm: nn.Module, head: nn.Module) -> None:
        self._norm, self.module = norm, head

    @property
    def structure(self) -> Hashable:
        return structure(self._norm, self.module)

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.module(self._norm(hidden[None]))[0]

    def norm(self, hidden: Tensor) -> Tensor:
        return self._norm(hidden[None])[0]


class LevelSpan:
    """A pass over T new positions, from `start` on in each of B rows: what its layers need to know of them.

    Level: all rows are equally long. Everything is made when it is first asked for.
    """

    def __init__(self, decoder: Decoder, rows: int, start: int, width: int) -> None:
        self._decoder, self.rows, self.width, self._start = decoder, rows, width, start

    @cached_property
    def rotary(self) -> tuple[Tensor, Tensor]:
        """cos and sin, [1, T, head_dim] each."""
        cos, sin = self._decoder.rotary.narrow(1, self._start, self.width).split(1)
        return cos, sin

    @cached_property
    def rotate(self) -> Callable[[Tensor], Tensor]:
        """Rotates queries or keys [B * T, n, head_dim] by the angles of their positions."""
        if self.rows * self.width <= _FEW_ROTATIONS:
            return lambda heads: torch.bmm(heads, self.rotations)
        cos, sin = self._tables()
        return partial(_rotated, cos=cos, sin=sin)

    @cached_property
    def rotations(self) -> Tensor:
        """[B * T, head_dim, head_dim]: a product with these is one kernel, `_rotated` takes half a dozen."""
        return _rotations(self._decoder, *self._tables())

    def _tables(self) -> list[Tensor]:
        """cos and sin, [B * T, 1, head_dim] each."""
        tables = [table.transpose(0, 1) for table in self.rotary]
        return tables if self.rows == 1 else [table.repeat(self.rows, 1, 1) for table in tables]

    @cached_property
    def mask(self) -> Tensor | None:
        """[T, S], added to the scores; None where none is needed."""
        return self._mask_for(1)

    @cached_property
    def grouped_mask(self) -> Tensor | None:
        """[G * T, S] for the queries of G heads that share their keys, head by head."""
        return self._mask_for(self._decoder.groups)

    def _mask_for(self, groups: int) -> Tensor | None:
        # A single position sees everything, and sdpa knows by itself how to mask a prompt's first pass.
        if self.width == 1 or (self._start == 0 and not self._decoder.is_eager):
            return None
        end = self._start + self.width
        # Attention kernels want rows at multiples of 16 bytes, or copy the mask in every layer.
        shape = (self.width, round_up(end, ALIGNMENT))
        mask = self._decoder.lowest.expand(shape).triu(self._start + 1)
        return (mask if groups == 1 else mask.repeat(groups, 1))[:, :end]


class RaggedSpan:
    """As `LevelSpan`, but each row has positions of its own, given as a tensor [B, T]: rows differ in length.
    Attention is over the first `length` positions of the cache.
    """

    def __init__(self, decoder: Decoder, positions: Tensor, length: int, is_compiled: bool = False) -> None:
        self.rows, self.width = positions.shape
        tables = decoder.rotary.index_select(1, positions.flatten())  # [2, B * T, head_dim]
        self.rotary = tuple(tables.view(2, self.rows, self.width, -1).unbind())  # [B, T, head_dim] each
        self.mask = _ragged_mask(positions, length, tables.dtype)  # [B, 1, T, S]
        self.grouped_mask = self.mask.repeat(1, 1, decoder.groups, 1)  # [B, 1, G * T, S]
        cos, sin = tables[:, :, None].unbind()
        if is_compiled or len(cos) > _FEW_ROTATIONS:  # the compiler makes one kernel of this
            self.rotate: Callable[[Tensor], Tensor] = partial(_rotated, cos=cos, sin=sin)
        else:
            rotations = _rotations(decoder, cos, sin)
            self.rotate = lambda heads: torch.bmm(heads, rotations)


Span = LevelSpan | RaggedSpan


def _ragged_mask(positions: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """[B, 1, T, S] to be added to scores: 0 where a position [B, T] sees one of the S, else a huge negative
    number.
    """
    later = torch.arange(length, device=positions.device) > positions[:, None, :, None]
    return later.to(dtype) * torch.finfo(dtype).min


def _rotations(decoder: Decoder, cos: Tensor, sin: Tensor) -> Tensor:
    """Tables [N, 1, head_dim] -> [N, head_dim, head_dim] that a product rotates heads [N, n, head_dim] by."""
    return torch.addcmul(decoder.unit * cos, decoder.half_turn, sin)


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads [N, n, head_dim], rotated by tables [N, 1, head_dim]."""
    first, second = heads.chunk(2, -1)
    return heads * cos + torch.cat((-second, first), -1) * sin


class _Rotary:
    """Tables of cos and sin, shared by a decoder and those that run other layers over the same cache."""

    def __init__(self, module: nn.Module, like: Tensor, context: int) -> None:
        self.module, self._like, self._last = module, like, context - 1
        self.tables = like.new_empty(2, 0, 0)  # [2, positions, head_dim]

    def reserve(self, num_positions: int) -> None:
        held = self.tables.shape[1]
        if num_positions > held:
            # Twice as many as there were, so that longer and longer prompts do not make them again and again.
            positions = torch.arange(max(num_positions, 2 * held), device=self._like.device)[None]
            self.tables = torch.cat(self.module(self._like, position_ids=positions.clamp_(max=self._last)))


class Decoder:
    """One model over the cache of one batch: embeds, runs layers [first:last], applies norm and head.

    Rotary tables are kept, and made anew only when a sequence needs more positions.

    Args:
        model: a `...ForCausalLM` of a supported type; what `fuse` has made of its layers is used.
        prompt_length: positions of the prompt.
        num_positions: the most positions that the generation can reach; see `reserve`.
        num_rows: the most sequences at a time.
    """

    def __init__(
        self, model: PreTrainedModel, prompt_length: int, num_positions: int, num_rows: int = 1
    ) -> None:
        check_supported(model.config)
        self.model, self.config = model, model.config
        base, head = model.base_model, model.get_output_embeddings()
        lean = lean_forms(model)
        self.layers = [
            form or PlainLayer(layer) for form, layer in zip(lean.layers, base.layers, strict=True)
        ]
        self.dtype = lean.dtype  # of activations, keys and values, logits
        self._num_rows = num_rows
        devices = [next(layer.parameters()).device for layer in base.layers]
        self.cache = KVCache(len(self.layers), 1, num_rows, devices, num_ranks(model))
        self._embed = base.embed_tokens
        self.head: Any = lean.head or PlainHead(base.norm, head)
        self.groups = model.config.num_attention_heads // model.config.num_key_value_heads
        self.is_eager = model.config._attn_implementation == "eager"

        like = torch.empty(0, dtype=self.dtype, device=self._embed.weight.device)
        self._rotary = _Rotary(base.rotary_emb, like, context_length(self.config))
        self.reserve(prompt_length, num_positions)
        # x @ unit is x, and x @ half_turn its second half, negative, followed by its first.
        head_dim = self.rotary.shape[2]
        self.unit = torch.eye(head_dim, dtype=self.dtype, device=like.device)
        self.half_turn = self.unit.roll(head_dim // 2, 1)
        self.half_turn[:, : head_dim // 2].neg_()
        self.lowest = torch.full((), torch.finfo(self.dtype).min, dtype=self.dtype, device=like.device)

    @property
    def fingerprint(self) -> Hashable:
        """A value that changes with what passes are compiled for: the structure of all modules, and the
        contents of those that rotary tables are computed from.
        """
        parts = [(type(part), part.structure) for part in (*self.layers, self.head)]
        return self.dtype, structure(self._embed), fingerprint(self._rotary.module), tuple(parts)

    @property
    def rotary(self) -> Tensor:
        """[2, positions, head_dim] cos and sin."""
        return self._rotary.tables

    def reserve(self, prompt_length: int, num_positions: int) -> None:
        """Make room for the next sequence.

        Args:
            prompt_length: positions of its prompt.
            num_positions: the most that it and those in flight can reach, prompts included.
        """
        self._rotary.reserve(num_positions)
        first = min(num_positions, prompt_length + _FIRST_ALLOCATION // self._num_rows)
        self.cache.reserve(first, limit=num_positions)

    def for_row(self, row: int, length: int = 0) -> Decoder:
        """The same model over one row of this cache, see `KVCache.row`: for the prompt of a new sequence."""
        other = copy.copy(self)
        other.cache = self.cache.row(row, length)
        return other

    @property
    def has_its_cache(self) -> bool:
        """Whether nothing else has written to the cache meanwhile."""
        return True

    def drop(self, row: int, damaged: bool, keep: bool) -> None:
        """A row has ended, see `KVCache.drop`."""
        self.cache.drop(row, damaged, keep)

    def over(self, layers: list[Any], head: Callable[[Tensor], Tensor]) -> Decoder:
        """A decoder of other layers and another head ([T, H] -> [T, V], norm included) over this cache."""
        other = copy.copy(self)
        other.layers, other.head = layers, head
        return other

    def run(self, inputs: Tensor, first: int, last: int, num_logits: int) -> ForwardResult:
        """Layers first..last-1 over T new positions, norm and head for the last `num_logits` of them.

        Args:
            inputs: [B, T] ids where `first` is 0, else [B, T, H] the input of layer `first`.
        """
        hidden = self.run_layers(inputs.clone() if first else self.embed(inputs), first, last)
        return ForwardResult(self.logits(hidden, num_logits), hidden)

    def embed(self, input_ids: Tensor) -> Tensor:
        """[B, T] ids -> [B, T, H]"""
        return self._embed(input_ids).to(self.dtype)

    def run_layers(self, hidden: Tensor, first: int, last: int) -> Tensor:
        """Run layers first..last-1 on T new positions after those that layer `first` has seen.

        Args:
            hidden: [B, T, H] the input of layer `first`. It is used up: lean layers add to it in place.

        Returns:
            [B, T, H] the output of layer `last - 1`; the keys and values are in the cache.
        """
        rows, width, _ = hidden.shape
        cache: Appendable = self.cache
        if self.cache.is_level:
            span: Span = LevelSpan(self, rows, self.cache.length(first), width)
        else:
            positions = self.cache.positions(first, width, self.rotary.device)
            cache = written = self.cache.scattered(positions, first, last)
            span = RaggedSpan(self, positions, written.length)
        states = hidden.flatten(0, 1)  # [B * T, H]
        for layer in self.layers[first:last]:
            states = layer(states, span, cache)
        return states.view(rows, width, -1)

    def logits(self, hidden: Tensor, num_positions: int) -> Tensor:
        """[B, T, H] -> [B, n, V] for the last n positions; the head runs for no others."""
        rows = hidden.shape[0]
        if num_positions == 0:
            return hidden.new_empty(rows, 0, 0)
        # With layers on several devices, everything but the layers is where the embedding is.
        states = hidden[:, -num_positions:].flatten(0, 1)
        return self.head(states).view(rows, num_positions, -1).to(self.rotary.device)


def prefill(decoder: Decoder, input_ids: Tensor, exit_layer: int) -> ForwardResult:
    """Layers 0..exit_layer-1 over a prompt [1, P], with logits for its last position.

    It goes through in pieces of PREFILL_CHUNK positions: a long one needs no more memory than one of those.
    """
    *chunks, last = input_ids.split(PREFILL_CHUNK, dim=1)
    for chunk in chunks:
        forward_early(decoder, chunk, exit_layer, num_logits=0)
    return forward_early(decoder, last, exit_layer)


def forward(decoder: Decoder, input_ids: Tensor, num_logits: int = 1) -> ForwardResult:
    """All layers over T new tokens [B, T]; logits for the last `num_logits` of them."""
    return forward_early(decoder, input_ids, len(decoder.layers), num_logits)


def forward_early(decoder: Decoder, input_ids: Tensor, exit_layer: int, num_logits: int = 1) -> ForwardResult:
    """Layers 0..exit_layer-1 over T new tokens [B, T]; norm and head for the last `num_logits` of them."""
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
    """Layers exit_layer..L-1 over the exit hidden states [B, T, H] of T tokens; logits for all of them."""
    return decoder.run(exit_hidden, exit_layer, len(decoder.layers), exit_hidden.shape[1])
