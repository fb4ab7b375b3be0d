"""The KV cache of the sequences in flight: allocate, append, roll back by count.

It knows nothing of what layers compute. Layers of transformers use it by `update`.
"""

from __future__ import annotations

import copy
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from self_speculation.model.devices import free_memory
from self_speculation.transfers import on_device

# Attention kernels need masks, and so lengths, in multiples of so many positions.
ALIGNMENT = 8

# A new cache has room for a prompt and this, divided by the number of slots, in positions.
_FIRST_ALLOCATION = 1024


def round_up(number: int, step: int) -> int:
    return -(-number // step) * step


class Appendable(ABC):
    """Takes keys and values from layers."""

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Append T positions to each of B rows of a layer.

        Args:
            keys, values: [B * T, kv_heads, head_dim], row by row.

        Returns:
            Views of all keys and values of the layer: [B * kv_heads, 1, S, head_dim] if all rows have S
            positions, [B, kv_heads, S, head_dim] if a mask selects those of each row.
        """

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Called by layers of transformers: [B, kv_heads, T, head_dim] -> [B, kv_heads, S, head_dim]."""
        rows, heads, _width, size = keys.shape
        new_keys, new_values = (part.transpose(1, 2).reshape(-1, heads, size) for part in (keys, values))
        views = self.append(new_keys, new_values, layer_idx)
        all_keys, all_values = (part.reshape(rows, heads, -1, size) for part in views)
        return all_keys, all_values


class Buffers:
    """Keys and values by layer, each [slots, kv_heads, capacity, head_dim]; None until the layer runs.

    Args:
        num_slots: the most rows at a time.
        devices: of each layer's weights; empty: all layers are on the device of the first keys.
        num_ranks: processes that hold the model together, see `free_memory`.
    """

    def __init__(
        self, num_layers: int, num_slots: int = 1, devices: Sequence[torch.device] = (), num_ranks: int = 1
    ) -> None:
        self.num_slots, self.capacity = num_slots, ALIGNMENT
        self._devices, self._num_ranks = devices, num_ranks
        self.limit = sys.maxsize  # the most positions that a row can reach
        self.of_layers: list[tuple[Tensor, Tensor] | None] = [None] * num_layers
        self._fitting = 0  # a capacity that fits in memory

    def with_room(self, layer: int, end: int, new_keys: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The buffers of a layer, grown to at least `end` positions.

        Args:
            new_keys: [any, kv_heads, head_dim], of a layer that may run for the first time.

        Raises:
            MemoryError: the buffers of all layers do not fit.
        """
        old = self.of_layers[layer]
        if old is not None and end <= old[0].shape[2]:
            return old
        like: Any = new_keys if old is None else old[0]  # [.., kv_heads, .., head_dim]
        if self.capacity < end:
            self.capacity = round_up(max(end, min(2 * self.capacity, self.limit)), ALIGNMENT)
        try:
            if self._fitting < self.capacity:
                self._check_room(like, self.capacity)
                self._fitting = self.capacity
            # Zeros: a mask does not keep NaN out of positions after a row's last one.
            shape = (self.num_slots, like.shape[1], self.capacity, like.shape[-1])
            larger = (like.new_zeros(shape), like.new_zeros(shape))
        except (MemoryError, RuntimeError):  # a shorter sequence may still fit
            self._fitting = min(0 if pair is None else pair[0].shape[2] for pair in self.of_layers)
            self.capacity = self._fitting or ALIGNMENT
            raise
        for new, part in zip(larger, old or (), strict=False):
            new[:, :, : part.shape[2]] = part
        self.of_layers[layer] = larger
        return larger

    def _check_room(self, like: Tensor, capacity: int) -> None:
        """Raises MemoryError if a device lacks memory for the buffers of its layers."""
        # Offloaded layers, on "meta", run on the first layer's device.
        devices = [like.device if device.type == "meta" else device for device in self._devices]
        devices = devices or [like.device] * len(self.of_layers)
        for device, num_layers in Counter(devices).items():
            row = 2 * num_layers * like.shape[1] * capacity * like.shape[-1] * like.itemsize
            pairs = (pair for at, pair in zip(devices, self.of_layers, strict=True) if at == device)
            taken = sum(part.nbytes for pair in pairs for part in pair or ())
            if (free := taken + free_memory(device, self._num_ranks)) < self.num_slots * row:
                fitting = f"; batch_size {free // row} would fit" if free >= row else ""
                raise MemoryError(
                    f"{self.num_slots} times {capacity} positions of keys and values take "
                    f"{self.num_slots * row / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free{fitting}"
                )


class WindowedCache(Appendable):
    """Appends to a cache, and returns what it does from a position on."""

    def __init__(self, cache: Appendable, first_key: int | Tensor) -> None:
        self._cache, self._first_key = cache, first_key

    def append(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        all_keys, all_values = self._cache.append(keys, values, layer)
        return all_keys[:, :, self._first_key :], all_values[:, :, self._first_key :]


class KVCache(Appendable):
    """Keys and values of every layer, for the rows of a batch. At first there is one row, empty.

    The buffers of a layer are allocated when it first runs, with the device and dtype of its keys. Appending
    writes in place, and rolling back moves a position. Buffers that are too small double, up to a limit.

    A pass appends equally many positions to each row, and all layers hold the same positions of a row:

        length(layer, row) = appended[layer] - missing[row]

    Appended positions include those that were dropped. A row misses them, and those by which it was shorter
    than the longest row. The cache is *uniform* while all rows have one length.
    """

    is_prompt = False  # the next positions are a prompt's
    first_slot: int  # of row 0

    def __init__(self, buffers: Buffers) -> None:
        self.buffers, self.first_slot = buffers, 0
        self.set_rows([0])

    def set_rows(self, lengths: Sequence[int]) -> None:
        """Set row lengths; keys and values are already in the slots."""
        self._committed = max(lengths, default=0)  # appended to every layer between two rounds
        self._appended = [self._committed] * len(self.buffers.of_layers)  # by layer
        self._missing = [self._committed - length for length in lengths]  # by row
        self._missing_on_device: Tensor | None = None  # the same on the device, [B, 1]

    @property
    def num_rows(self) -> int:
        """B: rows that have a sequence."""
        return len(self._missing)

    def reserve(self, prompt_length: int, num_positions: int) -> None:
        """Make room for a sequence.

        Args:
            prompt_length: positions of its prompt.
            num_positions: the most that it or one in flight can reach, prompt included.
        """
        first = min(num_positions, prompt_length + _FIRST_ALLOCATION // self.buffers.num_slots)
        self.buffers.capacity = max(self.buffers.capacity, round_up(first, ALIGNMENT))
        self.buffers.limit = num_positions

    @property
    def is_valid(self) -> bool:
        """Whether no other cache has the buffers."""
        return True

    @property
    def is_uniform(self) -> bool:
        return all(missing == self._missing[0] for missing in self._missing)

    def length(self, layer: int, row: int = 0) -> int:
        """Positions of a row in a layer."""
        return self._appended[layer] - self._missing[row]

    def longest(self, layer: int) -> int:
        """Positions of the longest row in a layer."""
        return self._appended[layer] - min(self._missing)

    def shortest(self, layer: int) -> int:
        """Positions of the shortest row in a layer."""
        return self._appended[layer] - max(self._missing)

    def positions(self, layer: int, width: int, device: torch.device) -> Tensor:
        """[B, T] the next T positions of each row in a layer."""
        if self._missing_on_device is None:
            self._missing_on_device = on_device(self._missing, device)[:, None]
        start = self._appended[layer]
        return torch.arange(start, start + width, device=device) - self._missing_on_device

    def append(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """See `Appendable`. Rows have one length; `scattered` is for others."""
        rows = len(self._missing)
        total, heads, size = keys.shape
        width = total // rows
        start = self._appended[layer] - self._missing[0]
        end = start + width
        all_keys, all_values = self.buffers.with_room(layer, end, keys)
        self._appended[layer] += width
        # Views by shape and strides: one call each, instead of a slice per dimension.
        of_row, of_head = all_keys.stride(0), all_keys.stride(1)
        first = self.first_slot * of_row
        new, new_strides = (rows, width, heads, size), (of_row, size, of_head, 1)
        if rows > 1:
            keys, values = keys.view(new), values.view(new)
        all_keys.as_strided(new, new_strides, first + start * size).copy_(keys)
        all_values.as_strided(new, new_strides, first + start * size).copy_(values)
        shape, strides = (rows * heads, 1, end, size), (of_head, of_head, size, 1)
        return all_keys.as_strided(shape, strides, first), all_values.as_strided(shape, strides, first)

    def buffers_of(self, first: int, last: int, width: int, new_keys: Tensor) -> list[Tensor]:
        """Keys and values of layers first..last-1, all slots, with room for T more positions of each row. The
        caller writes the positions and calls `advance`.

        Args:
            new_keys: [any, kv_heads, head_dim], of layers that may run for the first time.
        """
        end = self.longest(first) + width
        return [part for layer in range(first, last) for part in self.buffers.with_room(layer, end, new_keys)]

    def scattered(self, positions: Tensor, first: int, last: int) -> ScatteredCache:
        """Takes keys and values of layers first..last-1 at positions [B, T], for rows that differ in
        length.
        """
        width = positions.shape[1]
        for layer in range(first, last):
            self.buffers.with_room(layer, self.longest(first) + width)
        self.advance(first, last, width)
        return ScatteredCache(self.buffers.of_layers, positions, round_up(self.longest(first), ALIGNMENT))

    def advance(self, first: int, last: int, width: int) -> None:
        """Count T positions as appended to layers first..last-1."""
        self._appended[first:last] = [n + width for n in self._appended[first:last]]

    def rollback(self, num_tokens: int | Sequence[int]) -> None:
        """Drop the last positions of every layer.

        Args:
            num_tokens: of all rows, or [B] of each.

        Raises:
            ValueError: a layer has fewer positions.
        """
        dropped = [num_tokens] * self.num_rows if isinstance(num_tokens, int) else num_tokens
        least = min(self._appended)
        for number, missing in zip(dropped, self._missing, strict=True):
            if not 0 <= number <= least - missing:
                raise ValueError(
                    f"cannot roll back {number} positions of a cache that holds {least - missing}"
                )
        if any(dropped):
            self._missing = [sum(pair) for pair in zip(self._missing, dropped, strict=True)]
            self._missing_on_device = None
        self._committed = least

    def rollback_draft(self) -> None:
        """Drop positions appended since the last `rollback` or `set_rows`."""
        self._appended = [self._committed] * len(self._appended)

    def prompt_view(self, slot: int, length: int = 0) -> KVCache:
        """A view of one slot, to prefill it after its first `length` positions."""
        view = copy.copy(self)
        view.first_slot, view.is_prompt = slot, True
        view.set_rows([length])
        return view

    def _lengths(self) -> list[int]:
        """[B] of the first layer; layers beyond an early exit never run."""
        return [self.length(0, row) for row in range(self.num_rows)]

    def add_row(self, length: int) -> None:
        """Add a row whose `length` positions are already in its slot."""
        self.set_rows([*self._lengths(), length])

    def remove_row(self, row: int, keep: bool = False) -> None:
        """Move the last row to the slot of this one, then shrink; `keep`: the two swap slots."""
        lengths, last = self._lengths(), self.num_rows - 1
        if keep:
            self.swap(row, last, max(lengths[row], lengths[last]))
        elif row != last:
            for buffer in self._all_buffers():
                buffer[row, :, : lengths[last]] = buffer[last, :, : lengths[last]]
        lengths[row] = lengths[last]
        self.set_rows(lengths[:-1])

    def clear_slot(self, slot: int) -> None:
        """Fill it with zeros: it may hold NaN, and a mask does not keep NaN out."""
        for buffer in self._all_buffers():
            buffer[slot].zero_()

    def swap(self, slot: int, other: int, length: int) -> None:
        """Exchange the first `length` positions of two slots. It allocates nothing, so memory cannot run out
        when some layers are exchanged and others are not.
        """
        if slot == other:
            return
        for buffer in self._all_buffers():
            bits = buffer[:, :, :length].view(getattr(torch, f"int{8 * buffer.itemsize}"))
            one, another = bits[slot], bits[other]
            for target, source in ((one, another), (another, one), (one, another)):
                target.bitwise_xor_(source)

    def _all_buffers(self) -> Iterator[Tensor]:
        return (part for pair in self.buffers.of_layers for part in pair or ())


class ScatteredCache(Appendable):
    """Writes keys and values at positions [B, T] to the buffers of layers, for a pass that masks row by row.
    Attention reads `length` positions, S.
    """

    def __init__(self, buffers: Sequence[Any], positions: Tensor, length: int) -> None:
        self._buffers, self._positions, self.length = buffers, positions, length
        # Of row, head and position: [B, 1, 1], [kv_heads], [B, T, 1].
        self._index: tuple[Tensor, ...] = ()

    def append(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        pair = self._buffers[layer]
        (rows, width), (_, heads, _, size) = self._positions.shape, pair[0].shape
        if not self._index:
            all_rows, all_heads = (torch.arange(n, device=self._positions.device) for n in (rows, heads))
            self._index = (all_rows[:, None, None], all_heads, self._positions[:, :, None])
        index = tuple(part.to(keys.device) for part in self._index)  # layers may be on several devices
        for buffer, new in zip(pair, (keys, values), strict=True):
            buffer.index_put_(index, new.view(rows, width, heads, size))
        all_keys, all_values = (buffer[:rows, :, : self.length] for buffer in pair)
        return all_keys, all_values
