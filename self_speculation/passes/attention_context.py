"""One pass of a `ModelRunner`: rotation and masks of its tokens, and the cache that it appends to."""

import functools

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from self_speculation.devices import round_up
from self_speculation.families import AttentionType, attention_types, context_length
from self_speculation.model_cache import lock
from self_speculation.passes.attention import has_flash_attention
from self_speculation.passes.kv_cache import ALIGNMENT, KVCache, Pair, ScatteredCache


class AttentionTables:
    """What the passes of a model share: cos and sin by kind of rotation, and constants.

    Args:
        dtype: of activations.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self.module, self._context = model.base_model.rotary_emb, context_length(model.config)
        self.is_sdpa = model.config._attn_implementation == "sdpa"
        self.dtype, self.device = dtype, model.base_model.embed_tokens.weight.device
        self.like = torch.empty(0, dtype=dtype, device=self.device)
        kinds = dict.fromkeys(kind.rotation for kind in attention_types(model.config))
        self._tables = dict.fromkeys(kinds, self.like.new_empty(2, 0, 0))
        self._size = 0
        self.reserve(1)
        head_dim = next(iter(self._tables.values())).shape[2]
        self.has_flash = has_flash_attention(self.device, dtype, head_dim)

    def reserve(self, num_positions: int) -> None:
        """Have tables of at least so many positions."""
        if num_positions > self._size:
            # Twice as many, so that a longer and longer text rarely grows them. Only padding is beyond the
            # context.
            size = max(num_positions, min(2 * num_positions, self._context))
            positions = torch.arange(size, device=self.device)[None].clamp_(max=self._context - 1)
            with lock(self.module):  # some kinds of rotation change their module for longer positions
                tables = {
                    rotation: torch.cat(cos_and_sin(self.module, self.like, positions, rotation))
                    for rotation in self._tables
                }
            self._tables, self._size = tables, size  # once there was memory for all of them

    def cos_sin(self, rotation: str | None, num_positions: int) -> Tensor:
        """[2, at least so many positions, head_dim]"""
        self.reserve(num_positions)
        return self._tables[rotation]


class AttentionContext:
    """A pass over T new positions of each of B rows, in layers of one `AttentionType`.

    Args:
        cache: with rows of one length, or positions of rows that differ in length.
        start: the length of all rows, or at most the first new position of each.

    Attributes:
        mask: number of copies -> [1 or B, 1, copies * T, S], added to the scores: 0 where a position sees a
            key, else a huge negative number; None: no mask is needed. Queries of several heads need a copy
            for each.
        rotary: cos and sin, [1 or B, T, head_dim] each.
        by_flash: `flash_attention` computes the pass of fused layers over several tokens, without a mask.
    """

    def __init__(
        self,
        tables: AttentionTables,
        cache: KVCache | ScatteredCache,
        start: int,
        width: int,
        kind: AttentionType,
    ) -> None:
        positions = None if isinstance(cache, KVCache) else cache.positions  # [B, T]
        self.cache, self.rows, self.width = cache, cache.num_rows, width
        self.is_uniform, window = positions is None, kind.window
        end = start + width if isinstance(cache, KVCache) else cache.length
        first = 0 if window is None else max(0, start + 1 - window)  # no token sees an earlier key
        table = tables.cos_sin(kind.rotation, end)
        if positions is None:
            cos_sin = table[:, None, start:end]
            window = window if window is not None and end > window else None
            is_masked = width > 1 and not (start == 0 and window is None and tables.is_sdpa)
        else:
            cos_sin = table.index_select(1, positions.flatten()).view(2, self.rows, width, -1)
            first, is_masked = first // ALIGNMENT * ALIGNMENT, True
        self.by_flash = tables.has_flash and self.is_uniform and window is None
        cos, sin = cos_sin.unbind()
        self._first_key, self.rotary = first, (cos, sin)

        @functools.cache
        def mask(copies: int) -> Tensor | None:
            if not is_masked:
                return None
            own = positions
            if own is None:
                own = torch.arange(start, end, device=tables.device)[None]
            # Attention kernels want rows at multiples of 16 bytes, or copy the mask in every layer.
            keys = torch.arange(first, first + round_up(end - first, ALIGNMENT), device=tables.device)
            by_row = causal_mask(own[:, None], keys, window, tables.dtype)
            return by_row.repeat(1, 1, copies, 1)[..., : end - first]

        self.mask = mask

    def append(self, keys: Tensor, values: Tensor, layer: int) -> Pair:
        """Append to the cache; returns all keys and values that a token sees, see `KVCache.append`."""
        all_keys, all_values = self.cache.append(keys, values, layer)
        if not self._first_key:
            return all_keys, all_values
        return all_keys[:, :, self._first_key :], all_values[:, :, self._first_key :]

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: object, **__: object) -> Pair:
        """As `append`, for layers of transformers: of keys and values [B, kv_heads, T, head_dim]."""
        new_keys, new_values = (part.transpose(1, 2).flatten(0, 1) for part in (keys, values))
        return self.append(new_keys, new_values, layer_idx)

    def rotate(self, heads: Tensor) -> Tensor:
        """Rotate queries or keys [B * T, n, head_dim] by the angles of their positions."""
        cos, sin = (_by_token(table, self.rows) for table in self.rotary)
        first, second = heads.chunk(2, -1)
        return heads * cos + torch.cat((-second, first), -1) * sin


def cos_and_sin(
    module: nn.Module, like: Tensor, positions: Tensor, rotation: str | None
) -> tuple[Tensor, Tensor]:
    """[1, P, head_dim] each, by the rotary embedding of a model, for positions [1, P]."""
    of_type = {} if rotation is None else {"layer_type": rotation}
    return module(like, position_ids=positions, **of_type)


def causal_mask(own: Tensor, keys: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """[.., T, S] added to the scores of tokens at positions `own` [.., T] over keys at positions [S]: 0, or a
    huge negative number for keys that are later or out of the window.
    """
    hidden = keys > own[..., None]
    if window is not None:
        hidden |= keys <= own[..., None] - window
    # Half: GPUs multiply by log2(e).
    return hidden.to(dtype) * (torch.finfo(dtype).min / 2)


def _by_token(table: Tensor, rows: int) -> Tensor:
    """[1 or B, T, head_dim] -> [B * T, 1, head_dim]"""
    return table.expand(rows, -1, -1).flatten(0, 1)[:, None]
