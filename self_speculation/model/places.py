"""What the places of a cache hold when their rows have ended, for prompts that begin alike."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from transformers import PreTrainedModel

from self_speculation.model.compiled import is_compiled
from self_speculation.model.decoder import Decoder
from self_speculation.model.fingerprint import fingerprint
from self_speculation.model.lean_layers import how_fused


class Held(NamedTuple):
    ids: Sequence[int] = ()  # whose keys and values a free place holds
    since: int = 0  # by the number of the answer that left them


class Places:
    """Which ids the free places of a cache hold, in the order of the cache: rows in flight come first.

    A place keeps them until it is taken by another prompt.
    """

    def __init__(self, num_places: int) -> None:
        self._held = [Held()] * num_places
        self._answers = itertools.count(1)

    def best(self, prompt: Sequence[int], first_free: int) -> tuple[int, int]:
        """The free place that holds most of how a prompt begins, the longest unused one of those that hold
        as much; and how many tokens that are. The last token is always read: its logits are needed.
        """
        most = len(prompt) - 1
        found = [
            (min(_common(held.ids, prompt), most), -held.since, place)
            for place, held in enumerate(self._held)
            if place >= first_free
        ]
        length, _, place = max(found)
        return place, length

    def leave(self, place: int, ids: Sequence[int]) -> None:
        """An answer has ended, and its place holds the keys and values of these ids."""
        self._held[place] = Held(ids, next(self._answers))

    def swap(self, place: int, other: int) -> None:
        self._held[place], self._held[other] = self._held[other], self._held[place]

    def length(self, place: int) -> int:
        """Positions that are kept there."""
        return len(self._held[place].ids)


class KeptCache(NamedTuple):
    """What one batch leaves to the next."""

    decoder: Decoder
    places: Places
    valid_for: Hashable


def state_of(model: PreTrainedModel) -> Hashable:
    """Keys and values are valid until this changes: with the model, and with how its passes are made."""
    return fingerprint(model), how_fused(model), is_compiled(model), model.config._attn_implementation


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids both begin with."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))
