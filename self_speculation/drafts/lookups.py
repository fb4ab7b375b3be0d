"""Drafts that are looked up: what followed the last tokens when they stood earlier in prompt or output."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from self_speculation.decoding.output import Output
from self_speculation.drafts.draft import Draft, DraftSource
from self_speculation.drafts.policy import LookupPolicy
from self_speculation.drafts.prompt_lookup import NgramIndex


class Lookup(DraftSource):
    """Copies of what followed. No layers, and no reads from the device unless drafts are shown.

    Args:
        prompt: its ids.
        longest: tokens that are matched at most.
        vocab_size: width of the logits.
    """

    def __init__(self, prompt: Sequence[int], longest: int, vocab_size: int) -> None:
        self.longest = longest
        self._prompt_length, self._vocab_size = len(prompt), vocab_size
        self._index = NgramIndex(longest)
        self._index.extend(prompt)

    def matched(self, output: Output) -> int | None:
        """How many of the last tokens stood somewhere before; None: not even the last one."""
        return self._find(output, 0)[0] or None

    def draft(self, output: Output, k: int) -> Draft:
        matched, ids = self._find(output, k)
        tokens = torch.tensor(ids, dtype=torch.long, device=output.history().device)
        for i in range(len(ids)):
            output.propose(tokens[i : i + 1], i)
        return Draft("lookup", tokens, certain(tokens, self._vocab_size), matched=matched or 0)

    def _find(self, output: Output, k: int) -> tuple[int, list[int]]:
        self._index.extend(output.tokens[len(self._index) - self._prompt_length :])
        return self._index.lookup(k)


def certain(tokens: Tensor, vocab_size: int) -> Tensor:
    """[k, V] the distribution of tokens [k] that were not drawn."""
    q = tokens.new_zeros(len(tokens), vocab_size, dtype=torch.float32)
    return q.scatter_(1, tokens[:, None], 1.0)


class LookupFirst(DraftSource):
    """Lookups; where nothing is found, or where they have not paid, another source's draft."""

    def __init__(self, lookup: Lookup, otherwise: DraftSource, policy: LookupPolicy) -> None:
        self._lookup, self._otherwise, self._policy = lookup, otherwise, policy

    def draft(self, output: Output, k: int) -> Draft:
        matched = self._lookup.matched(output)
        if k and matched and self._policy.pays(matched):
            return self._lookup.draft(output, k)
        return self._otherwise.draft(output, k)

    def learn(self, draft: Draft, num_accepted: int, agreement: Sequence[float]) -> None:
        if draft.matched:
            self._policy.learn_lookup(draft.matched, num_accepted)
        else:
            self._policy.learn_layers(len(draft.tokens), num_accepted)
            self._otherwise.learn(draft, num_accepted, agreement)
