"""Draft sources: the interfaces of sources that compute tokens and that look them up, and drafts by layers.

The output is exact for any draft: verification accepts the tokens that are the target's.
"""

from abc import ABC, abstractmethod
from collections import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from self_speculation.backends.kv_cache import KVCache
from self_speculation.backends.runner import ModelRunner
from self_speculation.config import DraftWeights
from self_speculation.engine.batch import Batch
from self_speculation.machine.transfers import on_device
from self_speculation.requests.sequence import Sequence


@dataclass(frozen=True)
class DraftCost:
    """What a policy expects of a draft source before the first round.

    Args:
        draft_step: number of rows -> estimated cost of a drafted token of each, in plain steps of one row;
            None: no cost, since no layer runs.
        priors: [i] expected acceptance of a token after i matched ones; the last entry is also for longer
            matches. Layers have [0] alone.
        prior_strength: number of observations that each prior counts as.
    """

    draft_step: Callable[[int], float] | None = None
    priors: abc.Sequence[float] = (0.0,)
    prior_strength: float = 2.0


@dataclass(frozen=True)
class Draft:
    """Tokens of each row, 0 or more, and the hidden states that verification starts from."""

    source_names: abc.Sequence[str | None]  # [B] None: no draft
    tokens: Tensor  # [K] of the first row, then of the second one, and so on
    lengths: abc.Sequence[int]  # [B] tokens of each row, K together
    # Layers [start_layer:] verify. Above 0, the model's layers [:start_layer] have drafted, and have run over
    # all tokens of a row but the last one. 0: a copy, a lookup or several sources have drafted, or none has.
    start_layer: int = 0
    # [K, H] the input of that layer, row by row, for the last token of the output and for all drafted tokens
    # but the last one. None: `start_layer` is 0.
    exit_hidden: Tensor | None = None
    matched: abc.Sequence[int] = ()  # [B] tokens that an n-gram matched; empty without n-grams

    @property
    def query_lengths(self) -> list[int]:
        """[B] tokens of each row in the verification, N together: the drafted ones and one more."""
        return [1 + length for length in self.lengths]


def concat_by_row(*parts: tuple[Tensor, abc.Sequence[int]]) -> Tensor:
    """Concatenate parts row by row: row 0 of every part, then row 1 of every part, and so on.

    Args:
        parts: entries [n, ...], the rows one after another, and [B] the number of each row's.

    Returns:
        [N, ...]
    """
    if len(parts[0][1]) == 1:
        return torch.cat([entries for entries, _ in parts])
    split = [entries.split([*counts]) for entries, counts in parts]
    return torch.cat([part for row_parts in zip(*split, strict=True) for part in row_parts])


class DraftSource(ABC):
    """Computes tokens for rows of a batch."""

    name: str
    cost: DraftCost

    @abstractmethod
    def draft(self, batch: Batch, cache: KVCache, limits: abc.Sequence[int]) -> Draft:
        """Draft tokens for each row.

        Layers that draft may append to the cache. If `Draft.start_layer` is 0, that is rolled back.

        Args:
            limits: [B] the most tokens of each row.
        """

    def learn(  # noqa: B027
        self, draft: Draft, accepted: abc.Sequence[int], hidden: abc.Sequence[Tensor]
    ) -> None:
        """Learn from the outcome of a round; by default nothing. Every source sees all verified drafts.

        Args:
            draft: of all rows; `draft.source_names` has the source of each.
            accepted: [B] tokens of each row.
            hidden: [B] tensors [1 + length, H] on the device: the states of each row's last output token and
                drafted tokens, after the model's last layer, before the norm. State i predicts the i-th token
                of the round; states 0 to accepted[row] are the output's.
        """


class Match(NamedTuple):
    """A draft that was looked up."""

    source_name: str
    matched: int  # tokens
    ids: abc.Sequence[int] = ()  # that followed


class LookupDrafts(ABC):
    """Finds tokens somewhere. They cost nothing: no layer runs."""

    costs: abc.Mapping[str, DraftCost]  # by source

    @abstractmethod
    def find(self, sequence: Sequence, k: int) -> Match | None:
        """The longest match of the end of a sequence, and at most k > 0 tokens that follow."""


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

    def draft(self, batch: Batch, cache: KVCache, limits: abc.Sequence[int]) -> Draft:
        rows_by_step = [
            [row for row, limit in enumerate(limits) if step < limit] for step in range(max(limits))
        ]
        keys = batch.noise_keys((row, step) for step, rows in enumerate(rows_by_step) for row in rows)
        keys_by_step = [None] * len(rows_by_step) if keys is None else keys.split([*map(len, rows_by_step)])
        ids = batch.last_tokens
        previous_rows = [*range(len(batch))]
        nothing = [0] * len(batch)
        drafted: list[tuple[Tensor, list[int]]] = [(ids[:0], nothing)]
        exit_hidden: list[tuple[Tensor, list[int]]] = [(self.draft_runner.embed(ids[:0]), nothing)]
        for step, rows in enumerate(rows_by_step):
            if rows != previous_rows:
                ids = ids[on_device([previous_rows.index(row) for row in rows], ids.device)]
            query_lengths = [int(step < limit) for limit in limits]
            hidden = self.draft_runner.embed(ids)
            hidden = self.draft_runner.run_layers(cache, hidden, query_lengths, 0, self.exit_layer)
            exit_hidden.append((hidden, query_lengths))
            ids = batch.sample_draft(self.draft_runner.logits(hidden), step, rows, keys_by_step[step])
            batch.record_draft(ids, step, rows)
            drafted.append((ids, query_lengths))
            previous_rows = rows
        return Draft(
            [self.name if limit else None for limit in limits],
            concat_by_row(*drafted),
            limits,
            self.start_layer,
            concat_by_row(*exit_hidden) if self.start_layer else None,
        )
