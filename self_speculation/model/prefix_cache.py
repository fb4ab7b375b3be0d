"""Prefixes that the free slots of a KV cache hold, so that a prompt with a known prefix is not read again."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

from transformers import PreTrainedModel

from self_speculation.model.captured_runner import is_captured
from self_speculation.model.fingerprint import fingerprint
from self_speculation.model.fused_layers import num_fuse_calls
from self_speculation.model.model_runner import ModelRunner


class _Prefix(NamedTuple):
    ids: Sequence[int] = ()
    age: int = 0  # the number of the answer that left it: higher is younger

    def shared(self, prompt: Sequence[int]) -> int:
        """Length of the longest common prefix."""
        pairs = enumerate(zip(self.ids, prompt, strict=False))
        return next((i for i, (a, b) in pairs if a != b), min(len(self.ids), len(prompt)))


class PrefixCache:
    """The ids whose keys and values each slot holds, until another prompt takes it. Slots of rows in flight
    come first.
    """

    def __init__(self, num_slots: int) -> None:
        self._prefixes = [_Prefix()] * num_slots
        self._answers = itertools.count(1)

    def match(self, prompt: Sequence[int], slots: Iterable[int]) -> tuple[int, int]:
        """The slot that shares the longest prefix with a prompt, the oldest of equals; and the length of
        that prefix. The last token of a prompt is never matched: its logits are needed.
        """
        length, _, slot = max(
            (self._prefixes[slot].shared(prompt[:-1]), -self._prefixes[slot].age, slot) for slot in slots
        )
        return slot, length

    def store(self, slot: int, ids: Sequence[int]) -> None:
        """Note that a slot holds the keys and values of these ids."""
        self._prefixes[slot] = _Prefix(ids, next(self._answers))

    def swap(self, slot: int, other: int) -> None:
        self._prefixes[slot], self._prefixes[other] = self._prefixes[other], self._prefixes[slot]

    def length(self, slot: int) -> int:
        return len(self._prefixes[slot].ids)


class KeptCache(NamedTuple):
    """A KV cache that one scheduler leaves to the next."""

    runner: ModelRunner
    prefixes: PrefixCache
    fingerprint: Hashable


def cache_fingerprint(model: PreTrainedModel) -> Hashable:
    """Keys and values are valid while this is the same: it covers the model and how its passes are made."""
    return fingerprint(model), num_fuse_calls(model), is_captured(model), model.config._attn_implementation
