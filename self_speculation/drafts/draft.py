"""The interface of draft sources: those that compute tokens, and those that look them up.

The output is exact for any draft: verification accepts the tokens that are the target's.
"""

from abc import ABC, abstractmethod
from collections import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from self_speculation.decoding.batch import Batch
from self_speculation.decoding.sequence import Sequence
from self_speculation.passes.kv_cache import KVCache


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
