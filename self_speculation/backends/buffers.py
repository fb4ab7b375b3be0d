"""Memory of keys and values: allocate, grow, give back."""

from __future__ import annotations

import math
import mmap
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from self_speculation.machine.devices import (
    RESERVED_ADDRESSES,
    free_addresses,
    free_memory,
    padded,
    round_up,
)  # fmt: skip

# Capacities are multiples of it, and so are rows of masks: attention kernels want them aligned.
ALIGNMENT = 8

# On a GPU buffers have room for all that requests can reach, or take this share of the free memory: prompts,
# graphs and sampling need the rest.
_SHARE = 0.8

Pair = tuple[Tensor, Tensor]  # keys and values

# Positions of a block. Rows share whole blocks: the operators read so many keys at a time.
PREFIX_BLOCK = 64

# Memory of tensors by `zeros`, by address.
_MAPPED: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of zeros. On a CPU it takes neither time nor memory until it is written.

    `torch.zeros` writes the memory at once. All rows waited when all slots grew in one step.
    """
    if device.type != "cpu" or not math.prod(shape):
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    if size + RESERVED_ADDRESSES > free_addresses():
        raise MemoryError("no memory for keys and values")
    try:
        memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError("no memory for keys and values") from error
    if hasattr(mmap, "MADV_NOHUGEPAGE"):  # each head of each slot would take 2 MiB and more
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    made = torch.frombuffer(memory, dtype=dtype).view(*shape)
    _MAPPED[made.data_ptr()] = memory
    return made


class SharedPrefix(NamedTuple):
    """The first positions of a row, in a slot that several rows read."""

    slot: int = 0
    length: int = 0  # a multiple of PREFIX_BLOCK; 0: the row shares nothing


class Buffers:
    """Keys and values by layer, each [slots, kv_heads, capacity, head_dim], of layers that have run.

    Args:
        devices: [L] of each layer.
        key_shape: kv_heads and head_dim.
        num_slots: the most rows at a time.
        num_prefix_slots: slots after these for positions that several rows share.
        longest: on a CPU a slot has addresses for so many positions from the beginning, if the system has
            them. They take memory as they are written, and growing copies nothing.

    Attributes:
        capacity: positions of a slot that had memory when it was last asked for.
        lock: held from the check of a cache to the last launch over the buffers, and while another generation
            takes the buffers.
        prefix_reads: [1 + rows] a slot, and how many of the first positions the kernels of a card read there
            for each row. The row has the same keys and values.
    """

    def __init__(
        self,
        devices: Sequence[torch.device],
        key_shape: tuple[int, int],
        dtype: torch.dtype,
        num_slots: int = 1,
        num_prefix_slots: int = 0,
        longest: int = 0,
    ) -> None:
        self.num_layers = len(devices)
        self.num_slots = num_slots
        self.prefix_slots = range(num_slots, num_slots + num_prefix_slots)
        self.shared_prefixes = [SharedPrefix()] * (num_slots + num_prefix_slots)  # by slot
        self.capacity = 0
        num_rows = padded(num_slots)  # passes are captured for so many
        self.prefix_reads = torch.zeros(1 + num_rows, dtype=torch.long, device=devices[0])
        self._devices = devices
        self.key_shape = key_shape
        self.dtype = dtype
        self.grows = all(device.type == "cpu" for device in devices)  # else there is room for all at once
        # In all layers or in none: the first ones would leave nothing to the last.
        size = 2 * len(devices) * len(self.shared_prefixes) * math.prod(key_shape) * longest * dtype.itemsize
        has_addresses = self.grows and size + RESERVED_ADDRESSES <= free_addresses()
        self._longest = longest if has_addresses else 0
        self.by_layer: dict[int, Pair] = {}
        # On a CPU: positions that may have been written. Later ones are zero.
        self.num_used = [0] * len(self.shared_prefixes)
        self.num_caches = 0  # the last one has the buffers
        self.lock: AbstractContextManager = nullcontext()  # there is one cache

    def all(self) -> Iterator[Tensor]:
        return (part for pair in self.by_layer.values() for part in pair)

    def reserve(self, num_positions: int, least: int) -> None:
        """Raise the capacity to `num_positions`, or as far as memory allows.

        Raises:
            MemoryError: `least` positions do not fit, in all layers.
        """
        if num_positions > self.capacity:
            fitting = self._fit(round_up(num_positions, ALIGNMENT), round_up(least, ALIGNMENT))
            self.capacity = max(fitting, self.capacity_of_all)

    def with_room(self, layer: int, end: int) -> Pair:
        """The buffers of a layer, grown to at least `end` positions. Raises MemoryError as `reserve`."""
        if end > self.capacity:
            self.reserve(end + end // 4, end)
        old = self.by_layer.get(layer)
        if old is not None and end <= old[0].shape[2]:
            return old
        kv_heads, head_dim = self.key_shape
        shape = (len(self.shared_prefixes), kv_heads, max(self.capacity, self._longest), head_dim)
        device = self._devices[layer]
        try:
            # Zeros: a mask does not keep NaN out of positions after a row's last one.
            keys, values = (zeros(shape, self.dtype, device) for _ in range(2))
        except (MemoryError, RuntimeError):
            if self._longest > self.capacity:  # `ulimit -v`, or a system that counts addresses as memory
                self._longest = 0
                return self.with_room(layer, end)
            # A shorter sequence may still fit.
            self.capacity = self.capacity_of_all
            raise
        for new, part in zip((keys, values), old or (), strict=False):
            if not self.grows:
                new[:, :, : part.shape[2]] = part
                continue
            for slot, number in enumerate(self.num_used):
                first = self.shared_prefixes[slot].length
                new[slot, :, first : min(number, part.shape[2])] = part[slot, :, first:number]
        self.by_layer[layer] = keys, values
        return keys, values

    def zero_and_free(self, slot: int, length: int) -> None:
        """Zero the first positions of a slot. On a CPU, return whole pages to the system."""
        for buffer in self.all():
            memory = _MAPPED.get(buffer.data_ptr())
            for head in buffer[slot, :, :length]:
                numbers = head.view(-1)
                start = numbers.data_ptr() - buffer.data_ptr()
                first = round_up(start, mmap.PAGESIZE)
                size = (start + numbers.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
                if memory is None or size <= 0:
                    numbers.zero_()
                    continue
                memory.madvise(mmap.MADV_DONTNEED, first, size)
                numbers[: (first - start) // buffer.itemsize].zero_()
                numbers[(first + size - start) // buffer.itemsize :].zero_()

    @property
    def capacity_of_all(self) -> int:
        """The capacity that the buffers of all layers have now; 0: a layer has not run."""
        has_all = len(self.by_layer) == self.num_layers
        return min(self.capacity, *(part.shape[2] for part in self.all())) if has_all else 0

    def _fit(self, wanted: int, least: int) -> int:
        """The capacity that fits in memory, at most `wanted`. Raises MemoryError if `least` does not fit."""
        for device, num_layers in Counter(self._devices).items():
            position = 2 * num_layers * math.prod(self.key_shape) * self.dtype.itemsize  # of a slot
            taken = sum(part.nbytes for part in self.all() if part.device == device)
            if self.grows:  # other positions take no memory yet
                pairs = zip(self.num_used, self.shared_prefixes, strict=True)
                taken = min(taken, sum(max(0, number - each.length) for number, each in pairs) * position)
            free = taken + free_memory(device)
            row = least * position
            if free < self.num_slots * row:
                fitting = f"; batch_size {free // row} would fit" if free >= row else ""
                raise MemoryError(
                    f"{self.num_slots} times {least} positions of keys and values take "
                    f"{self.num_slots * row / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free{fitting}"
                )
            most = int(_SHARE * free) // (self.num_slots * position) // ALIGNMENT * ALIGNMENT
            wanted = min(wanted, max(least, most))
        return wanted
