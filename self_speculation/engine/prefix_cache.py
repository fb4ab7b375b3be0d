"""Gives the slots of a KV cache to rows of the batch, to prompts in prefill, and to prefixes that finished
requests left. A prompt reuses the longest prefix that is kept.
"""

import itertools
import math
from collections import abc, deque
from collections.abc import Hashable
from typing import NamedTuple

from transformers import PreTrainedModel

from self_speculation.backends.buffers import PREFIX_BLOCK, SharedPrefix
from self_speculation.backends.kv_cache import KVCache
from self_speculation.backends.runner import ModelRunner
from self_speculation.models.model_cache import cached
from self_speculation.requests.sequence import Sequence


class _KeptPrefix(NamedTuple):
    """What a free slot holds: the tokens of a finished request."""

    ids: abc.Sequence[int] = ()
    age: int = 0  # the number of the answer that left it: higher is younger


def _common_length(ids: abc.Sequence[int], prompt: abc.Sequence[int]) -> int:
    """Length of the longest common prefix."""
    pairs = enumerate(zip(ids, prompt, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(ids), len(prompt)))


def _common_blocks(ids: abc.Sequence[int], prompt: abc.Sequence[int]) -> int:
    """Length of the longest common prefix, rounded down to a multiple of PREFIX_BLOCK."""
    end = min(len(ids), len(prompt)) // PREFIX_BLOCK * PREFIX_BLOCK
    blocks = (slice(start, start + PREFIX_BLOCK) for start in range(0, end, PREFIX_BLOCK))
    return next((block.start for block in blocks if ids[block] != prompt[block]), end)


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
        self._holders: list[Sequence | _KeptPrefix] = [_KeptPrefix()] * num_slots
        # Slot of a shared prefix -> the ids. A slot that no row refers to is free.
        self._shared_ids: dict[int, abc.Sequence[int]] = dict.fromkeys(cache.buffers.prefix_slots, ())
        self._answers = itertools.count(1)

    @property
    def num_repeated(self) -> int:
        """Positions that sequences share, without the longest prefix of each slot; any thread may ask."""
        holders = zip([*self._holders], self.cache.buffers.shared_prefixes, strict=False)
        prefixes = [prefix for holder, prefix in holders if isinstance(holder, Sequence)]
        longest = dict(sorted(prefixes))  # by slot
        return sum(prefix.length for prefix in prefixes) - sum(longest.values())

    def acquire(self, sequence: Sequence) -> None:
        """Give a sequence the free slot with the longest prefix of the prompt, the oldest one of equals.

        The last token of a prompt is never found: the first step needs the logits after it. A longer prefix
        of a prompt in flight is kept once for both. It is copied where there are no slots of shared prefixes.
        """
        self.cache.check()
        prompt = sequence.prompt_ids[:-1]
        free = {slot: held for slot, held in enumerate(self._holders) if isinstance(held, _KeptPrefix)}
        found = {slot: _common_length(held.ids, prompt) for slot, held in free.items()}
        slot = max(free, key=lambda slot: (found[slot], -free[slot].age, -slot))
        length = found[slot]
        prefix = self.cache.buffers.shared_prefixes[slot]
        oldest = min(free, key=lambda slot: (free[slot].age, slot))
        in_flight, source = (0, 0) if self._shared_ids else self._in_flight(prompt)
        if in_flight > length:
            slot = oldest
            length = in_flight
            self.cache.copy_positions(source, slot, length)
        elif self._shared_ids and (shared := self._share(prompt, length)) is not None:
            slot = oldest
            prefix = shared
            length = shared.length
        elif length < prefix.length:
            length = length // PREFIX_BLOCK * PREFIX_BLOCK
            prefix = SharedPrefix(prefix.slot, length)
        self.cache.set_prefix(slot, prefix)
        sequence.num_cached = length
        sequence.num_computed = length
        self._put(sequence, slot)

    def _share(self, prompt: abc.Sequence[int], least: int) -> SharedPrefix | None:
        """Find the longest prefix that a prompt in flight has, too, and keep it in a slot of shared prefixes.
        None: it has at most `least` positions, or no such slot is free.
        """
        kept = {slot: ids for slot, ids in self._shared_ids.items() if self.cache.is_shared(slot)}
        longest = max(
            (SharedPrefix(slot, _common_blocks(ids, prompt)) for slot, ids in kept.items()),
            key=lambda prefix: prefix.length,
            default=SharedPrefix(),
        )
        length, source = self._in_flight(prompt)
        if length > max(longest.length, least) and (prefix_slot := self._free_prefix_slot()) is not None:
            longest = SharedPrefix(prefix_slot, length)
            self._shared_ids[prefix_slot] = prompt[:length]
            self.cache.copy_prefix(source, longest)
        return longest if longest.length > least else None

    def _in_flight(self, prompt: abc.Sequence[int]) -> tuple[int, int]:
        """The longest prefix, in whole blocks, that a prompt in flight has, too: the length and the slot."""
        found = (
            (_common_blocks(holder.prompt_ids[: holder.num_computed], prompt), -slot)
            for slot, holder in enumerate(self._holders)
            if isinstance(holder, Sequence)
        )
        length, negative_slot = max(found, default=(0, 0))
        return length, -negative_slot

    def _free_prefix_slot(self) -> int | None:
        """A slot of shared prefixes that no sequence refers to; None: there is none. The oldest kept prefixes
        that refer to it are dropped.
        """
        prefixes = self.cache.buffers.shared_prefixes
        youngest: dict[int, float] = dict.fromkeys(self._shared_ids, 0)  # answer that refers to each
        for holder, prefix in zip(self._holders, prefixes, strict=False):
            if prefix.length:
                age = holder.age if isinstance(holder, _KeptPrefix) else math.inf
                youngest[prefix.slot] = max(youngest[prefix.slot], age)
        found = min(youngest, key=lambda slot: youngest[slot], default=None)
        if found is None or youngest[found] == math.inf:
            return None
        for slot in range(len(self._holders)):
            if prefixes[slot].length and prefixes[slot].slot == found:
                self._holders[slot] = _KeptPrefix()
                self.cache.set_prefix(slot, SharedPrefix())
        return found

    def is_prefix_in_prefill(self, sequence: Sequence) -> bool:
        """Whether a prompt in prefill will share more positions with this one than a free slot has: then a
        sequence waits for it. Raises RuntimeError, see `KVCache.check`: a lost cache reads no prompt on.
        """
        self.cache.check()
        prompt = sequence.prompt_ids[:-1]
        kept = 0
        being_read = 0
        for holder in self._holders:
            if isinstance(holder, _KeptPrefix):
                kept = max(kept, _common_length(holder.ids, prompt))
            elif holder.num_computed < len(holder.prompt_ids):
                length = _common_blocks(holder.prompt_ids, prompt)
                being_read = max(being_read, length if length > holder.num_computed else 0)
        return being_read > kept

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
        self._read_together()

    def _read_together(self) -> None:
        """Let a card read positions once that several rows have in common: block by block, the largest group
        of rows that are alike goes on.
        """
        if self.cache.buffers.grows:
            return
        rows = self._holders[: self.cache.num_rows]
        lengths = [0] * len(rows)
        source = 0
        most = dict(enumerate(row.prompt_blocks for row in rows if isinstance(row, Sequence)))
        for index in itertools.count():
            alike: dict[bytes, dict[int, list[bytes]]] = {}
            for row, blocks in most.items():
                if index < len(blocks):
                    alike.setdefault(blocks[index], {})[row] = blocks
            most = max(alike.values(), key=len, default={})
            if len(most) < 2:
                break
            source = min(most)
            for row in most:
                lengths[row] = (index + 1) * PREFIX_BLOCK
        self.cache.read_together(source, lengths)

    def _move(self, sequence: Sequence, slot: int) -> None:
        """Swap the slot of a sequence whose prompt is being read with another one, of no row."""
        before = sequence.slot
        other = self._holders[slot]
        assert before is not None
        if before != slot:
            other_length = len(other.ids) if isinstance(other, _KeptPrefix) else other.num_computed
            self.cache.swap(before, slot, max(other_length, sequence.num_computed))
            self._put(other, before)
            self._put(sequence, slot)

    def release(self, sequence: Sequence) -> None:
        """Free the slot of a sequence. Keys and values become a prefix unless the sequence failed, also
        of a part of a prompt. Where a row leaves, the last row takes the place.
        """
        slot = sequence.slot
        sequence.slot = None
        with self.cache.buffers.lock:
            if slot is not None and self.cache.is_latest:
                self._release(sequence, slot)

    def _release(self, sequence: Sequence, slot: int) -> None:
        cache = self.cache
        left = _KeptPrefix()
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
            left = _KeptPrefix(sequence.all_ids[:length], next(self._answers))
        if is_damaged or (sequence.error and not is_row):
            cache.clear_slot(slot)
        if is_row:
            last = cache.num_rows - 1
            cache.remove_row(slot)
            if slot != last:
                self._put(self._holders[last], slot)
            slot = last
        self._holders[slot] = left
        if is_row:
            self._read_together()
        if not left.ids:
            self.cache.set_prefix(slot, SharedPrefix())

    def discard_prefixes(self) -> None:
        """Keep none from now on: a failed round may have written anywhere."""
        self.key = None
        for slot, held in enumerate(self._holders):
            if isinstance(held, _KeptPrefix):
                self._holders[slot] = _KeptPrefix()
                self.cache.set_prefix(slot, SharedPrefix())

    def _put(self, holder: Sequence | _KeptPrefix, slot: int) -> None:
        self._holders[slot] = holder
        if not isinstance(holder, _KeptPrefix):
            holder.slot = slot


def kept_caches(model: PreTrainedModel) -> deque[PrefixCache]:
    """The cache that the last scheduler with reuse_cache has left; a deque lets only one thread get it."""
    caches: deque[PrefixCache] = cached(model, PrefixCache, lambda _: (), lambda: deque(maxlen=1))
    return caches


def cache_key(runner: ModelRunner) -> Hashable:
    """Keys and values are valid while this is the same; None: torch does not count writes to the weights."""
    weights = runner.fused_weights
    return (weights.identity, type(runner)) if weights.counts_writes else None
