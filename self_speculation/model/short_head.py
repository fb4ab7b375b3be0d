"""Draft head over a subset of the vocabulary: the head is a third of a small model.

After Zhao et al., FR-Spec (arXiv 2502.14856) and VocabTrim (arXiv 2506.22694). The rows are those of a fixed
list of likely ids, and those of the ids in a sequence's own prompt and output. Logits have their full width,
with -inf for all other ids, so processors, sampling and the accept rule stay as they are. Answers to texts
with many other ids, such as Chinese ones, get all rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from self_speculation.model.devices import free_memory
from self_speculation.model.few_bits import FewBitsLinear
from self_speculation.model.fused_layers import FusedHead, plain_linear
from self_speculation.model.int4_linear import int4_copy
from self_speculation.model.linear import Linear
from self_speculation.model.model_cache import singleton
from self_speculation.model.model_runner import ModelRunner
from self_speculation.model.unsupported_hooks import difference
from self_speculation.transfers import on_device

# The fewest rows by default, and the share of a draft step that they must save.
_LEAST_ROWS, _CLEARLY_CHEAPER = 16384, 0.08
# The most rows of seen ids: of the first ones, which tokenizers give to frequent tokens.
_MOST_SEEN = 2048
# Answers get all rows if this share of the last ids that were read, about so many, were neither likely nor
# seen: drafts would miss them. All rows lengthen a draft step by a quarter, and are copied first.
_MANY_NEW, _LAST = 0.2, 64
# Logits of a head in four bits that are computed again. Four bits rarely rank the best one lower.
_COMPUTED_AGAIN = 8


@dataclass
class _Counted:
    """Ids of a model, the most frequent first."""

    ids: tuple[int, ...] = ()


def prefer_ids(model: PreTrainedModel, counts: Mapping[int, int]) -> None:
    """Let short heads have the ids that were counted most."""
    singleton(model, _Counted).ids = tuple(sorted(counts, key=lambda id_: -counts[id_]))


def likely_ids(model: PreTrainedModel, number: int) -> list[int]:
    """So many ids in ascending order: the most frequent ones, then the first ones of the tokenizer."""
    size = model.get_output_embeddings().out_features
    frequent = [id_ for id_ in singleton(model, _Counted).ids if 0 <= id_ < size]
    return sorted([*dict.fromkeys([*frequent, *range(size)[:number]])][:number])


def default_vocabulary(runner: ModelRunner, cost: Callable[[int | None], float]) -> int | None:
    """A quarter of the rows if that makes a draft step clearly cheaper; None: all rows.

    Args:
        cost: of a draft step by the rows that its head has; None: all.
    """
    if _whole_linear(runner) is None:
        return None
    rows = max(_LEAST_ROWS, 2 ** round(math.log2(runner.model.get_output_embeddings().out_features / 4)))
    return rows if cost(rows) < (1.0 - _CLEARLY_CHEAPER) * cost(None) else None


class ShortHead:
    """Norm and head, [B, H] -> [B, V], with -inf for all but likely and seen ids. If its rows have four bits,
    the best of them have the logits of the model's own head, as seen ids do.

    Args:
        number: of likely ids.
        grows: answers to texts with many new ids get all rows, in the format of the likely ones, if there is
            memory for a copy of them.

    Raises:
        ValueError: the head's weight is not a plain tensor.
    """

    def __init__(self, runner: ModelRunner, number: int, grows: bool = False) -> None:
        whole = _whole_linear(runner)
        if whole is None:
            raise ValueError(
                f"draft_vocabulary {number}: needs the whole head on one device, not with --parallel tensor"
            )
        ids = likely_ids(runner.model, number)
        self._norm, self._whole = runner.head.norm, whole
        self._ids = on_device(ids, runner.rotary.device)
        self._likely = whole.cached_copy(tuple(ids), lambda: whole.select_rows(self._ids))
        self.linears: tuple[Any, ...] = (self._likely,)
        # A copy of all rows is made by way of one in their own format.
        grows = grows and (
            whole.valid_copy("int4") is not None or free_memory(runner.rotary.device) > 2 * whole.num_bytes
        )
        new_ids = singleton(runner.model, _NewIds) if grows else None
        self.seen = SeenIds(whole, frozenset(ids), runner.rotary, new_ids)

    def __call__(self, hidden: Tensor) -> Tensor:
        normed, is_copy = self._norm(hidden), self.linears[0] is not self._likely
        if self.seen.are_few:
            whole: Any = self._whole
            if is_copy:
                whole = whole.cached_copy("int4", lambda: int4_copy(self._whole))
            return _logits(whole, self._whole, normed)
        logits = hidden.new_full((len(hidden), self._whole.shape[0]), -math.inf)
        logits.index_copy_(1, self._ids, _logits(self.linears[0], self._likely, normed))
        return self.seen.add_to(logits, normed)


def _logits(head: Any, exact: Linear, normed: Tensor) -> Tensor:
    """[B, n] of normed states [B, H]. If the head is a copy, the exact one computes the best again."""
    logits: Tensor = head(normed)
    if head is not exact:
        best = logits.topk(min(_COMPUTED_AGAIN, logits.shape[1]), sorted=False).indices  # [B, m]
        weight, bias = _rows(exact, best, normed)
        again = torch.bmm(weight, normed[:, :, None])[:, :, 0]
        logits.scatter_(1, best, again if bias is None else again + bias)
    return logits


def _whole_linear(runner: ModelRunner) -> Linear | None:
    """Of the head; None if its weight is in parts, quantised or offloaded."""
    if isinstance(runner.head, FusedHead):
        return runner.head.linears[0]
    head = runner.head.modules[1]
    is_plain = type(head) in (nn.Linear, FewBitsLinear) and difference(runner.model, head) is None
    return plain_linear(runner.model, head) if is_plain else None


def _rows(head: Linear, numbers: Tensor, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """[..., H] some rows of a head and [...] their biases, with the device and dtype of `like`."""
    return head.rows(numbers).to(like), None if head.bias is None else head.bias[numbers].to(like)


@dataclass
class _NewIds:
    """Of the last ids of all texts, the share that were neither likely nor seen."""

    share: float = 0.0

    def add(self, num_new: int, num_ids: int) -> None:
        self.share += (num_new - num_ids * self.share) / max(num_ids, _LAST)


class SeenIds:
    """Rows of a head for ids of sequences that are not among the likely ones.

    Args:
        like: a tensor with the device and dtype of hidden states.
        new_ids: counts them; None: the head never gets all rows.
    """

    def __init__(self, whole: Linear, likely: frozenset[int], like: Tensor, new_ids: _NewIds | None) -> None:
        self._whole, self._likely, self._like, self._new_ids = whole, likely, like, new_ids
        # The length that was read of each sequence, and its ids that are not likely.
        self._sequences: dict[Any, tuple[int, frozenset[int]]] = {}
        self._by_row: list[frozenset[int]] = []
        self.are_few = False  # texts have many ids beside them: the whole head is to be used

    def read(self, sequences: Iterable[Any]) -> None:
        """Add new ids; sequence i (see `decoding.sequence`) is row i of the next passes. `are_few` changes
        only when a sequence joins.
        """
        before, self._sequences = self._sequences, {}
        for sequence in sequences:
            length, seen = before.get(sequence, (0, frozenset[int]()))
            ids = sequence.ids_from(length)
            new = frozenset(ids) - self._likely - seen
            self._sequences[sequence] = length + len(ids), seen | new
            if self._new_ids is not None:
                self._new_ids.add(len(new), len(ids))
        if self._new_ids is not None and not self._sequences.keys() <= before.keys():
            self.are_few = self._new_ids.share >= _MANY_NEW
        self.set_rows([seen for _, seen in self._sequences.values()])

    def set_rows(self, by_row: Sequence[frozenset[int]]) -> None:
        """Copy the head's rows of these ids, and mask for each row of a batch those of others."""
        by_row = [ids - self._likely for ids in by_row]
        if by_row == self._by_row:
            return
        self._by_row = by_row
        ids = sorted(frozenset().union(*by_row))[:_MOST_SEEN]
        self._ids = on_device(ids, self._like.device)
        self._rows, self._bias = _rows(self._whole, self._ids, self._like)
        self._mask: Tensor | None = None  # [B, ids]
        if not all(seen.issuperset(ids) for seen in by_row):
            numbers = [0.0 if id_ in seen else -math.inf for seen in by_row for id_ in ids]
            self._mask = on_device(numbers, self._like.device, self._like.dtype).view(len(by_row), -1)

    def add_to(self, logits: Tensor, hidden: Tensor) -> Tensor:
        """Write the logits of seen ids to logits [B, V]; hidden states [B, H] are normed."""
        if not any(self._by_row):
            return logits
        own = torch.mm(hidden, self._rows.t())
        own = own if self._bias is None else own + self._bias
        return logits.index_copy_(1, self._ids, own if self._mask is None else own + self._mask)
