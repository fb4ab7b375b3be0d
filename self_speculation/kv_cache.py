"""Lifetime of the keys and values of one generation: allocate, append, roll back by count.

Knows nothing of what the layers compute. It takes the place of a transformers cache inside the decoder
layers, which only ever call `update`.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer, batch size 1.

    A layer's buffer is allocated once, on the device and in the dtype of the first keys it sees, and
    appended in place; a layer that never runs costs nothing. Rolling back moves a position. Only a generation
    that outgrows `capacity` copies: the buffer then doubles.
    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.capacity = capacity
        self._lengths = [0] * num_layers
        self._buffers: list[Tensor | None] = [None] * num_layers  # each [2, kv_heads, capacity, head_dim]

    def length(self, layer: int) -> int:
        """Number of positions that `layer` holds."""
        return self._lengths[layer]

    def append(self, keys_values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Append T positions to a layer.

        Args:
            keys_values: [2, kv_heads, T, head_dim]

        Returns:
            Views of all the layer's keys and values, [1, kv_heads, length, head_dim].
        """
        width = keys_values.shape[2]
        new, keys, values = self._extend(layer, keys_values, width)
        new.copy_(keys_values)
        return keys, values

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """As `append`, of [1, kv_heads, T, head_dim] each: what the layers of transformers call."""
        new, all_keys, all_values = self._extend(layer_idx, keys, keys.shape[2])
        new[:1] = keys
        new[1:] = values
        return all_keys, all_values

    def rollback(self, num_tokens: int) -> None:
        """Forget the last `num_tokens` positions of every layer.

        Raises:
            ValueError: a layer holds fewer positions than that.
        """
        if not 0 <= num_tokens <= min(self._lengths):
            raise ValueError(
                f"cannot roll back {num_tokens} positions of a cache that holds {min(self._lengths)}"
            )
        self._lengths = [length - num_tokens for length in self._lengths]

    def _extend(self, layer: int, like: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Make room for `width` positions more: these in the buffer, all keys, all values."""
        start, end = self._lengths[layer], self._lengths[layer] + width
        buffer = self._buffers[layer]
        if buffer is None or end > buffer.shape[2]:
            while self.capacity < end:
                self.capacity *= 2
            larger = like.new_empty(2, like.shape[1], self.capacity, like.shape[3])
            if buffer is not None:
                larger[:, :, :start] = buffer[:, :, :start]
            self._buffers[layer] = buffer = larger
        self._lengths[layer] = end
        keys, values = buffer.narrow(2, 0, end).split(1)
        return buffer.narrow(2, start, width), keys, values


class StaticKVCache(KVCache):
    """Buffers of one size at one place, for compiled passes and for one generation after the other."""

    def __init__(self, num_layers: int, capacity: int, kv_heads: int, head_dim: int, like: Tensor) -> None:
        super().__init__(num_layers, capacity)
        # Zeros: what lies behind the last position is masked, but even so must be numbers.
        self.buffers = [like.new_zeros(2, kv_heads, capacity, head_dim) for _ in range(num_layers)]
        self._buffers = list(self.buffers)

    def clear(self) -> None:
        self._lengths = [0] * len(self._lengths)

    def advance(self, first: int, last: int, width: int) -> None:
        """Count `width` positions that were written to layers first..last-1 by `WrittenAt`."""
        self._lengths[first:last] = [length + width for length in self._lengths[first:last]]


class WrittenAt:
    """A static cache as a compiled pass sees it: written at positions that are data, attended to as a whole.

    Args:
        buffers: of the cache.
        positions: [T]
    """

    def __init__(self, buffers: list[Tensor], positions: Tensor) -> None:
        self._buffers, self._positions = buffers, positions

    def append(self, keys_values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Write [2, kv_heads, T, head_dim]; all keys and values, [1, kv_heads, capacity, head_dim] each."""
        buffer = self._buffers[layer].index_copy_(2, self._positions, keys_values)
        return buffer[:1], buffer[1:]

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """As `append`, of [1, kv_heads, T, head_dim] each: what the layers of transformers call."""
        return self.append(torch.cat((keys, values)), layer_idx)
