"""Drafts that are looked up: what followed the last tokens when they stood earlier in prompt or output."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from self_speculation.decoding.output import Output
from self_speculation.decoding.rows import Rows
from self_speculation.drafts.draft import Draft, DraftSource, Guess, PerOutput, mixed
from self_speculation.drafts.prompt_lookup import NgramIndex
from self_speculation.transfers import on_device


class Lookup(DraftSource):
    """Copies of what followed. No layers, and no reads from the device unless drafts are shown.

    Args:
        longest: tokens that are matched at most.
        vocab_size: width of the logits.
    """

    def __init__(self, longest: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._indices = PerOutput(lambda output: NgramIndex(longest))

    def guesses(self, rows: Rows) -> list[Guess | None]:
        """None where not even the last token stood somewhere before."""
        found = [self._find(output, 1) for output in rows.outputs]
        return [Guess(number, ids[0]) if number else None for number, ids in found]

    def draft(self, rows: Rows, k: int, wanted: Sequence[bool] | None = None) -> Draft:
        rooms = rows.rooms(k, wanted)
        found = [self._find(output, room) for output, room in zip(rows.outputs, rooms, strict=True)]
        lengths = [len(ids) for _, ids in found]
        width = max(lengths)
        # Padded with each row's last token, as in `Rows.choose`.
        last = [(output.tokens or output.prompt)[-1] for output in rows.outputs]
        padded = [[*ids, *[id_] * (width - len(ids))] for (_, ids), id_ in zip(found, last, strict=True)]
        tokens = on_device([id_ for ids in padded for id_ in ids], rows.last.device).view(len(rows), width)
        for i in range(width):
            rows.propose(tokens[:, i], i, [i < length for length in lengths])
        probabilities = None if rows.sampler.greedy else certain(tokens, self._vocab_size)
        matched = [number if length else 0 for (number, _), length in zip(found, lengths, strict=True)]
        return Draft(rows.sampler, ["lookup"] * len(rows), tokens, probabilities, lengths, matched=matched)

    def _find(self, output: Output, k: int) -> tuple[int, list[int]]:
        index = self._indices[output]
        if not len(index):
            index.extend(output.prompt)
        index.extend(output.tokens[len(index) - len(output.prompt) :])
        return index.lookup(k)


def certain(tokens: Tensor, vocab_size: int) -> Tensor:
    """[..., V] the distribution of tokens [...] that were not drawn."""
    q = torch.zeros(*tokens.shape, vocab_size, device=tokens.device)
    return q.scatter_(-1, tokens[..., None], 1.0)


class LookupFirst(DraftSource):
    """Lookups; for rows where too little is found, another source's draft.

    Args:
        at_least: tokens that must match: what followed a single one is mostly chance.
    """

    def __init__(self, lookup: Lookup, otherwise: DraftSource, at_least: int) -> None:
        self._lookup, self._otherwise, self._at_least = lookup, otherwise, at_least

    def draft(self, rows: Rows, k: int, wanted: Sequence[bool] | None = None) -> Draft:
        guesses = zip(self._lookup.guesses(rows), rows.rooms(k, wanted), strict=True)
        found = [
            bool(room) and guess is not None and guess.matched >= self._at_least for guess, room in guesses
        ]
        if not any(found):
            return self._otherwise.draft(rows, k, wanted)
        looked_up = self._lookup.draft(rows, k, found)
        pairs = zip(found, wanted or [True] * len(rows), strict=True)
        rest = [wants and not is_found for is_found, wants in pairs]
        if not any(rest):
            return looked_up
        return mixed(rows, looked_up, self._otherwise.draft(rows, k, rest), found)

    def learn(self, rows: Rows, draft: Draft, num_accepted: Sequence[int]) -> None:
        if not draft.matched or not all(draft.matched):
            self._otherwise.learn(rows, draft, num_accepted)
