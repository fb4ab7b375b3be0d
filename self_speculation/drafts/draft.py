"""The interface of draft sources.

The output is exact for any draft that states the distribution its tokens were sampled from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import abc
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from self_speculation.decoding.batch import Batch
from self_speculation.drafts.policy import Arm, Confidences, ShouldContinue
from self_speculation.model.kv_cache import KVCache
from self_speculation.model.model_runner import ModelRunner, PassRange
from self_speculation.transfers import on_device


@dataclass(frozen=True)
class Draft:
    """At most k >= 0 tokens for each row, and the hidden states that verification starts from."""

    sources: abc.Sequence[str | None]  # [B] names; None: no source
    tokens: Tensor  # [B, k]
    probabilities: Tensor | None  # [B, k, V] that they were sampled from; None when greedy, or if k is 0
    lengths: abc.Sequence[int]  # [B] of the k tokens; the rest is padding
    exit_layer: int = 0  # layers that have processed the draft; 0: none, or a copy of them
    # States [B, 1, H] of the last token and the drafted ones, without the last of these (k) or with it (k+1).
    exit_hidden: list[Tensor] = field(default_factory=list)
    confidences: Confidences = ()  # empty unless drafts end by them
    matched: abc.Sequence[int] = ()  # [B] tokens that an n-gram matched; empty without n-grams


class DraftSource(ABC):
    """Computes tokens for rows of a batch."""

    name: str
    arm: Arm

    @abstractmethod
    def draft(
        self,
        batch: Batch,
        cache: KVCache,
        limits: abc.Sequence[int],
        numbers: Tensor | None,
        should_continue: ShouldContinue | None,
    ) -> Draft:
        """Draft tokens for each row.

        Layers that draft may append to the cache. If `Draft.exit_layer` is 0, that is rolled back.

        Args:
            limits: [B] the most tokens of each row.
            numbers: [B, K] random numbers that sample tokens; None when greedy.
            should_continue: is asked after each token that layers draft; None: drafts have the most tokens.
        """

    def passes(self, runner: ModelRunner, longest: int) -> abc.Iterator[PassRange]:
        """The passes that draft up to `longest` tokens, and those of `runner` that verify them."""
        yield PassRange(runner, 0, len(runner.layers), longest + 1)


def join(batch: Batch, drafts: abc.Sequence[Draft]) -> Draft:
    """One draft of drafts for different rows. All layers verify it, since none has processed all rows."""
    if not drafts:
        return Draft([None] * len(batch), *batch.stack([]), [0] * len(batch))
    drafts = [draft for draft in drafts if any(draft.lengths)] or drafts[:1]
    if len(drafts) == 1:
        return drafts[0]
    width = max(draft.tokens.shape[1] for draft in drafts)
    tokens, q = batch.last.expand(-1, width), None
    for draft in drafts:
        is_own = on_device(draft.lengths, tokens.device).bool()[:, None]  # [B, 1]
        padding = width - draft.tokens.shape[1]
        tokens = torch.where(is_own, torch.cat((draft.tokens, tokens[:, width - padding :]), 1), tokens)
        if draft.probabilities is not None:
            own = pad(draft.probabilities, (0, 0, 0, padding))
            q = own if q is None else torch.where(is_own[..., None], own, q)
    owners = [next((draft for draft in drafts if draft.lengths[row]), drafts[0]) for row in range(len(batch))]
    rows = [*enumerate(owners)]
    return Draft(
        [draft.sources[row] for row, draft in rows],
        tokens,
        q,
        [draft.lengths[row] for row, draft in rows],
        confidences=[draft.confidences[row] if draft.confidences else () for row, draft in rows],
        matched=[draft.matched[row] if draft.matched else 0 for row, draft in rows],
    )
