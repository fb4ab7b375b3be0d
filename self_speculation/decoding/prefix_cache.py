"""The slots of a KV cache: rows of the batch, prompts that are being read, and what finished requests left.
A prompt with a known prefix is not read again.
"""

import itertools
from collections import abc, deque
from collections.abc import Hashable
from typing import NamedTuple

from transformers import PreTrainedModel

from self_speculation.decoding.sequence import Sequence
from self_speculation.model_cache import cached
from self_speculation.passes.kv_cache import SHARED_UNIT, Beginning, KVCache
from self_speculation.passes.model_runner import ModelRunner


class _Prefix(NamedTuple):
    """What a free slot holds."""

    ids: abc.Sequence[int] = ()
    age: int = 0  # the number of the answer that left it: higher is younger

    def shared(self, prompt: abc.Sequence[int]) -> int:
        """Length of the longest common prefix."""
        pairs = enumerate(zip(self.ids, prompt, strict=False))
        return next((i for i, (a, b) in pairs if a != b), min(len(self.ids), len(prompt)))

    def whole_units(self, prompt: abc.Sequence[int]) -> int:
        """The length of the common beginning, rounded down to units that rows can share."""
        most = min(len(self.ids), len(prompt)) // SHARED_UNIT * SHARED_UNIT
        units = (slice(first, first + SHARED_UNIT) for first in range(0, most, SHARED_UNIT))
        return next((unit.start for unit in units if self.ids[unit] != prompt[unit]), most)


