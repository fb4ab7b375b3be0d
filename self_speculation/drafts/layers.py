"""Drafts by the first layers of the model, or by a copy of them in fewer bits."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from self_speculation.config import DraftWeights
from self_speculation.decoding.batch import Batch
from self_speculation.drafts.draft import Arm, Draft, DraftSource
from self_speculation.passes.kv_cache import KVCache
from self_speculation.passes.model_runner import ModelRunner, PassRange, forward_early


class LayerDrafts(DraftSource):
    """The first layers draft: each pass gives one token to every row whose draft has not ended.

    Reads from the device: one per B tokens if drafts are shown or follow a grammar; otherwise none.

    Args:
        drafter: runs the model's layers, or a copy of them.
        exit_layer: number of layers that draft.
        draft_weights: exact: the model's own layers draft, and verification starts from their cache and exit
            states. A copy's are approximate, so verification does not use them.
        arm: what a policy knows of these drafts.
        is_whole: all layers draft.
    """

    def __init__(
        self,
        drafter: ModelRunner,
        exit_layer: int,
        draft_weights: DraftWeights,
        arm: Arm,
        is_whole: bool = False,
    ) -> None:
        self.drafter, self.exit_layer, self.arm = drafter, exit_layer, arm
        self._keeps_cache = draft_weights == "exact"
        self.name = "4-bit copy" if is_whole else f"exit {exit_layer}"
        if not self._keeps_cache and not is_whole:
            self.name += " of a 4-bit copy"

    def draft(self, batch: Batch, cache: KVCache, limits: Sequence[int]) -> Draft:
        keys, ids = batch.noise_keys(max(limits)), batch.last
        drafted: list[Tensor] = []  # [B, 1] each
        exit_hidden: list[Tensor] = []
        for position in range(max(limits)):
            early = forward_early(self.drafter, cache, ids, self.exit_layer)
            exit_hidden.append(early.hidden)
            is_drafting = [position < limit for limit in limits]
            tokens = batch.sample_draft(early.logits[:, 0], position, is_drafting, keys)
            batch.record_draft(tokens, position, is_drafting)
            ids = tokens[:, None]
            drafted.append(ids)
        return Draft(
            [self.name] * len(limits),
            torch.cat([batch.last[:, :0], *drafted], 1),
            limits,
            self.exit_layer if self._keeps_cache else 0,
            exit_hidden if self._keeps_cache else [],
        )

    def passes(self, runner: ModelRunner, longest: int) -> Iterator[PassRange]:
        yield PassRange(self.drafter, 0, self.exit_layer)
        yield PassRange(runner, self.exit_layer if self._keeps_cache else 0, len(runner.layers), longest + 1)
