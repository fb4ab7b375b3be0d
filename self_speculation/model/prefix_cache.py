"""Prefixes that the free slots of a KV cache hold, so that a prompt with a known prefix is not read again."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from transformers import PreTrainedModel

from self_speculation.model.captured_runner import is_captured
from self_speculation.model.families import attention_types
from self_speculation.model.fingerprint import fingerprint
from self_speculation.model.fused_layers import num_changes
from self_speculation.model.model_runner import ModelRunner


class _Prefix(NamedTuple):
    ids: Sequence[int] = ()
    age: int = 0  # the number of the answer that left it: higher is younger

    def shared(self, prompt: Sequence[int]) -> int:
        """Length of the longest common prefix."""
        pairs = enumerate(zip(self.ids, prompt, strict=False))
        return next((i for i, (a, b) in pairs if a != b), min(len(self.ids), len(prompt)))


class PrefixCache:
    """A KV cache, and the ids whose keys and values its free slots hold. Slots of rows come first.

    Args:
        runner: a new one, with the cache.
        fingerprint: of what the keys and values are valid for; None: no prefixes are kept.
    """

    def __init__(self, runner: ModelRunner, num_slots: int, fingerprint: Hashable = None) -> None:
        self.runner, self.fingerprint = runner, fingerprint
        runner.cache.set_rows([])
        self._prefixes = [_Prefix()] * num_slots
        self._answers = itertools.count(1)

    def take_prefix(self, prompt: Sequence[int], free: Sequence[int]) -> int:
        """Move the longest known prefix of a prompt into the first of these slots; returns its length.

        The oldest of equal prefixes is taken. The last token of a prompt is never found: its logits are
        needed.
        """
        if self.fingerprint is None:
            return 0
        known = [(self._prefixes[slot], slot) for slot in free]
        length, _, found = max((prefix.shared(prompt[:-1]), -prefix.age, slot) for prefix, slot in known)
        self.swap(found, free[0])
        self._prefixes[free[0]] = _Prefix()  # from now on it is written to
        return length

    def remove_row(self, row: int, ids: Sequence[int], damaged: bool) -> None:
        """Free the slot of a row; the last row moves there.

        Args:
            ids: prompt and output, which become a prefix; empty: they do not.
            damaged: its keys and values may be NaN.
        """
        cache = self.runner.cache
        if self.runner.has_its_cache:
            keep = bool(ids) and not damaged and self.fingerprint is not None
            if keep:
                self._prefixes[cache.num_rows - 1] = _Prefix(ids[: cache.length(0, row)], next(self._answers))
            if damaged:
                cache.clear_slot(row)
            cache.remove_row(row, keep)

    def swap(self, slot: int, other: int, length: int = 0) -> None:
        """Exchange two slots without rows: their prefixes, and at least their first `length` positions."""
        prefixes = self._prefixes
        length = max(length, len(prefixes[slot].ids), len(prefixes[other].ids))
        if slot != other and length:
            self.runner.cache.swap(slot, other, length)
            prefixes[slot], prefixes[other] = prefixes[other], prefixes[slot]


def cache_fingerprint(model: PreTrainedModel) -> Hashable:
    """Keys and values are valid while this is the same: it covers the model and how its passes are made."""
    config = model.config
    attention = config._attn_implementation, *attention_types(config)
    return fingerprint(model), num_changes(model), is_captured(model), attention
