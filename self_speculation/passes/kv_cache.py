"""The KV cache of the sequences in flight: allocate, append, roll back by count.

Keys and values come in two ways: `KVCache.append` writes to rows of one length, and the caller of
`KVCache.extend` writes by position.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from self_speculation.devices import free_memory, round_up
from self_speculation.transfers import on_device

# Attention kernels need masks, and so lengths, in multiples of so many positions.
ALIGNMENT = 8

# On a CPU a new cache has room for the prompt, and for this many positions divided by the number of slots.
# On a GPU it has room for all that its requests can reach, or takes this share of the free memory.
_FIRST_ALLOCATION, _SHARE = 1024, 0.9

Pair = tuple[Tensor, Tensor]  # keys and values


class Buffers:
    """Keys and values by layer, each [slots, kv_heads, capacity, head_dim], of layers that have run.

    Args:
        devices: [L] of each layer's weights.
        num_slots: the most rows at a time.
    """

    def __init__(self, devices: Sequence[torch.device], num_slots: int = 1) -> None:
        self.num_layers, self.num_slots, self.capacity = len(devices), num_slots, ALIGNMENT
        self._devices = devices
        self.limit = sys.maxsize  # the most positions that a row can reach
        self.least = 0  # positions of the latest prompt: without room for all of it, none is read
        self.of_layers: dict[int, Pair] = {}
        self._fitting = 0  # a capacity that fits in memory

    @property
    def is_on_gpu(self) -> bool:
        return any(device.type not in ("cpu", "meta") for device in self._devices)

    def all(self) -> Iterator[Tensor]:
        return (part for pair in self.of_layers.values() for part in pair)

    def with_room(self, layer: int, end: int, new_keys: Tensor | None = None) -> Pair:
        """The buffers of a layer, grown to at least `end` positions.

        Args:
            new_keys: [any, kv_heads, head_dim], of a layer that may run for the first time.

        Raises:
            MemoryError: the buffers of all layers do not fit.
        """
        old = self.of_layers.get(layer)
        if old is not None and end <= old[0].shape[2]:
            return old
        like = new_keys if old is None else old[0]  # [.., kv_heads, .., head_dim]
        assert like is not None  # a pass by position follows one over a prompt
        if self.capacity < end:
            self.capacity = round_up(max(end, min(2 * self.capacity, self.limit)), ALIGNMENT)
        try:
            if self._fitting < self.capacity:
                self.capacity = self._fitting = self._fit(like, max(end, self.least))
            # Zeros: a mask does not keep NaN out of positions after a row's last one.
            shape = (self.num_slots, like.shape[1], self.capacity, like.shape[-1])
            larger = (like.new_zeros(shape), like.new_zeros(shape))
        except (MemoryError, RuntimeError):  # a shorter sequence may still fit
            has_all = len(self.of_layers) == self.num_layers
            self._fitting = min(part.shape[2] for part in self.all()) if has_all else 0
            self.capacity = self._fitting or ALIGNMENT
            raise
        for new, part in zip(larger, old or (), strict=False):
            new[:, :, : part.shape[2]] = part
        self.of_layers[layer] = larger
        return larger

    def _fit(self, like: Tensor, end: int) -> int:
        """The capacity, or as much of it as fits. Raises MemoryError if `end` positions do not."""
        # Offloaded layers, on "meta", run on the first layer's device.
        devices = [like.device if device.type == "meta" else device for device in self._devices]
        capacity, end = self.capacity, round_up(end, ALIGNMENT)
        for device, num_layers in Counter(devices).items():
            position = 2 * num_layers * like.shape[1] * like.shape[-1] * like.itemsize
            pairs = (pair for layer, pair in self.of_layers.items() if devices[layer] == device)
            taken = sum(part.nbytes for pair in pairs for part in pair)
            free, row = taken + free_memory(device), end * position
            if free < self.num_slots * row:
                fitting = f"; batch_size {free // row} would fit" if free >= row else ""
                raise MemoryError(
                    f"{self.num_slots} times {end} positions of keys and values take "
                    f"{self.num_slots * row / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free{fitting}"
                )
            most = int(_SHARE * free) // (self.num_slots * position) // ALIGNMENT * ALIGNMENT
            capacity = min(capacity, max(end, most))
        return capacity


class KVCache:
    """Keys and values of every layer, for the rows of a batch. At first there is one row, empty.

    The buffers of a layer are allocated when it first runs, with the device and dtype of its keys. Appending
    writes in place, and rolling back moves a position. Buffers that are too small double, up to a limit.

    A pass appends equally many positions to each row, so length(row, layer) = appended[layer] - missing[row].
    A row misses the positions that were rolled back, and those by which it was shorter than the longest row.
    The cache is *uniform* while all rows have one length.
    """

    is_prompt = False  # the kind of the next tokens: a prompt's, or output
    first_slot: int  # of row 0

    def __init__(self, buffers: Buffers) -> None:
        self.buffers, self.first_slot = buffers, 0
        self.set_rows([0])

    def set_rows(self, lengths: Sequence[int]) -> None:
        """Set row lengths; keys and values are already in the slots."""
        self._committed = max(lengths, default=0)  # positions of every layer after the last round
        self._appended = [self._committed] * self.buffers.num_layers  # by layer
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
        first = num_positions
        if not self.buffers.is_on_gpu:
            first = min(first, prompt_length + _FIRST_ALLOCATION // self.buffers.num_slots)
        self.buffers.capacity = max(self.buffers.capacity, round_up(first, ALIGNMENT))
        self.buffers.limit, self.buffers.least = num_positions, prompt_length

    @property
    def is_valid(self) -> bool:
        """Whether no other cache has the buffers."""
        return True

    @property
    def is_uniform(self) -> bool:
        return all(missing == self._missing[0] for missing in self._missing)

    def lengths(self, layer: int = 0) -> list[int]:
        """[B] positions of each row in a layer. Layers beyond an early exit never run; the first one does."""
        return [self._appended[layer] - missing for missing in self._missing]

    def positions(self, layer: int, width: int, device: torch.device) -> Tensor:
        """[B, T] the next T positions of each row in a layer."""
        if self._missing_on_device is None:
            self._missing_on_device = on_device(self._missing, device)[:, None]
        start = self._appended[layer]
        return torch.arange(start, start + width, device=device) - self._missing_on_device

    def append(self, keys: Tensor, values: Tensor, layer: int) -> Pair:
        """Append T positions to each of B rows of one length.

        Args:
            keys, values: [B * T, kv_heads, head_dim], row by row.

        Returns:
            Views of all keys and values of the layer, [B, kv_heads, S, head_dim].
        """
        rows, start = self.num_rows, self.lengths(layer)[0]
        width = len(keys) // rows
        slots, end = slice(self.first_slot, self.first_slot + rows), start + width
        buffers = self.extend(layer, layer + 1, width, keys)
        for buffer, new in zip(buffers, (keys, values), strict=True):
            buffer[slots, :, start:end] = new.view(rows, width, *new.shape[1:]).transpose(1, 2)
        all_keys, all_values = (buffer[slots, :, :end] for buffer in buffers)
        return all_keys, all_values

    def extend(self, first: int, last: int, width: int, new_keys: Tensor | None = None) -> list[Tensor]:
        """Add T positions to each row in layers first..last-1. The caller writes them.

        Args:
            new_keys: [any, kv_heads, head_dim], of layers that may run for the first time.

        Returns:
            Keys and values of these layers, all slots, with room for the new positions.
        """
        end = max(self.lengths(first)) + width
        pairs = [self.buffers.with_room(layer, end, new_keys) for layer in range(first, last)]
        self._appended[first:last] = [n + width for n in self._appended[first:last]]
        return [part for pair in pairs for part in pair]

    def rollback(self, num_tokens: int | Sequence[int]) -> None:
        """Drop the last positions of every layer.

        Args:
            num_tokens: of all rows, or [B] of each; at most what each layer has.
        """
        dropped = [num_tokens] * self.num_rows if isinstance(num_tokens, int) else num_tokens
        self._committed = min(self._appended)
        if any(dropped):
            self._missing = [sum(pair) for pair in zip(self._missing, dropped, strict=True)]
            self._missing_on_device = None
            assert min(dropped) >= 0 <= self._committed - max(self._missing)

    def rollback_draft(self) -> None:
        """Drop positions appended since the last `rollback` or `set_rows`."""
        self._appended = [self._committed] * len(self._appended)

    def prompt_view(self, slot: int, lengths: Sequence[int] = (0,)) -> KVCache:
        """A view of this slot and those after it, to prefill them after so many positions of each."""
        view = copy.copy(self)
        view.first_slot, view.is_prompt = slot, True
        view.set_rows(lengths)
        return view

    def add_row(self, length: int) -> None:
        """Add a row whose `length` positions are already in its slot."""
        self.set_rows([*self.lengths(), length])

    def remove_row(self, row: int) -> None:
        """Swap the slots of this row and the last one, then shrink."""
        lengths, last = self.lengths(), self.num_rows - 1
        self.swap(row, last, max(lengths[row], lengths[last]))
        lengths[row] = lengths[last]
        self.set_rows(lengths[:-1])

    def clear_slot(self, slot: int) -> None:
        """Fill it with zeros: it may hold NaN, and a mask does not keep NaN out."""
        for buffer in self.buffers.all():
            buffer[slot].zero_()

    def swap(self, slot: int, other: int, length: int) -> None:
        """Exchange the first `length` positions of two slots. It allocates nothing, so memory cannot run out
        when some layers are exchanged and others are not.
        """
        if slot == other:
            return
        for buffer in self.buffers.all():
            bits = buffer[:, :, :length].view(getattr(torch, f"int{8 * buffer.itemsize}"))
            one, another = bits[slot], bits[other]
            for target, source in ((one, another), (another, one), (one, another)):
                target.bitwise_xor_(source)


class ScatteredCache:
    """Writes keys and values at positions [B, T] to the buffers of layers, for a pass that masks row by row.
    Attention reads `length` positions, S. Row 0 is in `first_slot`.
    """

    def __init__(
        self, buffers: Mapping[int, Pair], positions: Tensor, length: int, first_slot: int = 0
    ) -> None:
        self._buffers, self.positions, self.length = buffers, positions, length
        self.num_rows, self._first_slot = len(positions), first_slot
        # Of row, head and position: [B, 1, 1], [kv_heads], [B, T, 1].
        self._index: tuple[Tensor, ...] = ()

    def append(self, keys: Tensor, values: Tensor, layer: int) -> Pair:
        """As `KVCache.append`. Returns views [B, kv_heads, S, head_dim], of which a mask selects those of
        each row.
        """
        pair = self._buffers[layer]
        (rows, width), (_, heads, _, size) = self.positions.shape, pair[0].shape
        if not self._index:
            all_rows, all_heads = (torch.arange(n, device=self.positions.device) for n in (rows, heads))
            slots = all_rows[:, None, None] + self._first_slot
            self._index = (slots, all_heads, self.positions[:, :, None])
        index = tuple(part.to(keys.device) for part in self._index)  # layers may be on several devices
        for buffer, new in zip(pair, (keys, values), strict=True):
            buffer.index_put_(index, new.view(rows, width, heads, size))
        first = self._first_slot
        all_keys, all_values = (buffer[first : first + rows, :, : self.length] for buffer in pair)
        return all_keys, all_values