class PrefixCache:
    """Hands out the slots of a KV cache to sequences. Slots of rows come first.

    Args:
        cache: a new one.
        key: equal while the keys and values stay valid; None: no prefixes are kept.
    """

    def __init__(self, cache: KVCache, num_slots: int, key: Hashable = None) -> None:
        self.cache = cache
        self.key = key
        cache.set_rows([])
        self._holders: list[Sequence | _Prefix] = [_Prefix()] * num_slots
        first = cache.buffers.num_slots
        self._beginnings = {first + i: _Prefix() for i in range(cache.buffers.num_beginnings)}  # by slot
        self._answers = itertools.count(1)

    def acquire(self, sequence: Sequence) -> None:
        """Give a sequence the free slot with the longest prefix of the prompt, the oldest one of equals.

        The last token of a prompt is never found: the first step needs the logits after it. A beginning that
        a prompt in flight has, too, is kept once for both.
        """
        prompt = sequence.prompt[:-1]
        free = {slot: held for slot, held in enumerate(self._holders) if isinstance(held, _Prefix)}
        slot = max(free, key=lambda slot: (free[slot].shared(prompt), -free[slot].age, -slot))
        length = free[slot].shared(prompt)
        beginning = self.cache.buffers.beginnings[slot]
        if (shared := self._share(prompt, length)) is not None:
            slot = min(free, key=lambda slot: (free[slot].age, slot))
            beginning = shared
            length = shared.length
        elif length < beginning.length:
            length = length // SHARED_UNIT * SHARED_UNIT
            beginning = Beginning(beginning.slot, length)
        self.cache.set_beginning(slot, beginning)
        sequence.num_cached = length
        sequence.num_computed = length
        self._put(sequence, slot)

    def _share(self, prompt: abc.Sequence[int], least: int) -> Beginning | None:
        """Find the longest beginning that a prompt in flight has, too, and keep it in a slot of beginnings.
        None: it has at most `least` positions, or no such slot is free.
        """
        taken = {slot: held for slot, held in self._beginnings.items() if self.cache.is_shared(slot)}
        kept = [Beginning(slot, held.whole_units(prompt)) for slot, held in taken.items()]
        longest = max(kept, key=lambda each: each.length, default=Beginning())
        in_flight = [
            (_Prefix(each.prompt[: each.num_computed]).whole_units(prompt), -slot)
            for slot, each in enumerate(self._holders)
            if isinstance(each, Sequence)
        ]
        length, slot = max(in_flight, default=(0, 0))
        place = next((place for place in self._beginnings if place not in taken), None)
        if length > max(longest.length, least) and place is not None:
            longest = Beginning(place, length)
            self._beginnings[place] = _Prefix(prompt[:length])
            self.cache.copy_beginning(-slot, longest)
        return longest if longest.length > least else None

    def is_read_by_another(self, sequence: Sequence) -> bool:
        """Whether a prompt that is being read begins as this one, so that sharing is worth a wait."""
        prompt = sequence.prompt[:-1]
        most = 0
        for each in self._holders:
            if isinstance(each, Sequence) and each.num_computed < len(each.prompt):
                length = _Prefix(each.prompt).whole_units(prompt)
                most = max(most, length if length > each.num_computed else 0)
        free = (each.shared(prompt) for each in self._holders if isinstance(each, _Prefix))
        return bool(most and self._beginnings) and most > max(free, default=0)

    def prompt_view(self, sequences: abc.Sequence[Sequence]) -> KVCache:
        """The slots of sequences whose prompts are read in one pass. Slots that are not side by side are
        moved.
        """
        slots = [sequence.slot for sequence in sequences]
        first = self.cache.num_rows
        if slots[0] is not None and slots == [*range(slots[0], slots[0] + len(slots))]:
            first = slots[0]
        for slot, sequence in enumerate(sequences, first):
            self._move(sequence, slot)
        return self.cache.prompt_view(first, [sequence.num_computed for sequence in sequences])

    def join(self, sequence: Sequence) -> None:
        """Make a sequence the next row, in slot B, once the prompt is read."""
        self._move(sequence, self.cache.num_rows)
        self.cache.set_rows([*self.cache.lengths(), sequence.num_computed])

    def _move(self, sequence: Sequence, slot: int) -> None:
        """Swap the slot of a sequence whose prompt is being read with another one, of no row."""
        before = sequence.slot
        other = self._holders[slot]
        assert before is not None
        if before != slot:
            other_length = len(other.ids) if isinstance(other, _Prefix) else other.num_computed
            self.cache.swap(before, slot, max(other_length, sequence.num_computed))
            self._put(other, before)
            self._put(sequence, slot)

    def release(self, sequence: Sequence) -> None:
        """Free the slot of a sequence. Keys and values become a prefix unless the sequence failed, also
        of a part of a prompt. Where a row leaves, the last row takes the place.
        """
        slot = sequence.slot
        sequence.slot = None
        cache = self.cache
        if not cache.is_valid:
            return
        assert slot is not None
        left = _Prefix()
        is_row = slot < cache.num_rows
        length = cache.lengths()[slot] if is_row else sequence.num_computed
        # Logits of a row are numbers. A prompt that is read in part has had none.
        is_damaged = sequence.is_damaged or not (is_row or cache.is_finite(slot, length))
        if isinstance(sequence.error, FloatingPointError):
            beyond = cache.beyond_range(slot, min(length, sequence.length))
            if beyond is not None:
                where = f"a key or value at position {beyond} of prompt and answer"
                why = f"cache_dtype float16: {where} is beyond 65504; bfloat16 and float32 have it"
                sequence.error = FloatingPointError(why)
        if not (sequence.error or is_damaged or self.key is None):
            left = _Prefix(sequence.ids[:length], next(self._answers))
        if is_damaged or (sequence.error and not is_row):
            cache.clear_slot(slot)
        if is_row:
            last = cache.num_rows - 1
            cache.remove_row(slot)
            if slot != last:
                self._put(self._holders[last], slot)
            slot = last
        self._holders[slot] = left
        if not left.ids:
            self.cache.set_beginning(slot, Beginning())

    def discard_prefixes(self) -> None:
        """Keep none from now on: a failed round may have written anywhere."""
        self.key = None
        for slot, held in enumerate(self._holders):
            if isinstance(held, _Prefix):
                self._holders[slot] = _Prefix()
                self.cache.set_beginning(slot, Beginning())

    def _put(self, holder: Sequence | _Prefix, slot: int) -> None:
        self._holders[slot] = holder
        if not isinstance(holder, _Prefix):
            holder.slot = slot


def kept_caches(model: PreTrainedModel) -> deque[PrefixCache]:
    """The cache that the last scheduler with reuse_cache has left; a deque lets only one thread get it."""
    caches: deque[PrefixCache] = cached(model, PrefixCache, lambda _: (), lambda: deque(maxlen=1))
    return caches


def cache_key(runner: ModelRunner) -> Hashable:
    """Keys and values are valid while this is the same; None: torch does not count writes to the weights."""
    weights = runner.fused_weights
    return (weights.token, type(runner)) if weights.counts_writes else None
