"""Lifetime of the keys and values of one generation: allocate, append, roll back by count.

Knows nothing of what the layers compute. It takes the place of a transformers cache inside the decoder
layers, which only ever call `update`.
"""

from __future__ import annotations

from torch import Tensor


class KVCache:
    """Keys and values of every layer, batch size 1.

    A layer's buffers are allocated once, on the device and in the dtype of the first keys it sees, and
    appended in place; a layer that never runs costs nothing. Rolling back moves a position. Only a generation
    that outgrows `capacity` copies: the buffer then doubles.
    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.capacity = capacity
        self._lengths = [0] * num_layers
        self._keys: list[Tensor | None] = [None] * num_layers  # each [1, kv_heads, capacity, head_dim]
        self._values: list[Tensor | None] = [None] * num_layers

    def length(self, layer: int) -> int:
        """Number of positions that `layer` holds."""
        return self._lengths[layer]

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Append T positions to a layer.

        Args:
            keys, values: [1, kv_heads, T, head_dim]

        Returns:
            Views of all the layer's keys and values, [1, kv_heads, length, head_dim].
        """
        start, end = self._lengths[layer_idx], self._lengths[layer_idx] + keys.shape[2]
        self._keys[layer_idx] = k = self._buffer(self._keys[layer_idx], keys, start, end)
        self._values[layer_idx] = v = self._buffer(self._values[layer_idx], values, start, end)
        k[:, :, start:end] = keys
        v[:, :, start:end] = values
        self._lengths[layer_idx] = end
        return k[:, :, :end], v[:, :, :end]

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

    def _buffer(self, buffer: Tensor | None, like: Tensor, start: int, end: int) -> Tensor:
        """The buffer itself, allocated or enlarged so that it holds `end` positions."""
        if buffer is not None and end <= buffer.shape[2]:
            return buffer
        while self.capacity < end:
            self.capacity *= 2
        larger = like.new_empty(*like.shape[:2], self.capacity, like.shape[3])
        if buffer is not None:
            larger[:, :, :start] = buffer[:, :, :start]
        return larger
