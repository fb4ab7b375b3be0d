"""Norm and head for drafts that read some rows of the head only: a small model's head is a third of it.

After Zhao et al., FR-Spec (arXiv 2502.14856) and VocabTrim (arXiv 2506.22694). The rows are those of a fixed
list of ids. Logits have their full width, with -inf for all other ids, so that processors, sampling and the
accept rule need not know of it.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import PreTrainedModel

from self_speculation.model.decoder import Decoder, PlainHead
from self_speculation.model.lean_layers import LeanHead, plain_product
from self_speculation.model.products import Product
from self_speculation.transfers import on_device

# Ids of a model by how often they were counted, the most frequent first.
_FREQUENT: WeakKeyDictionary[nn.Module, tuple[int, ...]] = WeakKeyDictionary()

# The products of heads that are not lean, and what they are valid for. They keep the rows that were copied.
_PLAIN: WeakKeyDictionary[nn.Module, tuple[Hashable, Product]] = WeakKeyDictionary()


def prefer_ids(model: PreTrainedModel, counts: Mapping[int, int]) -> None:
    """Draft with the ids that were counted most, where a draft has a short vocabulary."""
    _FREQUENT[model] = tuple(sorted(counts, key=lambda id_: -counts[id_]))


def likely_ids(model: PreTrainedModel, number: int) -> list[int]:
    """So many ids in ascending order: the most frequent ones, and where too few were counted the first ones
    of the tokenizer, which learnt them first.
    """
    size = model.get_output_embeddings().weight.shape[0]
    frequent = [id_ for id_ in _FREQUENT.get(model, ()) if 0 <= id_ < size][:number]
    others = itertools.filterfalse(set(frequent).__contains__, range(size))
    return sorted([*frequent, *itertools.islice(others, number - len(frequent))])


class ShortHead:
    """A decoder's norm and head, [T, H] -> [T, V], with -inf for all but so many likely ids.

    Raises:
        ValueError: the head's weight is not a plain tensor.
    """

    def __init__(self, decoder: Decoder, number: int) -> None:
        whole = _product(decoder.head, number)
        ids = likely_ids(decoder.model, number)
        self._norm, self._size = decoder.head.norm, len(whole.weight)
        self._ids = on_device(ids, whole.weight.device)
        self.products: tuple[Any] = (whole.derived(tuple(ids), lambda: whole.of_rows(self._ids)),)

    def over(self, make: Callable[[Product], Any]) -> ShortHead:
        """As that of `LeanHead`."""
        other = copy.copy(self)
        other.products = (make(self.products[0]),)
        return other

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = hidden.new_full((len(hidden), self._size), -math.inf)
        return logits.index_copy_(1, self._ids, self.products[0](self._norm(hidden)))


def _product(head: LeanHead | PlainHead, number: int) -> Product:
    """x W^T + b of a whole head."""
    if isinstance(head, LeanHead):
        return head.products[0]
    product = plain_product(head.module)
    if product is None:
        raise ValueError(
            f"draft_vocabulary {number}: needs the whole head on one device, not with --parallel tensor"
        )
    valid_for, kept = _PLAIN.get(head.module, (None, product))
    if valid_for != head.identity:
        _PLAIN[head.module] = head.identity, product
        return product
    kept.follow_weight()
    return kept
