"""One pass of a `ModelRunner`: rotation and masks of the tokens, and the cache that it appends to."""

import functools

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from self_speculation.backends.buffers import ALIGNMENT, Pair
from self_speculation.backends.kv_cache import KVCache
from self_speculation.machine.devices import round_up
from self_speculation.models.families import AttentionType, attention_types, context_length
from self_speculation.models.model_cache import lock


class RotaryTables:
    """cos and sin of positions by kind of rotation, for all passes of a model. They grow with the longest
    row.

    Args:
        dtype: of activations.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self.module = model.base_model.rotary_emb
        self._context = context_length(model.config)
        self.is_sdpa = model.config._attn_implementation == "sdpa"
        self.dtype = dtype
        self.device = model.base_model.embed_tokens.weight.device
        self.like = torch.empty(0, dtype=dtype, device=self.device)
        kinds = dict.fromkeys(kind.rotation for kind in attention_types(model.config))
        self._tables = dict.fromkeys(kinds, self.like.new_empty(2, 0, 0))
        self._size = 0
        self.reserve(1)

    def reserve(self, num_positions: int) -> None:
        """Make the tables at least `num_positions` long."""
        if num_positions > self._size:
            # Twice as long, so that a growing text rarely needs longer ones. Only padding is beyond the
            # context.
            size = max(num_positions, min(2 * num_positions, self._context))
            positions = torch.arange(size, device=self.device)[None].clamp_(max=self._context - 1)
            with lock(self.module):  # a rotation may change the module for longer positions
                tables = {
                    rotation: torch.cat(cos_and_sin(self.module, self.like, positions, rotation))
                    for rotation in self._tables
                }
            self._tables = tables  # once there was memory for all of them
            self._size = size

    def cos_sin(self, rotation: str | None, num_positions: int) -> Tensor:
        """cos and sin: [2, at least num_positions, head_dim]."""
        self.reserve(num_positions)
        return self._tables[rotation]


class AttentionContext:
    """A pass over T new positions of each of B rows, in layers of one `AttentionType`.

    Args:
        start_layer: the first layer of the pass.

    Attributes:
        rotary: cos and sin, [1 or B, T, head_dim] each.
        sees_all: each token sees all earlier positions of the row, and rows have one length.
    """

    def __init__(
        self, tables: RotaryTables, cache: KVCache, start_layer: int, width: int, kind: AttentionType
    ) -> None:
        lengths = cache.lengths(start_layer)
        self.cache = cache
        self.num_rows = cache.num_rows
        self.width = width
        start = min(lengths)
        end = max(lengths) + width
        self._range = start, end
        self._tables = tables
        self._window = kind.window
        # A float16 cache marks numbers beyond the range as NaN. A draft with one may be rejected.
        self._hides_nan = cache.buffers.dtype == torch.float16 != tables.dtype
        self._positions: Tensor | None = None  # [B, T]; None: rows have one length
        self._first_key = 0 if kind.window is None else max(0, start + 1 - kind.window)  # that a token sees
        is_uniform = start + width == end
        self.sees_all = is_uniform and (kind.window is None or end <= kind.window)
        table = tables.cos_sin(kind.rotation, end)
        if is_uniform:
            cos_sin = table[:, None, start:end]
        else:
            self._positions = cache.positions(start_layer, width, tables.device)
            cos_sin = table.index_select(1, self._positions.flatten()).view(2, self.num_rows, width, -1)
        self.rotary = cos_sin.unbind()

    @functools.cached_property
    def mask(self) -> Tensor | None:
        """[1 or B, 1, T, S], added to the scores: 0 where a position sees a key, else a huge negative number.
        None: a token sees all keys or, of several tokens, those up to the token's position.
        """
        start, end = self._range
        tables = self._tables
        positions = self._positions
        is_causal = self.sees_all and start == 0 and tables.is_sdpa
        if positions is None and (self.width == 1 or is_causal):
            return None
        if positions is None:
            positions = torch.arange(start, end, device=tables.device)[None]
            positions = positions.expand(self.num_rows if self._hides_nan else 1, -1)
        num_keys = end - self._first_key
        # Attention kernels want rows at multiples of 16 bytes, or copy the mask in every layer.
        keys = torch.arange(
            self._first_key, self._first_key + round_up(num_keys, ALIGNMENT), device=positions.device
        )
        return causal_mask(positions[:, None], keys, self._window, tables.dtype)[..., :num_keys]

    def append(self, keys: Tensor, values: Tensor, layer: int) -> Pair:
        """Append to the cache; returns all keys and values that a token sees, see `KVCache.write`, in the
        dtype of activations.
        """
        written = self.cache.write(keys, values, layer, self._positions)
        all_keys, all_values = (part[:, :, self._first_key :].to(self._tables.dtype) for part in written)
        if self._hides_nan and self.mask is not None:
            # 0 times NaN is NaN. Tokens that do not see NaN get zeros; the mask has NaN for those that do.
            is_nan = (all_keys.isnan() | all_values.isnan()).any(-1).any(1)  # [B, S]
            self.mask.masked_fill_(is_nan[:, None, None] & (self.mask == 0), torch.nan)
            for part in (all_keys, all_values):
                part.masked_fill_(is_nan[:, None, :, None], 0.0)
        return all_keys, all_values

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: object, **__: object) -> Pair:
        """As `append`, for layers of transformers: of keys and values [B, kv_heads, T, head_dim]."""
        new_keys, new_values = (part.transpose(1, 2).flatten(0, 1) for part in (keys, values))
        return self.append(new_keys, new_values, layer_idx)

    def rotate(self, heads: Tensor) -> Tensor:
        """Rotate queries or keys [B * T, n, head_dim] by the angles of their positions."""
        # [B * T, 1, head_dim] each
        cos, sin = (table.expand(self.num_rows, -1, -1).flatten(0, 1)[:, None] for table in self.rotary)
        first, second = heads.chunk(2, -1)
        return heads * cos + torch.cat((-second, first), -1) * sin


def cos_and_sin(
    module: nn.Module, like: Tensor, positions: Tensor, rotation: str | None
) -> tuple[Tensor, Tensor]:
    """[1, P, head_dim] each, by the rotary embedding of a model, for positions [1, P]."""
    layer_type = {} if rotation is None else {"layer_type": rotation}
    return module(like, position_ids=positions, **layer_type)


def causal_mask(positions: Tensor, keys: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """[.., T, S] added to the scores of tokens at `positions` [.., T] over keys at positions [S]: 0, or a
    huge negative number for keys that are later or out of the window.
    """
    hidden = keys > positions[..., None]
    if window is not None:
        hidden |= keys <= positions[..., None] - window
    # Half: GPUs multiply by log2(e).
    return hidden.to(dtype) * (torch.finfo(dtype).min / 2)
