"""Norm and head for drafts that read a few rows of the head only: a small model's head is a third of it.

After Zhao et al., FR-Spec (arXiv 2502.14856) and VocabTrim (arXiv 2506.22694). Logits have their full width,
with -inf for all other ids, so that processors, sampling and the accept rule need not know of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from self_speculation.model.decoder import Decoder, PlainHead
from self_speculation.model.lean_layers import LeanHead, Product, plain_product
from self_speculation.model.vocabulary import Shortlist
from self_speculation.transfers import on_device

# A row's own ids are rounded up to a multiple of so many.
_STEP_OF_OWN = 32


@dataclass(frozen=True)
class Gathered:
    """The rows of a head that a list names, copied once for all generations."""

    shortlist: Shortlist
    weight: int  # address of the head's weight
    ids: Tensor  # [n]
    product: Callable[[Tensor], Tensor]  # [T, H] -> [T, n]


class ShortHead:
    """[B * T, H] -> [B * T, V], with -inf for all but the likely ids and, in each of B rows, its own.

    Args:
        decoder: the model's, with the whole head.
        head: the one to be shortened; the decoder's, or a copy of it in fewer bits.
        number: how many likely ids.

    Raises:
        ValueError: the head's weight is not a plain tensor.
    """

    def __init__(self, decoder: Decoder, head: Callable[[Tensor], Tensor], number: int) -> None:
        self.number = number
        self._prepared = decoder.prepared
        self._norm = decoder.head.norm
        self._whole = _product(decoder.head, number)
        kind: Any = type(head.products[0]) if isinstance(head, LeanHead) else Product
        self._kind = None if kind is Product else kind
        self._size = len(self._whole.weight)
        self._own: tuple[Tensor, Tensor, Tensor | None] | None = None
        self.renew()

    def renew(self) -> None:
        """Take the list of likely ids as it is now. Its rows are copied where no generation did so before."""
        likely = self._prepared.vocabulary.likely(self.number, self._size)
        key, weight = (self.number, self._kind), self._whole.weight.data_ptr()
        made = self._prepared.gathered.get(key)
        if made is None or made.shortlist is not likely or made.weight != weight:
            ids = on_device(likely.ids, self._whole.weight.device)
            rows = self._whole.of_rows(ids)
            made = Gathered(likely, weight, ids, rows if self._kind is None else self._kind(rows))
            self._prepared.gathered[key] = made
        self._gathered, self._own = made, None

    def knows(self, ids: Collection[int]) -> bool:
        """Whether all of them are likely."""
        return self._gathered.shortlist.known.issuperset(ids)

    def follow(self, own: Sequence[Collection[int]]) -> None:
        """From now on passes are of B rows, with these ids of their own."""
        known = self._gathered.shortlist.known
        missing = [sorted({id_ for id_ in ids if id_ < self._size} - known) for ids in own]
        width = -(-max(map(len, missing)) // _STEP_OF_OWN) * _STEP_OF_OWN
        if not width:
            self._own = None
            return
        # What is missing goes to a place behind the last id.
        padded = [id_ for ids in missing for id_ in [*ids, *[self._size] * (width - len(ids))]]
        places = on_device(padded, self._whole.weight.device).view(len(own), width)  # [B, n]
        rows = places.clamp(max=self._size - 1)
        bias = self._whole.bias
        self._own = places, self._whole.weight[rows], None if bias is None else bias[rows]

    def __call__(self, hidden: Tensor) -> Tensor:
        hidden = self._norm(hidden)
        logits = hidden.new_full((len(hidden), self._size + 1), -math.inf)
        logits.index_copy_(1, self._gathered.ids, self._gathered.product(hidden))
        if self._own is not None:
            places, weights, bias = self._own  # [B, n], [B, n, H], [B, n]
            of_own = torch.bmm(hidden.view(len(places), -1, hidden.shape[1]), weights.mT)  # [B, T, n]
            if bias is not None:
                of_own += bias[:, None]
            logits.view(*of_own.shape[:2], -1).scatter_(2, places[:, None].expand_as(of_own), of_own)
        return logits[:, :-1]


def _product(head: LeanHead | PlainHead, number: int) -> Product:
    """x W^T + b of a whole head."""
    if isinstance(head, LeanHead):
        return head.products[0]
    product = plain_product(head.module)
    if product is None:
        raise ValueError(
            f"draft_vocabulary {number}: needs the whole head on one device, not with --parallel tensor"
        )
    return product
