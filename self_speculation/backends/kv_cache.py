"""The KV cache of the sequences in flight: append, roll back by count, share and move slots."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from self_speculation.backends.buffers import Buffers, Pair, SharedPrefix
from self_speculation.machine.transfers import on_device, overwrite

# On a CPU a new cache has room for the prompt, and for this many positions divided by the number of slots.
_FIRST_ALLOCATION = 1024

# Bits that mark a number beyond float16's range: a NaN that arithmetic never gives. It spreads to all tokens
# that see it. An infinite key would get weight 0 or 1.
_BEYOND_RANGE = 0x7FFF


def rounded(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys or values in the dtype of a cache, as the operators round them (up to the sign of a NaN)."""
    if numbers.dtype == dtype or dtype != torch.float16:
        return numbers.to(dtype)
    result = numbers.to(dtype)
    bits = result.view(torch.int16)
    bits[result.isinf()] = _BEYOND_RANGE
    return result


class KVCache:
    """Keys and values of every layer, for the rows of a batch. At first there is one row, empty.

    The buffers of a layer are allocated when it first runs. Appending writes in place, and rolling back moves
    a position. The capacity grows by a quarter. Buffers without addresses for it are copied.

    A pass appends positions to each row in a range of layers: one for each new token of the row.
    """

    is_prompt = False  # the kind of the next tokens: a prompt's, or output
    first_slot: int  # of row 0

    def __init__(self, buffers: Buffers) -> None:
        buffers.num_caches += 1
        self.buffers = buffers
        self.first_slot = 0
        self._number = buffers.num_caches
        self.set_rows([0])
        self._prefix_reads = list[int]()  # what the device has once it comes to it
        self.read_together(0, [])

    def set_rows(self, lengths: Sequence[int]) -> None:
        """Set row lengths; keys and values are already in the slots."""
        self._committed = [*lengths]  # [B] of every layer after the last round
        self._lengths = [self._committed] * self.buffers.num_layers  # by layer, [B] each
        # How much shorter each row is than the longest one, and the same on the device, [B, 1].
        self._missing: tuple[list[int], Tensor] | None = None

    @property
    def num_rows(self) -> int:
        """B: rows that have a sequence."""
        return len(self._committed)

    def reserve(self, prompt_length: int, num_positions: int) -> None:
        """Make room for a sequence.

        Args:
            prompt_length: positions of the prompt.
            num_positions: the most that it or one in flight can reach, prompt included.

        Raises:
            MemoryError: the prompt does not fit.
            RuntimeError: see `check`.
        """
        wanted = num_positions
        if self.buffers.grows:
            wanted = min(wanted, prompt_length + _FIRST_ALLOCATION // self.buffers.num_slots)
        with self.buffers.lock:
            self.check()
            self.buffers.reserve(wanted, prompt_length)

    @property
    def is_latest(self) -> bool:
        """Whether this is the latest cache over its buffers."""
        return self._number == self.buffers.num_caches

    def check(self) -> None:
        """Raises RuntimeError if a later cache has the buffers: captured passes have one cache."""
        if not self.is_latest:
            why = "another generation has this one's cache; let one end before the next begins"
            raise RuntimeError(f"compile True: {why}")

    def lengths(self, layer: int = 0) -> list[int]:
        """[B] positions of each row in a layer. Layers beyond an early exit never run; the first one does."""
        return self._lengths[layer]

    def positions(self, layer: int, width: int, device: torch.device) -> Tensor:
        """[B, T] the next T positions of each row in a layer."""
        lengths = self.lengths(layer)
        longest = max(lengths)
        missing = [longest - length for length in lengths]
        if self._missing is None or self._missing[0] != missing:
            self._missing = missing, on_device(missing, device)[:, None]
        return torch.arange(longest, longest + width, device=device) - self._missing[1]

    def write(self, keys: Tensor, values: Tensor, layer: int, positions: Tensor | None = None) -> Pair:
        """Write the next T positions of each of B rows. `extend` makes them positions of the rows.

        Args:
            keys, values: [B * T, kv_heads, head_dim], row by row.
            positions: [B, T], see `positions`; None: rows have one length.

        Returns:
            Views of the layer's keys and values, [B, kv_heads, S, head_dim], S positions of the longest row,
            in the dtype of the cache.
        """
        rows = self.num_rows
        slots = slice(self.first_slot, self.first_slot + self.num_rows)
        width = len(keys) // rows
        end = max(self.lengths(layer)) + width
        all_keys, all_values = (buffer[slots] for buffer in self.make_room(layer, layer + 1, [width] * rows))
        for buffer, new in ((all_keys, keys), (all_values, values)):
            by_row = rounded(new, self.buffers.dtype).view(rows, width, *new.shape[1:])
            if positions is None:
                buffer[:, :, end - width : end] = by_row.transpose(1, 2)
            else:  # layers may be on several devices
                by_slot = torch.arange(rows, device=buffer.device)[:, None]
                buffer[by_slot, :, positions.to(buffer.device)] = by_row
        return all_keys[:, :, :end], all_values[:, :, :end]

    def make_room(self, start_layer: int, end_layer: int, query_lengths: Sequence[int]) -> list[Tensor]:
        """Keys and values of layers [start_layer:end_layer], all slots, with room for the new positions."""
        ends = [sum(pair) for pair in zip(self.lengths(start_layer), query_lengths, strict=True)]
        pairs = [self.buffers.with_room(layer, max(ends)) for layer in range(start_layer, end_layer)]
        used = self.buffers.num_used
        for slot, end in enumerate(ends, self.first_slot):
            used[slot] = max(used[slot], end)
        return [part for pair in pairs for part in pair]

    def extend(self, start_layer: int, end_layer: int, query_lengths: Sequence[int]) -> None:
        """Count the new positions [B] that layers [start_layer:end_layer] have written for each row."""
        longer = [sum(pair) for pair in zip(self.lengths(start_layer), query_lengths, strict=True)]
        self._lengths[start_layer:end_layer] = [longer] * (end_layer - start_layer)

    def rollback(self, num_tokens: int | Sequence[int]) -> None:
        """Drop the last positions of every layer, after all layers have had the same tokens.

        Args:
            num_tokens: of all rows, or [B] of each; at most what each layer has.
        """
        dropped = [num_tokens] * self.num_rows if isinstance(num_tokens, int) else num_tokens
        kept = [length - number for length, number in zip(self.lengths(-1), dropped, strict=True)]
        assert min(dropped) >= 0 <= min(kept)
        self._committed = kept
        self.rollback_draft()

    def rollback_draft(self) -> None:
        """Drop positions that were added since the last `rollback` or `set_rows`."""
        self._lengths = [self._committed] * len(self._lengths)

    def prompt_view(self, slot: int, lengths: Sequence[int] = (0,)) -> KVCache:
        """A view of the slots from this one on, to read prompts; lengths: positions that each has already."""
        view = copy.copy(self)
        view.first_slot = slot
        view.is_prompt = True
        view.set_rows(lengths)
        return view

    def remove_row(self, row: int) -> None:
        """Swap the slots of this row and the last one, then shrink."""
        lengths = [*self.lengths()]
        last = self.num_rows - 1
        self.swap(row, last, max(lengths[row], lengths[last]))
        lengths[row] = lengths[last]
        self.set_rows(lengths[:-1])

    def is_finite(self, slot: int, length: int) -> bool:
        """Whether the first `length` positions of a slot are finite, in all layers."""
        parts = (self.positions_of(buffer, slot, length) for buffer in self.buffers.all())
        return all(bool(part.isfinite().all()) for part in parts)

    def positions_of(self, buffer: Tensor, slot: int, length: int) -> Tensor:
        """[kv_heads, length, head_dim] the first positions of a slot."""
        prefix = self.buffers.shared_prefixes[slot]
        shared = buffer[prefix.slot, :, : min(prefix.length, length)]
        return torch.cat((shared, buffer[slot, :, prefix.length : length]), 1)

    def set_prefix(self, slot: int, prefix: SharedPrefix) -> None:
        """Let a slot refer to another one for its first positions. Memory without readers is given back."""
        before = self.buffers.shared_prefixes[slot]
        if prefix == before:
            return
        self.buffers.shared_prefixes[slot] = prefix
        if prefix.length < before.length:  # what follows is another text's
            self.buffers.zero_and_free(slot, self.buffers.num_used[slot])
            self.buffers.num_used[slot] = 0
        self.buffers.zero_and_free(slot, prefix.length)
        if before.length and not self.is_shared(before.slot):
            self.buffers.zero_and_free(before.slot, self.buffers.num_used[before.slot])
            self.buffers.num_used[before.slot] = 0

    def is_shared(self, slot: int) -> bool:
        """Whether a slot refers to this one."""
        return any(each.length and each.slot == slot for each in self.buffers.shared_prefixes)

    def copy_prefix(self, slot: int, prefix: SharedPrefix) -> None:
        """Copy the first positions of a slot to the slot of the prefix, and let the slot refer to it."""
        for buffer in self.buffers.all():
            copied = self.positions_of(buffer, slot, prefix.length)
            buffer[prefix.slot, :, : prefix.length] = copied
        self.buffers.num_used[prefix.slot] = prefix.length
        self.set_prefix(slot, prefix)

    def copy_positions(self, source: int, slot: int, length: int) -> None:
        """Copy the first positions of a slot to another one. Raises RuntimeError, see `check`."""
        with self.buffers.lock:
            self.check()
            for buffer in self.buffers.all():
                buffer[slot, :, :length] = buffer[source, :, :length]
        self.buffers.num_used[slot] = max(self.buffers.num_used[slot], length)

    def read_together(self, slot: int, lengths: Sequence[int]) -> None:
        """Let a card read the first positions of rows in one slot, [B] of each; 0: none. Raises RuntimeError,
        see `check`.
        """
        numbers = [slot, *lengths]
        numbers += [0] * (len(self.buffers.prefix_reads) - len(numbers))
        if numbers != self._prefix_reads:
            with self.buffers.lock:
                self.check()
                overwrite(self.buffers.prefix_reads, numbers)
            self._prefix_reads = numbers

    def beyond_range(self, slot: int, length: int) -> int | None:
        """The first of `length` positions of a slot with a number beyond float16's range, in the first layer
        that has one; None: there is none.
        """
        if self.buffers.dtype != torch.float16:
            return None
        buffers = self.buffers.all()
        numbers = (self.positions_of(buffer, slot, length).view(torch.int16) for buffer in buffers)
        found = ((each & _BEYOND_RANGE == _BEYOND_RANGE).any(-1).any(0).nonzero() for each in numbers)
        return next((int(positions[0]) for positions in found if len(positions)), None)

    def clear_slot(self, slot: int) -> None:
        """Fill it with zeros: it may hold NaN, and a mask does not keep NaN out."""
        end = self.buffers.num_used[slot] if self.buffers.grows else self.buffers.capacity
        self.buffers.zero_and_free(slot, end)
        self.buffers.num_used[slot] = 0

    def swap(self, slot: int, other: int, length: int) -> None:
        """Exchange the first `length` positions of two slots. It allocates nothing, so memory cannot run out
        when only a part of the layers is exchanged. Raises RuntimeError, see `check`.
        """
        if slot == other:
            return
        with self.buffers.lock:
            self.check()
            self._swap(slot, other, length)

    def _swap(self, slot: int, other: int, length: int) -> None:
        used = self.buffers.num_used
        for each in (slot, other):
            used[each] = max(used[each], length)
        prefixes = self.buffers.shared_prefixes
        first = min(prefixes[slot].length, prefixes[other].length)
        prefixes[slot], prefixes[other] = prefixes[other], prefixes[slot]
        for buffer in self.buffers.all():
            bits = buffer[:, :, first:length].view(getattr(torch, f"int{8 * buffer.itemsize}"))
            one, another = bits[slot], bits[other]
            for target, source in ((one, another), (another, one), (one, another)):
                target.bitwise_xor_(source)
        for each in (slot, other):
            if prefixes[each].length > first:
                self.buffers.zero_and_free(each, prefixes[each].length)
