"""Draft head over a subset of the vocabulary: the head is a third of a small model.

After Zhao et al., FR-Spec (arXiv 2502.14856) and VocabTrim (arXiv 2506.22694). The rows are those of a fixed
list of likely ids, and those of the ids in a sequence's own prompt and output. Logits have their full width,
with -inf for all other ids, so processors, sampling and the accept rule stay as they are. Texts with many
other ids, such as Chinese ones, get all rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from self_speculation.model.devices import free_memory
from self_speculation.model.experts import bytes_per_layer
from self_speculation.model.few_bits import FewBitsLinear, mean_bytes_per_weight
from self_speculation.model.fused_layers import FusedHead, difference, plain_linear
from self_speculation.model.int4_linear import Int4Linear
from self_speculation.model.linear import Linear
from self_speculation.model.model_cache import singleton
from self_speculation.model.model_runner import ModelRunner
from self_speculation.transfers import on_device

# The fewest rows by default, and the share of a draft step that they must save.
_LEAST_ROWS, _CLEARLY_CHEAPER = 16384, 0.08
# The most rows of seen ids: of the first ones, which tokenizers give to frequent tokens.
_MOST_SEEN = 2048
# A text gets all rows if this share of its last ids, about so many, are neither likely nor seen: drafts would
# miss them. All rows lengthen a draft step by a quarter.
_MANY_NEW, _LAST = 0.2, 20
# Tokens of such texts before all rows are copied: so many decoded tokens save the time that copying takes.
_WORTH_COPYING = 128
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


def default_vocabulary(runner: ModelRunner, num_layers: int, num_bytes: tuple[float, float]) -> int | None:
    """A quarter of the rows if that makes a draft step of so many layers clearly cheaper; None: all rows.
    Weights of layers and of the head have these numbers of bytes.
    """
    if _whole_linear(runner) is None:
        return None
    size, width = (head := runner.model.get_output_embeddings()).out_features, head.in_features
    rows = max(_LEAST_ROWS, 2 ** round(math.log2(size / 4)))
    layer_bytes, head_bytes = num_bytes
    own_bytes = mean_bytes_per_weight(runner.model.base_model.layers[0])
    layers = num_layers * layer_bytes * bytes_per_layer(runner.model) / own_bytes
    saved = head_bytes * (size - rows) * width
    return rows if saved > _CLEARLY_CHEAPER * (layers + head_bytes * size * width) else None


class ShortHead:
    """Norm and head, [B, H] -> [B, V], with -inf for all but likely and seen ids. If its rows have four bits,
    the best of them have the logits of the model's own head, as seen ids do.

    Args:
        number: of likely ids.
        grows: texts with many new ids get all rows, in the format of the likely ones, once there were enough
            such texts to pay for copying them, and if there is memory for the copy.

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
        self._ids = on_device(ids, runner.device)
        self._likely = whole.cached_copy(tuple(ids), lambda: whole.select_rows(self._ids))
        self.linears: tuple[Any, ...] = (self._likely,)
        # A copy of all rows is made by way of one in their own format.
        grows = grows and (Int4Linear in whole.copies or free_memory(runner.device) > 2 * whole.num_bytes)
        many_new, demand = _MANY_NEW if grows else math.inf, singleton(runner.model, _Demand)
        self.seen = SeenIds(whole, frozenset(ids), runner.tables.unit, many_new, demand)

    def __call__(self, hidden: Tensor) -> Tensor:
        normed = self._norm(hidden)
        if all(self.seen.has_many_new):
            return self._all(normed)
        logits = hidden.new_full((len(hidden), self._whole.shape[0]), -math.inf)
        logits.index_copy_(1, self._ids, _logits(self.linears[0], self._likely, normed))
        logits = self.seen.add_to(logits, normed)
        if any(self.seen.has_many_new):
            logits = torch.where(self.seen.many_new_mask, self._all(normed), logits)
        return logits

    def _all(self, normed: Tensor) -> Tensor:
        whole: Any = self._whole
        if isinstance(self.linears[0], Int4Linear):
            whole = whole.cached_copy(Int4Linear, lambda: Int4Linear(self._whole))
        return _logits(whole, self._whole, normed)


