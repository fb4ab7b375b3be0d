"""A head of some rows for drafts: the head is a third of a small model.

After Zhao et al., FR-Spec (arXiv 2502.14856) and VocabTrim (arXiv 2506.22694). The rows are those of a fixed
list of likely ids, and those of the ids in a sequence's own prompt and output. Logits have their full width,
with -inf for all other ids, so processors, sampling and the accept rule stay as they are.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Hashable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from self_speculation.model.fused_layers import FusedHead, plain_linear
from self_speculation.model.linear import Linear, follow_weights
from self_speculation.model.model_runner import ModelRunner, PlainHead
from self_speculation.transfers import on_device

# The fewest rows by default, and the share of a draft step that they must save.
_LEAST_ROWS, _CLEARLY_CHEAPER = 16384, 0.08
# The most rows of seen ids.
_MOST_SEEN = 2048

# Counted ids of a model, the most frequent first.
_FREQUENT: WeakKeyDictionary[nn.Module, tuple[int, ...]] = WeakKeyDictionary()

# A `Linear` of each head that is not fused, and the structure that it is valid for.
_PLAIN: WeakKeyDictionary[nn.Module, tuple[Hashable, Linear]] = WeakKeyDictionary()


def prefer_ids(model: PreTrainedModel, counts: Mapping[int, int]) -> None:
    """Let short heads have the ids that were counted most."""
    _FREQUENT[model] = tuple(sorted(counts, key=lambda id_: -counts[id_]))


def likely_ids(model: PreTrainedModel, number: int) -> list[int]:
    """So many ids in ascending order: the most frequent ones, then the first ones of the tokenizer."""
    size = model.get_output_embeddings().weight.shape[0]
    frequent = [id_ for id_ in _FREQUENT.get(model, ()) if 0 <= id_ < size][:number]
    others = itertools.filterfalse(set(frequent).__contains__, range(size))
    return sorted([*frequent, *itertools.islice(others, number - len(frequent))])


def default_vocabulary(
    runner: ModelRunner, num_layers: int, bytes_per_weight: tuple[float, float]
) -> int | None:
    """A quarter of the rows if that makes a draft step clearly cheaper; None: all rows.

    Args:
        num_layers: of the draft.
        bytes_per_weight: of its layers and of its head.
    """
    if isinstance(runner.head, PlainHead) and plain_linear(runner.head.module) is None:
        return None
    size, width = runner.model.get_output_embeddings().weight.shape
    rows = max(_LEAST_ROWS, 2 ** round(math.log2(size / 4)))
    of_layers, of_head = bytes_per_weight
    layers = num_layers * of_layers * sum(p.numel() for p in runner.model.base_model.layers[0].parameters())
    saved = of_head * (size - rows) * width
    return rows if saved > _CLEARLY_CHEAPER * (layers + of_head * size * width) else None


class ShortHead:
    """Norm and head, [B, H] -> [B, V], with -inf for all but likely and seen ids.

    Args:
        number: of likely ids.

    Raises:
        ValueError: the head's weight is not a plain tensor.
    """

    def __init__(self, runner: ModelRunner, number: int) -> None:
        whole = _linear(runner.head, number)
        ids = likely_ids(runner.model, number)
        self._norm, self._size = runner.head.norm, whole.shape[0]
        self._ids = on_device(ids, runner.rotary.device)
        self._seen = _SeenIds(whole, frozenset(ids), runner.rotary)
        self.linears: tuple[Any, ...] = (whole.derive(tuple(ids), lambda: whole.of_rows(self._ids)),)
        self.see, self.see_text = self._seen.see, self._seen.see_text  # see `_SeenIds`

    def __call__(self, hidden: Tensor) -> Tensor:
        normed = self._norm(hidden)
        logits = hidden.new_full((len(hidden), self._size), -math.inf)
        logits.index_copy_(1, self._ids, self.linears[0](normed))
        return self._seen.add_to(logits, normed)


class _SeenIds:
    """Rows of a head for ids of sequences that are not among the likely ones.

    Args:
        like: a tensor with the device and dtype of hidden states.
    """

    def __init__(self, whole: Linear, likely: frozenset[int], like: Tensor) -> None:
        self._whole, self._likely = whole, likely
        self._slots: dict[int, int] = {}  # id -> its row here
        self._ids = torch.empty(0, dtype=torch.long, device=like.device)
        self._rows = like.new_empty(0, whole.shape[1])
        self._bias = None if whole.bias is None else like.new_empty(0)
        self._mask: Tensor | None = None  # [B, slots] -inf for ids that a row has not seen; None: all 0
        self._lengths: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # ids that were read
        self._seen_by: WeakKeyDictionary[Any, set[int]] = WeakKeyDictionary()
        self._masked_for: list[Any] = []

    def see(self, sequences: Sequence[Any]) -> None:
        """Read new ids of these sequences (see `decoding.sequence`), one for each row of the next passes."""
        changed = len(sequences) != len(self._masked_for) or any(
            map(operator.is_not, sequences, self._masked_for)
        )
        self._masked_for = [*sequences]
        for sequence in sequences:
            seen, length = self._seen_by.setdefault(sequence, set()), self._lengths.get(sequence, 0)
            new = {id_ for id_ in sequence.ids_from(length) if id_ not in self._likely} - seen
            seen |= self._kept(new)
            changed |= bool(new)
            self._lengths[sequence] = sequence.length
        if changed:
            self._mask_by([self._seen_by[sequence] for sequence in sequences])

    def see_text(self, ids: Sequence[int], num_positions: int) -> None:
        """Read a text, for a pass over its last positions: each knows the ids up to its own."""
        self._kept({id_ for id_ in ids if id_ not in self._likely})
        first = len(ids) - num_positions
        self._mask_by([{*ids[: first + i + 1]} for i in range(num_positions)])
        self._masked_for = []

    def add_to(self, logits: Tensor, hidden: Tensor) -> Tensor:
        """Write the logits of seen ids to logits [B, V]; hidden states [B, H] are normed."""
        if not self._slots:
            return logits
        own = torch.mm(hidden, self._rows.t())
        own = own if self._bias is None else own + self._bias
        return logits.index_copy_(1, self._ids, own if self._mask is None else own + self._mask)

    def _kept(self, ids: set[int]) -> set[int]:
        """Copy the rows of these ids while there is room; returns the ids that have a row."""
        new = sorted(id_ for id_ in ids if id_ not in self._slots)
        if len(self._slots) + len(new) > _MOST_SEEN:
            self._free_unused()
        new = new[: _MOST_SEEN - len(self._slots)]
        if new:
            at = on_device(new, self._ids.device)
            self._slots |= {id_: len(self._slots) + i for i, id_ in enumerate(new)}
            self._ids = torch.cat((self._ids, at))
            self._rows = torch.cat((self._rows, self._whole.rows(at).to(self._rows.dtype)))
            if self._bias is not None and self._whole.bias is not None:
                self._bias = torch.cat((self._bias, self._whole.bias[at].to(self._bias.dtype)))
        return ids & self._slots.keys()

    def _free_unused(self) -> None:
        """Drop the rows of ids that no living sequence has seen."""
        used = set().union(*self._seen_by.values())
        kept = {id_: slot for id_, slot in self._slots.items() if id_ in used}
        at = on_device([*kept.values()], self._ids.device)
        self._slots = {id_: slot for slot, id_ in enumerate(kept)}
        self._ids, self._rows = self._ids[at], self._rows[at]
        self._bias = None if self._bias is None else self._bias[at]

    def _mask_by(self, seen: Sequence[set[int]]) -> None:
        if all(self._slots.keys() <= ids for ids in seen):
            self._mask = None
            return
        numbers = [0.0 if id_ in ids else -math.inf for ids in seen for id_ in self._slots]
        self._mask = on_device(numbers, self._ids.device, self._rows.dtype).view(len(seen), -1)


def _linear(head: FusedHead | PlainHead, number: int) -> Linear:
    """The projection of a whole head."""
    if isinstance(head, FusedHead):
        return head.linears[0]
    linear = plain_linear(head.module)
    if linear is None:
        raise ValueError(
            f"draft_vocabulary {number}: needs the whole head on one device, not with --parallel tensor"
        )
    valid_for, kept = _PLAIN.get(head.module, (None, linear))
    if valid_for != head.structure:
        _PLAIN[head.module] = head.structure, linear
        return linear
    follow_weights([kept])
    return kept
