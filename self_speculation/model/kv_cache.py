"""The KV cache of the sequences in flight: allocate, append, roll back by count.

Knows nothing of what layers compute. Layers of transformers take it for a cache of their own: they only call
`update`.
"""

from __future__ import annotations

import copy
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from self_speculation.model.devices import free_memory
from self_speculation.transfers import on_device

# Attention kernels want masks, and so lengths, in multiples of so many positions.
ALIGNMENT = 8


def round_up(number: int, step: int) -> int:
    """To the next multiple."""
    return -(-number // step) * step


class Appendable(ABC):
    """What layers append keys and values to."""

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Append T positions to each of B rows of a layer.

        Args:
            keys: [B * T, kv_heads, head_dim], row by row; `values` likewise.

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
        held = self.append(new_keys, new_values, layer_idx)
        all_keys, all_values = (part.reshape(rows, heads, -1, size) for part in held)
        return all_keys, all_values


class _Buffers:
    """Keys and values by layer, each [rows, kv_heads, capacity, head_dim]; None until the layer runs.

    Args:
        devices, num_ranks: as for `KVCache`.
    """

    def __init__(
        self, num_layers: int, num_rows: int, capacity: int, devices: Sequence[torch.device], num_ranks: int
    ) -> None:
        self.num_rows, self.capacity, self._devices, self._num_ranks = num_rows, capacity, devices, num_ranks
        self.limit = sys.maxsize  # the most positions that a row can reach
        self.of_layers: list[tuple[Tensor, Tensor] | None] = [None] * num_layers
        self._fitting = 0  # a capacity that fits

    def with_room(self, layer: int, end: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The buffers of a layer, for `end` positions at least, of keys like these [any, kv_heads, head_dim].

        Raises:
            MemoryError: the buffers of all layers do not fit.
        """
        held = self.of_layers[layer]
        if held is not None and end <= held[0].shape[2]:
            return held
        if self.capacity < end:
            self.capacity = round_up(max(end, min(2 * self.capacity, self.limit)), ALIGNMENT)
        if self._fitting < self.capacity:
            # If this fails, a shorter sequence may still fit.
            wanted, self.capacity = self.capacity, self._fitting or ALIGNMENT
            self._check_room(like, wanted)
            self._fitting = self.capacity = wanted
        # Zeros: positions after a row's last one are masked, and a mask does not keep NaN out.
        shape = (self.num_rows, like.shape[1], self.capacity, like.shape[2])
        larger = (like.new_zeros(shape), like.new_zeros(shape))
        for new, old in zip(larger, held or (), strict=False):
            new[:, :, : old.shape[2]] = old
        self.of_layers[layer] = larger
        return larger

    def _check_room(self, like: Tensor, capacity: int) -> None:
        """See `with_room`; for each device and the layers on it."""
        # Offloaded layers, on "meta", run where the first one does.
        devices = [like.device if device.type == "meta" else device for device in self._devices]
        devices = devices or [like.device] * len(self.of_layers)
        for device, num_layers in Counter(devices).items():
            row = 2 * num_layers * like.shape[1:].numel() * capacity * like.itemsize
            pairs = (pair for of, pair in zip(devices, self.of_layers, strict=True) if of == device)
            held = sum(part.nbytes for pair in pairs for part in pair or ())
            if (free := held + free_memory(device, self._num_ranks)) < self.num_rows * row:
                fitting = f"; batch_size {free // row} would fit" if free >= row else ""
                raise MemoryError(
                    f"{self.num_rows} times {capacity} positions of keys and values take "
                    f"{self.num_rows * row / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free{fitting}"
                )


class KVCache(Appendable):
    """Keys and values of every layer, for the rows of a batch.

    The buffers of a layer are allocated when it first runs, with the device and dtype of its keys, and are
    appended in place. Rolling back moves a position. Only a generation that outgrows `capacity` copies: the
    buffers double, up to the limit given to `reserve`.

    A pass appends as many positions to each row, and all layers hold the same positions of a row. So two
    lists give all lengths: positions appended to each layer, and how many of these each row misses. The cache
    is *uniform* while all rows have one length.

    Args:
        num_rows: the most at a time. At first there is one, empty.
        devices: of each layer's weights; none: all layers are where the first keys are.
        num_ranks: processes that hold the model together, see `free_memory`.
    """

    def __init__(
        self,
        num_layers: int,
        capacity: int,
        num_rows: int = 1,
        devices: Sequence[torch.device] = (),
        num_ranks: int = 1,
    ) -> None:
        self.buffers = _Buffers(num_layers, num_rows, round_up(capacity, ALIGNMENT), devices, num_ranks)
        self._first_row = 0
        self._appended = [0] * num_layers  # by layer
        self._decided = 0  # appended to every layer when the last round began
        self._missing = [0]  # by row: how many of the appended positions it misses
        self._missing_on_device: Tensor | None = None  # the same on the device, [B, 1]

    def clear(self, num_rows: int = 1) -> None:
        """Empty the cache, and have so many rows."""
        self._appended, self._decided = [0] * len(self._appended), 0
        self._missing, self._missing_on_device = [0] * num_rows, None

    @property
    def num_rows(self) -> int:
        """B: rows that hold a sequence."""
        return len(self._missing)

    @property
    def capacity(self) -> int:
        """Positions of a row."""
        return self.buffers.capacity

    def reserve(self, num_positions: int, limit: int) -> None:
        """Allocate later buffers for so many positions; see `limit_growth`."""
        self.buffers.capacity = max(self.capacity, round_up(num_positions, ALIGNMENT))
        self.limit_growth(limit)

    def limit_growth(self, num_positions: int) -> None:
        """Let buffers grow to so many positions at most: no row can reach more."""
        self.buffers.limit = num_positions

    @property
    def is_uniform(self) -> bool:
        return all(missing == self._missing[0] for missing in self._missing)

    def length(self, layer: int, row: int = 0) -> int:
        """Positions of a row in a layer."""
        return self._appended[layer] - self._missing[row]

    def longest(self, layer: int) -> int:
        """Positions of the longest row in a layer."""
        return self._appended[layer] - min(self._missing)

    def positions(self, layer: int, width: int, device: torch.device) -> Tensor:
        """[B, T] the next T positions of each row in a layer, on the device."""
        if self._missing_on_device is None:
            self._missing_on_device = on_device(self._missing, device)[:, None]
        start = self._appended[layer]
        return torch.arange(start, start + width, device=device) - self._missing_on_device

    def append(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        rows = len(self._missing)
        total, heads, size = keys.shape
        width = total // rows
        start = self._appended[layer] - self._missing[0]
        end = start + width
        all_keys, all_values = self.buffers.with_room(layer, end, keys)
        self._appended[layer] += width
        # Views by shape and strides: one call each, instead of a slice per dimension.
        of_row, of_head = all_keys.stride(0), all_keys.stride(1)
        first = self._first_row * of_row
        new, new_strides = (rows, width, heads, size), (of_row, size, of_head, 1)
        if rows > 1:
            keys, values = keys.view(new), values.view(new)
        all_keys.as_strided(new, new_strides, first + start * size).copy_(keys)
        all_values.as_strided(new, new_strides, first + start * size).copy_(values)
        held, strides = (rows * heads, 1, end, size), (of_head, of_head, size, 1)
        return all_keys.as_strided(held, strides, first), all_values.as_strided(held, strides, first)

    def room_for(self, layer: int, width: int) -> tuple[Tensor, Tensor]:
        """Of a cache of one row, the buffers [1 or more, kv_heads, capacity, head_dim] of a layer, with room
        for T more positions. The row comes first. The caller writes them, then calls `advance`.
        """
        held, end = self.buffers.of_layers[layer], self.length(layer) + width
        assert held is not None
        if end > held[0].shape[2]:
            held = self.buffers.with_room(layer, end, held[0][:, :, 0])
        return held if self._first_row == 0 else (held[0][self._first_row :], held[1][self._first_row :])

    def scattered(self, positions: Tensor, first: int, last: int) -> WrittenAt:
        """What layers first..last-1 append to at positions [B, T], for rows that differ in length."""
        width = positions.shape[1]
        end = round_up(self.longest(first) + width, ALIGNMENT)
        for layer in range(first, last):
            held = self.buffers.of_layers[layer]
            if held is not None:
                self.buffers.with_room(layer, end, held[0][:, :, 0])
        self.advance(first, last, width)
        return WrittenAt(self.buffers.of_layers, positions, end)

    def advance(self, first: int, last: int, width: int) -> None:
        """Count T positions as appended to layers first..last-1."""
        self._appended[first:last] = [n + width for n in self._appended[first:last]]

    def rollback(self, num_tokens: int | Sequence[int]) -> None:
        """Drop the last positions of every layer.

        Args:
            num_tokens: of all rows, or [B] of each.

        Raises:
            ValueError: a layer holds fewer positions than that.
        """
        forgotten = [num_tokens] * self.num_rows if isinstance(num_tokens, int) else num_tokens
        least = min(self._appended)
        for number, missing in zip(forgotten, self._missing, strict=True):
            if not 0 <= number <= least - missing:
                raise ValueError(
                    f"cannot roll back {number} positions of a cache that holds {least - missing}"
                )
        if any(forgotten):
            self._missing = [sum(pair) for pair in zip(self._missing, forgotten, strict=True)]
            self._missing_on_device = None
        self._decided = least

    def forget_draft(self) -> None:
        """Drop what was appended to some layers since the last `rollback` or `add_row`."""
        self._appended = [self._decided] * len(self._appended)

    def row(self, row: int, length: int = 0) -> KVCache:
        """A one-row view of slot `row`, with its first `length` positions."""
        alone = copy.copy(self)
        alone.clear()
        alone._first_row, alone._decided = row, length
        alone._appended = [length] * len(self._appended)
        return alone

    def add_row(self, length: int) -> None:
        """Append a row whose `length` positions are in its slot already."""
        self._settle()
        if not self._missing:
            self._appended = [length] * len(self._appended)
        self._missing.append(self._appended[0] - length)
        self._decided, self._missing_on_device = self._appended[0], None

    def remove_row(self, row: int, damaged: bool = False, keep: bool = False) -> None:
        """Move the last row to the slot of this one, then shrink.

        Args:
            damaged: its slot may hold NaN, which no mask keeps from a later row: fill it with zeros.
            keep: swap the two slots. Otherwise the row is overwritten.
        """
        self._settle()
        last = self.num_rows - 1
        if damaged:
            for buffer in self._all_buffers():
                buffer[row].zero_()
        if keep:
            self.swap(row, last, max(self.length(0, row), self.length(0, last)))
        elif row != last:
            length = self.length(0, last)
            for buffer in self._all_buffers():
                buffer[row, :, :length] = buffer[last, :, :length]
        self._missing[row] = self._missing[last]
        self._missing.pop()
        self._missing_on_device = None

    def swap(self, slot: int, other: int, length: int) -> None:
        """Exchange the first `length` positions of two slots."""
        if slot != other:
            for buffer in self._all_buffers():
                one, another = buffer[slot, :, :length], buffer[other, :, :length]
                held = one.clone()
                one.copy_(another)
                another.copy_(held)

    def _all_buffers(self) -> Iterator[Tensor]:
        return (part for held in self.buffers.of_layers for part in held or ())

    def pretend(self, lengths: Sequence[int]) -> None:
        """Take each row to have so many positions in every layer, to time passes. Every layer must have run
        before.
        """
        self._appended = [max(lengths)] * len(self._appended)
        self._missing = [max(lengths) - length for length in lengths]
        self._decided, self._missing_on_device = max(lengths), None

    def _settle(self) -> None:
        """Count what the first layer has for all layers: those beyond an early exit never run."""
        self._appended = [self._appended[0]] * len(self._appended)


class WrittenAt(Appendable):
    """Writes keys and values at positions given as a tensor, for a pass that masks row by row.

    Args:
        buffers: by layer.
        positions: [B, T]
        length: S, positions that attention reads.
    """

    def __init__(
        self, buffers: Sequence[tuple[Tensor, Tensor] | None], positions: Tensor, length: int
    ) -> None:
        self._buffers, self._positions, self.length = buffers, positions, length
        # Of row, head and position: [B, 1, 1], [kv_heads], [B, T, 1].
        self._index: tuple[Tensor, ...] = ()

    def append(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        held = self._buffers[layer]
        assert held is not None
        (rows, width), (_, heads, _, size) = self._positions.shape, held[0].shape
        if not self._index:
            all_rows, all_heads = (torch.arange(n, device=self._positions.device) for n in (rows, heads))
            self._index = (all_rows[:, None, None], all_heads, self._positions[:, :, None])
        index = tuple(part.to(keys.device) for part in self._index)  # layers may be on several devices
        for buffer, new in zip(held, (keys, values), strict=True):
            buffer.index_put_(index, new.view(rows, width, heads, size))
        all_keys, all_values = (buffer[:rows, :, : self.length] for buffer in held)
        return all_keys, all_values
