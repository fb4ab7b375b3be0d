"""Positions, rotation and masks of one pass of a `ModelRunner`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from self_speculation.model.attention import CHUNK, AttentionKernel
from self_speculation.model.families import AttentionType
from self_speculation.model.kv_cache import ALIGNMENT, Appendable, WindowedCache, round_up

# Up to this many tokens of a pass, one matrix product for each token rotates queries and keys.
_FEW_ROTATIONS = 64


@dataclass(eq=False)
class AttentionContext:
    """A pass over T new positions of each of B rows, in layers of one `AttentionType`; made by `uniform` or
    `ragged`.
    """

    rows: int  # B
    width: int  # T
    make_mask: Callable[[int], Tensor | None]  # see `mask`
    rotations: Tensor | None = None  # [B * T, head_dim, head_dim] of heads; None: `rotary` rotates them
    rotary: tuple[Tensor, Tensor] | None = None  # cos and sin, [1 or B, T, head_dim] each
    kernel: AttentionKernel = AttentionKernel.ANY  # FLASH masks the keys after each token itself
    splits_keys: bool = False  # fused layers attend in chunks
    first_key: int = 0  # S begins at this position; no token sees an earlier one
    is_causal: bool = False  # rows have one length, and a token sees all keys up to its own
    _masks: dict[Any, Tensor | None] = field(default_factory=dict)

    @classmethod
    def uniform(cls, runner: Any, kind: AttentionType, rows: int, start: int, width: int) -> AttentionContext:
        """All rows have the same length, `start`."""
        end, window = start + width, kind.window
        cos, sin = runner.rotary_of(kind, end).narrow(1, start, width).split(1)
        first = _first_key(start, window)
        window = window if window is not None and end > window else None

        def make_mask(copies: int) -> Tensor | None:
            # One position sees all keys, and sdpa masks the first pass of a prompt itself.
            is_causal = start == 0 and window is None and runner.config._attn_implementation == "sdpa"
            if width == 1 or is_causal:
                return None
            num_keys = end - first
            # Attention kernels want rows at multiples of 16 bytes, or copy the mask in every layer.
            mask = causal_mask(runner.lowest, width, round_up(num_keys, ALIGNMENT), start - first, window)
            return (mask if copies == 1 else mask.repeat(copies, 1))[:, :num_keys]

        kernel = runner.kernel if width == 1 or window is None else runner.kernel.with_mask
        rotations = _rotations(runner, cos, sin, rows)
        is_causal = window is None
        return cls(rows, width, make_mask, rotations, (cos, sin), kernel, False, first, is_causal)

    @classmethod
    def ragged(
        cls,
        runner: Any,
        kind: AttentionType,
        positions: Tensor,
        length: int,
        shortest: int = 0,
        splits_keys: bool = False,
    ) -> AttentionContext:
        """Rows differ in length.

        Args:
            positions: [B, T]
            length: the positions of the cache that attention reads, if no window hides the first ones.
            shortest: at most the first of these positions of every row.
            splits_keys: if the kernel is not ANY; S is a multiple of CHUNK.
        """
        rows, width = positions.shape
        tables = runner.rotary_of(kind, length)
        cos, sin = tables.index_select(1, positions.flatten()).view(2, rows, width, -1).unbind()
        window, first = kind.window, _first_key(shortest, kind.window) // ALIGNMENT * ALIGNMENT

        def make_mask(copies: int) -> Tensor:
            keys, own = torch.arange(first, length, device=positions.device), positions[:, None, :, None]
            hidden = keys > own
            if window is not None and length > window:
                hidden |= keys <= own - window
            # Half: GPUs multiply by log2(e), and a chunk that is wholly -inf gives NaN.
            masked = torch.finfo(runner.dtype).min / 2
            return (hidden.to(runner.dtype) * masked).repeat(1, 1, copies, 1)

        kernel = runner.kernel.with_mask
        splits_keys = splits_keys and kernel is not AttentionKernel.ANY
        rotations = _rotations(runner, cos, sin, rows)
        return cls(rows, width, make_mask, rotations, (cos, sin), kernel, splits_keys, first)

    def visible(self, cache: Appendable) -> Appendable:
        """The cache, or what its tokens see of it."""
        return WindowedCache(cache, self.first_key) if self.first_key else cache

    def rotate(self, heads: Tensor) -> Tensor:
        """Rotate queries or keys [B * T, n, head_dim] by the angles of their positions."""
        if self.rotations is not None:
            return torch.bmm(heads, self.rotations)
        cos, sin = (_by_token(table, self.rows) for table in self.rotary or ())
        first, second = heads.chunk(2, -1)
        return heads * cos + torch.cat((-second, first), -1) * sin

    def mask(self, copies: int = 1) -> Tensor | None:
        """[copies * T, S] or [B, 1, copies * T, S], added to the scores: 0 where a position sees a key, else
        a huge negative number; None: no mask is needed. Queries of several heads need a copy for each.
        """
        if copies not in self._masks:
            self._masks[copies] = self.make_mask(copies)
        return self._masks[copies]

    def mask_of_chunks(self, copies: int, heads: int) -> Tensor:
        """[B * heads, C, copies * T, CHUNK], see `attend_in_chunks`."""
        if (copies, heads) not in self._masks:
            mask: Any = self.mask(copies)
            by_chunk = mask.expand(-1, heads, -1, -1).unflatten(3, (-1, CHUNK)).transpose(2, 3)
            self._masks[copies, heads] = by_chunk.flatten(0, 1)
        found: Any = self._masks[copies, heads]
        return found


def cos_and_sin(module: Any, like: Tensor, positions: Tensor, rotation: str | None) -> tuple[Tensor, Tensor]:
    """[1, P, head_dim] each, by the rotary embedding of a model, for positions [1, P]."""
    of_type = {} if rotation is None else {"layer_type": rotation}
    return module(like, position_ids=positions, **of_type)


def causal_mask(lowest: Tensor, width: int, num_keys: int, start: int, window: int | None) -> Tensor:
    """[T, S] added to the scores of tokens that follow the first `start` keys: 0, or `lowest` for keys that
    are later or out of the window.
    """
    everywhere = lowest.expand(width, num_keys)
    mask = everywhere.triu(start + 1)
    return mask if window is None else mask.add_(everywhere.tril(start - window))


def _first_key(start: int, window: int | None) -> int:
    """The first key that tokens from position `start` on see."""
    return 0 if window is None else max(0, start + 1 - window)


def _by_token(table: Tensor, rows: int) -> Tensor:
    """[1 or B, T, head_dim] -> [B * T, 1, head_dim]"""
    return table.expand(rows, -1, -1).flatten(0, 1)[:, None]


def _rotations(runner: Any, cos: Tensor, sin: Tensor, rows: int) -> Tensor | None:
    """A product with these is one kernel; rotating by cos and sin takes half a dozen."""
    if rows * cos.shape[1] > _FEW_ROTATIONS:
        return None
    return torch.addcmul(runner.unit * _by_token(cos, rows), runner.rotate_half, _by_token(sin, rows))
