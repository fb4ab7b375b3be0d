"""Drafts by the first layers of the model, or by a copy of them in fewer bits."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from self_speculation.config import DraftWeights
from self_speculation.decoding.batch import Batch
from self_speculation.drafts.draft import Arm, Draft, DraftSource, ShouldContinue
from self_speculation.passes.kv_cache import KVCache
from self_speculation.passes.model_runner import ModelRunner, PassRange, forward_early


class LayerDrafts(DraftSource):
    """The first layers draft: each pass gives one token to every row whose draft has not ended.

    Reads from the device: one per B tokens if drafts end by confidence, are shown or follow a grammar;
    otherwise none. If the model's own layers draft, a GPU begins the next pass before that read arrives. If
    the draft ends there, the pass is not lost: verification needs the last token's exit state anyway.

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
        self._runs_ahead = self._keeps_cache and drafter.device.type == "cuda"

    def draft(
        self,
        batch: Batch,
        cache: KVCache,
        limits: Sequence[int],
        should_continue: ShouldContinue | None,
    ) -> Draft:
        drafted: list[Tensor] = []  # [B, 1] each
        exit_hidden: list[Tensor] = []
        confidences: list[list[float]] = [[] for _ in limits]

        def run(ids: Tensor) -> Tensor:  # [B, 1] -> [B, V]
            early = forward_early(self.drafter, cache, ids, self.exit_layer)
            exit_hidden.append(early.hidden)
            return early.logits[:, 0]

        keys, needs_confidence = batch.noise_keys(max(limits)), should_continue is not None
        ids, logits = batch.last, None
        while (position := len(drafted)) < max(limits):
            is_drafting = [position < limit for limit in limits]
            logits = run(ids) if logits is None else logits
            tokens, confidence = batch.sample_draft(logits, position, is_drafting, keys, needs_confidence)
            reading = batch.record_draft(tokens, position, is_drafting, confidence)
            ids, logits = tokens[:, None], None
            drafted.append(ids)
            if should_continue is None or reading is None:
                continue
            if self._runs_ahead and position + 1 < max(limits):
                logits = run(ids)
            _, latest = reading.wait()
            for row, drafts in enumerate(is_drafting):
                confidences[row] += [latest[row]] * drafts
            pairs = zip(limits, should_continue(confidences), strict=True)
            limits = [limit if more else min(limit, position + 1) for limit, more in pairs]
        return Draft(
            [self.name] * len(limits),
            torch.cat([batch.last[:, :0], *drafted], 1),
            limits,
            self.exit_layer if self._keeps_cache else 0,
            exit_hidden if self._keeps_cache else [],
            confidences,
        )

    def passes(self, runner: ModelRunner, longest: int) -> Iterator[PassRange]:
        yield PassRange(self.drafter, 0, self.exit_layer)
        yield PassRange(runner, self.exit_layer if self._keeps_cache else 0, len(runner.layers), longest + 1)
