"""Drafts by the first layers of the model, or by a copy of them in fewer bits."""

from collections.abc import Sequence

from torch import Tensor

from self_speculation.config import DraftWeights
from self_speculation.decoding.batch import Batch
from self_speculation.drafts.draft import Draft, DraftCost, DraftSource, concat_by_row
from self_speculation.passes.kv_cache import KVCache
from self_speculation.passes.model_runner import ModelRunner
from self_speculation.transfers import on_device


class LayerDrafts(DraftSource):
    """The first layers draft: each pass gives one token to every row whose draft has not ended.

    Reads from the device: one per B tokens if drafts are shown or follow a grammar; otherwise none.

    Args:
        draft_runner: runs the model's layers, or a copy of them.
        exit_layer: number of layers that draft.
        draft_weights: exact: the model's layers draft, and verification starts from the cache and exit states
            that they leave. Those of a copy are approximate: verification does not use them.
        cost: what a policy expects of the drafts.
        is_whole: all layers draft.
    """

    def __init__(
        self,
        draft_runner: ModelRunner,
        exit_layer: int,
        draft_weights: DraftWeights,
        cost: DraftCost,
        is_whole: bool = False,
    ) -> None:
        self.draft_runner = draft_runner
        self.exit_layer = exit_layer
        self.cost = cost
        # Layers that have not drafted verify; all do after a copy.
        self.start_layer = exit_layer if draft_weights == "exact" else 0
        self.name = "4-bit copy" if is_whole else f"exit {exit_layer}"
        if not self.start_layer and not is_whole:
            self.name += " of a 4-bit copy"

    def draft(self, batch: Batch, cache: KVCache, limits: Sequence[int]) -> Draft:
        columns = [[row for row, limit in enumerate(limits) if i < limit] for i in range(max(limits))]
        keys = batch.noise_keys((row, i) for i, rows in enumerate(columns) for row in rows)
        keys_of = [None] * len(columns) if keys is None else keys.split([*map(len, columns)])
        ids = batch.last_tokens
        before = [*range(len(batch))]
        nothing = [0] * len(batch)
        drafted: list[tuple[Tensor, list[int]]] = [(ids[:0], nothing)]
        exit_hidden: list[tuple[Tensor, list[int]]] = [(self.draft_runner.embed(ids[:0]), nothing)]
        for position, rows in enumerate(columns):
            if rows != before:
                ids = ids[on_device([before.index(row) for row in rows], ids.device)]
            query_lengths = [int(position < limit) for limit in limits]
            hidden = self.draft_runner.embed(ids)
            hidden = self.draft_runner.run_layers(cache, hidden, query_lengths, 0, self.exit_layer)
            exit_hidden.append((hidden, query_lengths))
            ids = batch.sample_draft(self.draft_runner.logits(hidden), position, rows, keys_of[position])
            batch.record_draft(ids, position, rows)
            drafted.append((ids, query_lengths))
            before = rows
        return Draft(
            [self.name if limit else None for limit in limits],
            concat_by_row(*drafted),
            limits,
            self.start_layer,
            concat_by_row(*exit_hidden) if self.start_layer else None,
        )
