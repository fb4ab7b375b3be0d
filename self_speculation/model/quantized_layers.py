"""Lean layers over weights in fewer bits, made from the model's own: for cheap drafts, never for the target.

The formats are those of `low_bit_products`. With layers in four bits the head has more: it is where four cost
most agreement. Each copy stays with the product that it was made of, see `Product.derived`.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from self_speculation.config import DraftWeights
from self_speculation.model.decoder import Decoder, forward_early
from self_speculation.model.devices import free_memory, num_ranks
from self_speculation.model.families import context_length
from self_speculation.model.kv_cache import KVCache
from self_speculation.model.lean_layers import LEAN_MODEL_TYPES, LeanHead, LeanLayer
from self_speculation.model.low_bit_products import (
    Float16Product,
    Int4Product,
    Int8Product,
    LowBitProduct,
    works,
)
from self_speculation.model.products import Product
from self_speculation.model.progress import progress
from self_speculation.model.short_head import ShortHead

# How large inputs are is learnt from so many tokens, in passes over at most so many.
_TOKENS_TO_LEARN, _TOKENS_OF_A_PASS = 256, 64


class Formats(NamedTuple):
    """What the layers and the head of a copy multiply by; None: the model's own head."""

    of_layers: type[LowBitProduct]
    of_head: type[LowBitProduct] | None


def formats(draft_weights: DraftWeights, device: torch.device, dtype: torch.dtype) -> Formats:
    """The formats of copies in `draft_weights`, for weights of this dtype on this device.

    Raises:
        ValueError: there are no kernels for them, or none that are faster than the model's own.
    """
    if draft_weights == "int8":
        if device.type == "cuda":
            raise ValueError(
                "draft_weights int8: its kernel is slower on a GPU than the model's own weights; use int4"
            )
        wanted: Formats = Formats(Int8Product, Int8Product)
    elif device.type == "cuda" or dtype != torch.float32:
        wanted = Formats(Int4Product, None)
    else:
        halves = works(Float16Product, device, dtype)
        wanted = Formats(Int4Product, Float16Product if halves else Int8Product)
    if not all(works(kind, device, dtype) for kind in wanted if kind is not None):
        raise ValueError(
            f"draft_weights {draft_weights}: there are no kernels for it with {dtype} on {device}"
        )
    return wanted


def bytes_per_weight(model: PreTrainedModel, draft_weights: DraftWeights) -> tuple[float, float]:
    """Bytes that a draft reads for each weight of its layers, and of its head. Raises what `formats` does."""
    own = float(model.dtype.itemsize)
    if draft_weights == "exact":
        return own, own
    of_layers, of_head = formats(draft_weights, model.device, model.dtype)
    return of_layers.bytes_per_weight, own if of_head is None else of_head.bytes_per_weight


def check_family(draft_weights: DraftWeights, model_type: str) -> None:
    """Refuse copies where no model of this type has any; its config tells, before any weight is read.

    Raises:
        ValueError: names the type and those that have copies.
    """
    if draft_weights != "exact" and model_type not in LEAN_MODEL_TYPES:
        known = ", ".join(LEAN_MODEL_TYPES)
        raise ValueError(
            f"draft_weights {draft_weights}: there are no copies of a {model_type} model, only of {known}"
        )


