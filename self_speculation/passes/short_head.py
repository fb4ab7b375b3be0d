"""Draft head over a subset of the vocabulary: the head is a third of a small model.

After Zhao et al., FR-Spec (arXiv 2502.14856) and VocabTrim (arXiv 2506.22694). The rows are those of a fixed
list of likely ids, and those of the ids in a sequence's own prompt and output. Logits have their full width,
with -inf for all other ids, so processors, sampling and the accept rule stay as they are. Answers to texts
with many other ids, such as Chinese ones, get all rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from self_speculation.devices import free_memory
from self_speculation.model_cache import singleton
from self_speculation.passes.fused_layers import FusedHead, plain_linear
from self_speculation.passes.model_runner import ModelRunner, PlainHead, SeenIds
from self_speculation.passes.unsupported_hooks import difference
from self_speculation.transfers import on_device
from self_speculation.weights.few_bits import FewBitsLinear
from self_speculation.weights.int4_linear import int4_copy
from self_speculation.weights.linear import Linear, Product

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
class _Ids:
    """What is known of the ids of a model's texts.

    Attributes:
        counted: the most frequent first.
        likely: what was made of them, by number of ids, rows of the head, and device.
        new: of the last ids of all texts, the share that were neither likely nor seen.
    """

    counted: tuple[int, ...] = ()
    likely: dict[Hashable, tuple[frozenset[int], Tensor]] = field(default_factory=dict)
    new: float = 0.0


def prefer_ids(model: PreTrainedModel, counts: Mapping[int, int]) -> None:
    """Let short heads have the ids that were counted most."""
    ids = singleton(model, _Ids)
    ids.counted, ids.likely = tuple(sorted(counts, key=lambda id_: -counts[id_])), {}


def likely_ids(model: PreTrainedModel, number: int) -> list[int]:
    """So many ids in ascending order: the most frequent ones, then the first ones of the tokenizer."""
    size = model.get_output_embeddings().out_features
    frequent = [id_ for id_ in singleton(model, _Ids).counted if 0 <= id_ < size]
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
            memory for a copy of them, see `TextReader`.

    Raises:
        ValueError: the head's weight is not a plain tensor.
    """

    def __init__(self, runner: ModelRunner, number: int, grows: bool = False) -> None:
        whole = _whole_linear(runner)
        if whole is None:
            raise ValueError(
                f"draft_vocabulary {number}: needs the whole head on one device, not with --parallel tensor"
            )
        ids, key = singleton(runner.model, _Ids), (number, whole.shape[0], runner.device)
        if key not in ids.likely:  # once, and not for each request: it takes milliseconds
            likely = likely_ids(runner.model, number)
            ids.likely[key] = frozenset(likely), on_device(likely, runner.device)
        self.norm, self._whole, self._like = runner.head.norm, whole, runner.tables.unit
        self.likely, self._ids = ids.likely[key]
        self._likely = whole.cached_copy(self.likely, lambda: whole.select_rows(self._ids))
        self.linears: tuple[Product, ...] = (self._likely,)
        # A copy of all rows is made by way of one in their own format.
        grows = grows and ("int4" in whole.copies or free_memory(runner.device) > 2 * whole.num_bytes)
        self.texts = ids if grows else None
        self._copied_for: SeenIds | None = None  # what the following are for
        self._seen_ids = self._like.new_empty(0, dtype=torch.long)  # [n]
        self._seen_rows: tuple[Tensor, Tensor | None] = self._like, None  # [n, H] and biases [n]
        self._mask: Tensor | None = None  # [B, n], -inf for ids that a row has not seen; None: all have

    def __call__(self, hidden: Tensor, seen: SeenIds | None = None) -> Tensor:
        """[B, H] -> [B, V]

        Args:
            seen: None: all ids.
        """
        normed, is_copy = self.norm(hidden), self.linears[0] is not self._likely
        if seen is None:
            whole: Product = self._whole
            if is_copy:
                whole = self._whole.cached_copy("int4", lambda: int4_copy(self._whole))
            return _logits(whole, self._whole, normed)
        logits = hidden.new_full((len(hidden), self._whole.shape[0]), -math.inf)
        logits.index_copy_(1, self._ids, _logits(self.linears[0], self._likely, normed))
        if seen != self._copied_for:
            self._copy_rows(seen)
        if not len(self._seen_ids):
            return logits
        weight, bias = self._seen_rows
        own = torch.mm(normed, weight.t())
        own = own if bias is None else own + bias
        return logits.index_copy_(1, self._seen_ids, own if self._mask is None else own + self._mask)

    def _copy_rows(self, seen: SeenIds) -> None:
        """Those of seen ids; mask for each row of a batch those of others."""
        by_row = [ids - self.likely for ids in seen]
        ids = sorted(frozenset().union(*by_row))[:_MOST_SEEN]
        self._copied_for, self._seen_ids, self._mask = seen, on_device(ids, self._like.device), None
        self._seen_rows = _rows(self._whole, self._seen_ids, self._like)
        if not all(own.issuperset(ids) for own in by_row):
            numbers = [0.0 if id_ in own else -math.inf for own in by_row for id_ in ids]
            self._mask = on_device(numbers, self._like.device, self._like.dtype).view(len(by_row), -1)


def _logits(head: Product, exact: Linear, normed: Tensor) -> Tensor:
    """[B, n] of normed states [B, H]. If the head is a copy, the exact one computes the best again."""
    logits = head(normed).to(normed.dtype)
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
    assert isinstance(runner.head, PlainHead)
    head = runner.head.modules[1]
    is_plain = type(head) in (nn.Linear, FewBitsLinear) and difference(runner.model, head) is None
    return plain_linear(runner.model, head) if is_plain else None


def _rows(head: Linear, numbers: Tensor, like: Tensor) -> tuple[Tensor, Tensor | None]:
    """[..., H] some rows of a head and [...] their biases, with the device and dtype of `like`."""
    return head.rows(numbers).to(like), None if head.bias is None else head.bias[numbers].to(like)


class Text(Protocol):
    """A sequence, such as `decoding.sequence.Sequence`."""

    def ids_from(self, position: int) -> list[int]:
        """Ids of the prompt and the output behind so many."""


class TextReader:
    """Reads the ids of sequences for a head, each once."""

    def __init__(self, head: ShortHead) -> None:
        self._likely, self._texts = head.likely, head.texts
        self._read: dict[Text, tuple[int, frozenset[int]]] = {}  # length of each sequence, and ids
        self._needs_all = False

    def read(self, sequences: Iterable[Text]) -> SeenIds | None:
        """[B] ids of each sequence that are not likely; None: they are so many that the head is to have all.
        The choice changes only when a sequence joins.
        """
        before, self._read = self._read, {}
        for sequence in sequences:
            length, seen = before.get(sequence, (0, frozenset[int]()))
            ids = sequence.ids_from(length)
            new = frozenset(ids) - self._likely - seen
            self._read[sequence] = length + len(ids), seen | new if new else seen
            if self._texts is not None:
                self._texts.new += (len(new) - len(ids) * self._texts.new) / max(len(ids), _LAST)
        if self._texts is not None and not self._read.keys() <= before.keys():
            self._needs_all = self._texts.new >= _MANY_NEW
        return None if self._needs_all else [seen for _, seen in self._read.values()]
