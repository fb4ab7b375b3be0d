"""Lifetime of the keys and values of one generation: allocate, append, roll back by count.

Knows nothing of what the layers compute. Inside the decoder layers of transformers it takes the
place of their cache, of which they only ever call `update`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Appendable(ABC):
    """What layers of either kind write keys and values to and read them from."""

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Append T positions to a layer.

        Args:
            keys: [T, kv_heads, head_dim]; `values` likewise.

        Returns:
            Views of all the layer's keys and values, [kv_heads, 1, length, head_dim].
        """

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """As layers of transformers append: [1, kv_heads, T, head_dim] -> [1, kv_heads, length, head_dim]."""
        all_keys, all_values = self.append(keys[0].transpose(0, 1), values[0].transpose(0, 1), layer_idx)
        return all_keys.transpose(0, 1), all_values.transpose(0, 1)


class KVCache(Appendable):
    """Keys and values of every layer, batch size 1.

    A layer's buffer is allocated once, on the device and in the dtype of the first keys it sees, and
    appended in place; a layer that never runs costs nothing. Rolling back moves a position. Only a generation
    that outgrows `capacity` copies: the buffer then doubles.
    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.capacity = capacity
        self._lengths = [0] * num_layers
        # Keys and values, each [kv_heads, capacity, head_dim].
        self._buffers: list[tuple[Tensor, Tensor] | None] = [None] * num_layers

    def length(self, layer: int) -> int:
        """Number of positions that `layer` holds."""
        return self._lengths[layer]

    def append(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        width, heads, size = keys.shape
        start, end = self._lengths[layer], self._lengths[layer] + width
        buffers = self._buffers[layer]
        if buffers is None or end > buffers[0].shape[1]:
            buffers = self._grow(layer, end, keys)
        self._lengths[layer] = end
        all_keys, all_values = buffers
        # Views by shape and strides: one call each, where slices of two dimensions take three.
        head = all_keys.stride(0)
        new, new_strides = (width, heads, size), (size, head, 1)
        all_keys.as_strided(new, new_strides, start * size).copy_(keys)
        all_values.as_strided(new, new_strides, start * size).copy_(values)
        held, strides = (heads, 1, end, size), (head, head, size, 1)
        return all_keys.as_strided(held, strides), all_values.as_strided(held, strides)

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

    def truncate(self, length: int) -> None:
        """Forget whatever a layer holds beyond `length` positions."""
        self._lengths = [min(length, held) for held in self._lengths]

    def pretend(self, length: int) -> None:
        """Hold `length` positions of zeros in every layer, to time passes without a prompt. A token must have
        been through all layers before.
        """
        for buffers in self._buffers:
            assert buffers is not None
            for buffer in buffers:
                buffer.zero_()
        self._lengths = [length] * len(self._lengths)

    def _grow(self, layer: int, least: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """New buffers of a layer, of room for `least` positions, with what the old ones hold."""
        while self.capacity < least:
            self.capacity *= 2
        shape = (like.shape[1], self.capacity, like.shape[2])
        larger = (like.new_empty(shape), like.new_empty(shape))
        for new, old in zip(larger, self._buffers[layer] or (), strict=False):
            new[:, : old.shape[1]] = old
        self._buffers[layer] = larger
        return larger


class StaticKVCache(KVCache):
    """Buffers of one size at one place, for compiled passes and for one generation after the other."""

    def __init__(self, num_layers: int, capacity: int, kv_heads: int, head_dim: int, like: Tensor) -> None:
        super().__init__(num_layers, capacity)
        # Zeros: what lies after the last position is masked, but even so must be numbers.
        shape = (kv_heads, capacity, head_dim)
        self.buffers = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(num_layers)]
        self._buffers = list(self.buffers)

    def clear(self) -> None:
        self._lengths = [0] * len(self._lengths)

    def advance(self, first: int, last: int, width: int) -> None:
        """Count `width` positions that were written to layers first..last-1 by `WrittenAt`."""
        self._lengths[first:last] = [length + width for length in self._lengths[first:last]]


class WrittenAt(Appendable):
    """A static cache as a compiled pass sees it: written at positions that are data, attended to as a whole.

    Args:
        buffers: of the cache.
        positions: [T]
    """

    def __init__(self, buffers: list[tuple[Tensor, Tensor]], positions: Tensor) -> None:
        self._buffers, self._positions = buffers, positions

    def append(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """As that of `KVCache`, with all positions that there can be, [kv_heads, 1, capacity, head_dim]."""
        all_keys, all_values = self._buffers[layer]
        all_keys[:, self._positions] = keys.transpose(0, 1)
        all_values[:, self._positions] = values.transpose(0, 1)
        return all_keys[:, None], all_values[:, None]