def quantized(
    decoder: Decoder, num_layers: int, draft_weights: DraftWeights, short_head: ShortHead | None = None
) -> Decoder:
    """The first layers and the head of a decoder in fewer bits, over its own cache. Each copy is made once.

    Args:
        short_head: takes the place of the head.

    Raises:
        ValueError: another family, layers that are not lean, no kernels for them, or no room for the copies.
    """
    check_family(draft_weights, decoder.config.model_type)
    layers = [layer for layer in decoder.layers[:num_layers] if isinstance(layer, LeanLayer)]
    if len(layers) < num_layers or not isinstance(decoder.head, LeanHead):
        raise ValueError(
            f"draft_weights {draft_weights}: needs lean layers, so fuse(model), attn_implementation sdpa, and"
            " layers and head without hooks, adapters or quantised weights"
        )
    head = short_head or decoder.head
    of_layers, of_head = formats(draft_weights, decoder.rotary.device, decoder.model.dtype)
    if short_head is not None:  # it misses more ids than four bits of its rows confuse
        of_head = of_layers
    kinds = {product: of_layers for layer in layers for product in layer.products}
    if of_head is not None:
        kinds |= dict.fromkeys(head.products, of_head)
    missing = {product: kind for product, kind in kinds.items() if not product.has_derived(kind)}
    _check_room(missing, draft_weights, decoder)
    weigh = any(kind.weighs_inputs for kind in missing.values())
    squares = _squares_of_inputs(decoder, layers) if weigh else {}

    def copied(product: Product) -> LowBitProduct:
        kind = kinds[product]
        return product.derived(kind, lambda: kind(product, squares.get(product)))

    # On a CPU each copy is many short operations, which one thread does faster than several together.
    num_threads = torch.get_num_threads() if decoder.rotary.device.type == "cpu" else 1
    with (
        progress(f"copies for drafts, {draft_weights}", _num_bytes(missing)) as advance,
        ThreadPoolExecutor(num_threads) as threads,
    ):
        for made in threads.map(copied, missing):
            advance(made.num_bytes)
    copies = [layer.over(copied) for layer in layers]
    return decoder.over(copies, head if of_head is None else head.over(copied))


def _num_bytes(kinds: Mapping[Product, type[LowBitProduct]]) -> int:
    """Of copies of these kinds."""
    return sum(kind.bytes_of(product.shape) for product, kind in kinds.items())


def _check_room(
    missing: Mapping[Product, type[LowBitProduct]], draft_weights: DraftWeights, decoder: Decoder
) -> None:
    """Raises ValueError where these copies do not fit."""
    if not missing:
        return
    needed = _num_bytes(missing)
    free = free_memory(decoder.rotary.device, num_ranks(decoder.model))
    if needed > free:
        raise ValueError(
            f"draft_weights {draft_weights}: takes {needed / 2**30:.2f} GiB more than the model, and "
            f"{free / 2**30:.2f} GiB are free; fewer layers (exit_layer) take less"
        )


class _Watched:
    """A product that adds up the squares of its inputs."""

    def __init__(self, squares: MutableMapping[Product, Tensor], product: Product) -> None:
        self._squares, self._product = squares, product

    def __call__(self, x: Tensor) -> Tensor:
        sums = x.float().square().sum(0)
        self._squares[self._product] = self._squares.get(self._product, 0) + sums
        return self._product(x)

    unconverted = __call__

    def add_to(self, hidden: Tensor, x: Tensor) -> Tensor:
        return hidden.add_(self(x))


@torch.no_grad()
def _squares_of_inputs(decoder: Decoder, layers: Sequence[LeanLayer]) -> Mapping[Product, Tensor]:
    """[in] for every product of these layers, summed over some tokens.

    Which inputs are large is the layers' matter more than the text's: tokens from all over the vocabulary
    tell as much of it as texts do, and need no tokenizer.
    """
    squares: dict[Product, Tensor] = {}
    watched = decoder.over([layer.over(partial(_Watched, squares)) for layer in layers], decoder.head)
    vocabulary = watched.config.vocab_size
    tokens = torch.arange(_TOKENS_TO_LEARN, device=decoder.rotary.device) * vocabulary // _TOKENS_TO_LEARN
    width = min(_TOKENS_OF_A_PASS, context_length(decoder.config))
    for start in range(0, _TOKENS_TO_LEARN, width):
        watched.cache = KVCache(len(layers), width)
        watched.reserve(width, width)
        # Far apart in the vocabulary, so that neighbours are not alike.
        ids = tokens.view(16, -1).T.flatten()[start : start + width]
        forward_early(watched, ids[None], len(layers), num_logits=0)
    return squares