def _logits(head: Any, exact: Linear, normed: Tensor) -> Tensor:
    """[B, n] of normed states [B, H]. If the head has four bits, the exact one computes the best again."""
    logits: Tensor = head(normed)
    if isinstance(head, Int4Linear):
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


@dataclass(frozen=True)
class _Text:
    """What was read of a text."""

    length: int = 0
    seen: frozenset[int] = frozenset()  # ids that are not likely
    new: float = 0.0  # share of the last ids that were neither likely nor seen


@dataclass
class _Demand:
    """Tokens of texts with many new ids, in all answers of a model."""

    num_tokens: int = 0


class SeenIds:
    """Rows of a head for ids of sequences that are not among the likely ones.

    Args:
        like: a tensor with the device and dtype of hidden states.
        many_new: a share of ids, see `has_many_new`.
        demand: counts tokens; `has_many_new` is False before there are enough.
    """

    def __init__(
        self, whole: Linear, likely: frozenset[int], like: Tensor, many_new: float, demand: _Demand
    ) -> None:
        self._whole, self._likely, self._like = whole, likely, like
        self._many_new, self._demand = many_new, demand
        self._sequences: dict[Any, _Text] = {}
        self._by_row: list[frozenset[int]] = []
        # [B] whether so many of the last ids were neither likely nor seen; the same as [B, 1] on the device.
        self.has_many_new, self.many_new_mask = [False], torch.empty(0)

    def read(self, sequences: Iterable[Any]) -> None:
        """Add new ids; sequence i (see `decoding.sequence`) is row i of the next passes."""
        before, self._sequences = self._sequences, {}
        for sequence in sequences:
            text = before.get(sequence, _Text())
            after = self._sequences[sequence] = self._after(text, sequence.ids_from(text.length))
            if after.new >= self._many_new:
                self._demand.num_tokens += after.length - text.length
        self._set_rows([*self._sequences.values()], self._demand.num_tokens >= _WORTH_COPYING)

    def read_text(self, ids: Sequence[int], num_positions: int, may_grow: bool = True) -> None:
        """Read a text, for a pass over its last positions: each knows the ids up to its own.

        Args:
            may_grow: to all rows, however few texts need them.
        """
        texts = [self._after(_Text(), ids[: len(ids) - num_positions + 1])]
        for id_ in ids[len(ids) - num_positions + 1 :]:
            texts.append(self._after(texts[-1], [id_]))
        self._set_rows(texts, may_grow)

    def _after(self, text: _Text, ids: Sequence[int]) -> _Text:
        seen, new = set(text.seen), text.new
        for id_ in ids:
            is_new = id_ not in self._likely and id_ not in seen
            new += (is_new - new) / _LAST
            if is_new:
                seen.add(id_)
        return _Text(text.length + len(ids), frozenset(seen), new)

    def add_to(self, logits: Tensor, hidden: Tensor) -> Tensor:
        """Write the logits of seen ids to logits [B, V]; hidden states [B, H] are normed."""
        if not any(self._by_row):
            return logits
        own = torch.mm(hidden, self._rows.t())
        own = own if self._bias is None else own + self._bias
        return logits.index_copy_(1, self._ids, own if self._mask is None else own + self._mask)

    def _set_rows(self, texts: Sequence[_Text], may_grow: bool = True) -> None:
        """Copy the head's rows of seen ids, and mask for each row of a batch those that it has not seen."""
        has_many_new = [may_grow and text.new >= self._many_new for text in texts]
        if has_many_new != self.has_many_new:
            self.has_many_new = has_many_new
            self.many_new_mask = on_device(has_many_new, self._like.device).bool()[:, None]
        by_row = [text.seen for text in texts]
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
