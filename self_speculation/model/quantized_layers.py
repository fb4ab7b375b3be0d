"""Lean layers over weights in fewer bits, made from the model's own: for cheap drafts, never for the target.

The formats are those of `low_bit_products`. With layers in four bits the head has more: it is where four cost
most agreement. Which format promises most on this machine with this model, auto finds out.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from self_speculation.config import DraftWeights
from self_speculation.model.decoder import Decoder, forward_early
from self_speculation.model.devices import free_memory
from self_speculation.model.kv_cache import KVCache
from self_speculation.model.lean_layers import Lean, LeanHead, lean_head, lean_layer
from self_speculation.model.low_bit_products import (
    Float16Product,
    Int4Product,
    Int8Product,
    LowBitProduct,
    works,
)
from self_speculation.model.prepared import Prepared, prepared
from self_speculation.model.products import Product

# How large inputs are is learnt from so many tokens, in passes over at most so many.
_TOKENS_TO_LEARN, _TOKENS_OF_A_PASS = 256, 64

# What is timed to find the fastest: products of so many elements, so often; between them, so many others are
# read, since decoding does not find weights in the processor's cache either.
_SAMPLE, _TURNS, _LARGER_THAN_CACHES = 2**23, 5, 2**25

# Of each lean form, its copies by what they multiply by.
Copies = MutableMapping[Lean, dict[Any, Lean]]

# What layers and heads of a copy multiply by; of several, the first that works.
KINDS: Mapping[DraftWeights, tuple[type[LowBitProduct], Sequence[type[LowBitProduct]]]] = {
    "float16": (Float16Product, [Float16Product]),
    "int4": (Int4Product, [Float16Product, Int8Product]),
    "int8": (Int8Product, [Int8Product]),
}


def quantized(decoder: Decoder, num_layers: int, draft_weights: DraftWeights) -> Decoder:
    """The first layers and the head of a decoder in fewer bits, over its own cache. Each copy is made once.

    Raises:
        ValueError: what `check_copies` raises.
    """
    parts = _lean([*decoder.layers[:num_layers], decoder.head], draft_weights)
    kinds, copies = _kinds(parts, draft_weights, decoder.prepared), decoder.prepared.copies
    if missing := _check_room(kinds, copies, draft_weights):
        weigh = any(kind.weighs_inputs for kind in missing.values())
        squares = _squares_of_inputs(decoder, parts[:-1]) if weigh else {}
        for part, kind in missing.items():
            copies.setdefault(part, {})[kind] = part.over(partial(_copied, kind, squares))
    *layers, head = (copies[part][kind] for part, kind in kinds.items())
    return decoder.over(list(layers), cast(LeanHead, head))


def check_copies(model: PreTrainedModel, num_layers: int, draft_weights: DraftWeights) -> None:
    """That `quantized` can be called for so many layers of the model, before anything is made.

    Raises:
        ValueError: layers that are not lean, no kernel for them, or no room for the copies.
    """
    known = prepared(model)
    _check_room(
        _kinds(_parts(model, num_layers, draft_weights), draft_weights, known), known.copies, draft_weights
    )


def format_of(known: Prepared, draft_weights: DraftWeights) -> DraftWeights:
    """The same, or what auto has found to be fastest."""
    return known.fastest or draft_weights if draft_weights == "auto" else draft_weights


def bytes_per_weight(model: PreTrainedModel, draft_weights: DraftWeights) -> tuple[float, float]:
    """That a draft reads of its layers and of its head. Raises what `check_copies` does."""
    if draft_weights == "exact":
        return model.dtype.itemsize, model.dtype.itemsize
    kinds = _kinds(_parts(model, 1, draft_weights), draft_weights, prepared(model))
    of_layers, of_head = (kind.bytes_per_weight for kind in kinds.values())
    return of_layers, of_head


def bytes_held(model: PreTrainedModel) -> int:
    """By all copies that were made for a model."""
    return sum(_num_bytes({part: kind}) for part, made in prepared(model).copies.items() for kind in made)


def _parts(model: PreTrainedModel, num_layers: int, draft_weights: DraftWeights) -> list[Lean]:
    layers = [lean_layer(model, layer) for layer in model.base_model.layers[:num_layers]]
    return _lean([*layers, lean_head(model)], draft_weights)


def _lean(parts: Sequence[Any], draft_weights: DraftWeights) -> list[Lean]:
    """The same; raises ValueError where one of them is not lean."""
    lean = [part for part in parts if isinstance(part, Lean)]
    if len(lean) < len(parts):
        raise ValueError(
            f"draft_weights {draft_weights}: needs lean layers (of a known family, plain, fuse True)"
        )
    return lean


# What each part of a copy multiplies by.
Kinds = Mapping[Lean, type[LowBitProduct]]


def _kinds(parts: Sequence[Lean], draft_weights: DraftWeights, known: Prepared) -> Kinds:
    """Raises ValueError where there is no kernel."""
    possible = _possible(parts)
    if draft_weights == "auto" and possible:
        known.fastest = draft_weights = known.fastest or _fastest(parts, possible)
    if draft_weights not in possible:
        weight = parts[0].products[0].weight
        has = f"a model in {str(weight.dtype).removeprefix('torch.')} on this {weight.device.type}"
        others = f", but there are for {', '.join(possible)}" if possible else ""
        raise ValueError(f"draft_weights {draft_weights}: there is no kernel for {has}{others}")
    return possible[draft_weights]


def _possible(parts: Sequence[Lean]) -> dict[DraftWeights, Kinds]:
    """By the formats that there are kernels for."""
    weight = parts[0].products[0].weight
    possible: dict[DraftWeights, Kinds] = {}
    for draft_weights, (of_layers, for_head) in KINDS.items():
        of_head = next((kind for kind in for_head if works(kind, weight.device, weight.dtype)), None)
        if of_head is not None and works(of_layers, weight.device, weight.dtype):
            possible[draft_weights] = {
                part: of_head if isinstance(part, LeanHead) else of_layers for part in parts
            }
    return possible


@torch.no_grad()
def _fastest(parts: Sequence[Lean], possible: Mapping[DraftWeights, Kinds]) -> DraftWeights:
    """Of formats that fit: on a CPU the one that promises most by the time that some products take and by how
    far off they are, since processors differ in the one and models in the other; elsewhere what reads least.
    """
    first = parts[0].products[0]
    device, free = first.weight.device, free_memory(first.weight.device)
    num_bytes = {draft_weights: _num_bytes(kinds) for draft_weights, kinds in possible.items()}
    fitting = [each for each in possible if num_bytes[each] <= free]
    if device.type != "cpu" or not fitting:
        return min(possible, key=num_bytes.__getitem__)
    sample: list[Product] = []
    for product in itertools.chain.from_iterable(part.products for part in parts):
        room = _SAMPLE - sum(taken.weight.numel() for taken in sample)
        if rows := min(len(product.weight), room // product.weight.shape[1]):
            sample.append(product.of_rows(torch.arange(rows)))
    inputs = [_spread(product.weight.new_empty(1, product.weight.shape[1])) for product in sample]
    sides: dict[DraftWeights, Sequence[Callable[[Tensor], Tensor]]] = {"exact": sample}
    sides |= {each: [KINDS[each][0](product) for product in sample] for each in fitting}
    others, took = torch.zeros(_LARGER_THAN_CACHES), dict.fromkeys(sides, math.inf)
    results: dict[DraftWeights, Tensor] = {}
    for _, (each, products) in itertools.product(range(_TURNS), sides.items()):
        others.sum()
        started = time.perf_counter()
        made = [multiply(x) for multiply, x in zip(products, inputs, strict=True)]
        took[each] = min(took[each], time.perf_counter() - started)
        results[each] = torch.cat(made, 1).float()
    wanted = results["exact"]
    errors = {each: float((results[each] - wanted).norm() / wanted.norm()) for each in fitting}
    return max(fitting, key=lambda each: _promised(took[each] / took["exact"], errors[each]))


def _spread(x: Tensor) -> Tensor:
    """Numbers of both signs, without drawing any from anybody's random numbers."""
    return x.copy_(torch.arange(x.numel()).mul(2.4).sin())


def _promised(time: float, error: float) -> float:
    """The speed-up, by the formula, of drafts by a copy whose products take so much of the time of the
    model's own, and are off by so much of their size.

    What is around products takes about a quarter of their time, and each further token of a verification a
    twentieth of a plain step. How often a guess is right was measured: 3 in 100 are lost by an error of 0.01,
    11 by one of 0.1.
    """
    wrong = 0.35 * math.sqrt(max(error, 1e-6))
    c = (time + 0.25) / 1.25
    return max((1 - (1 - wrong) ** (k + 1)) / wrong / (k * c + 1 + 0.05 * k) for k in range(1, 9))


def _num_bytes(kinds: Kinds) -> int:
    """That copies of these kinds take, or would take."""
    return sum(kind.num_bytes(product.weight) for part, kind in kinds.items() for product in part.products)


def _check_room(kinds: Kinds, copies: Copies, draft_weights: DraftWeights) -> Kinds:
    """Those that have no copy yet; raises ValueError where their copies do not fit."""
    missing = {part: kind for part, kind in kinds.items() if kind not in copies.get(part, {})}
    if not missing:
        return {}
    needed, free = _num_bytes(missing), free_memory(next(iter(missing)).products[0].weight.device)
    if needed > free:
        raise ValueError(
            f"draft_weights {draft_weights}: takes {needed / 2**30:.2f} GiB more than the model, and "
            f"{free / 2**30:.2f} GiB are free; fewer layers (exit_layer) take less"
        )
    return missing


def _copied(kind: type[LowBitProduct], squares: Mapping[Product, Tensor], product: Product) -> LowBitProduct:
    return kind(product, squares.get(product))


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
def _squares_of_inputs(decoder: Decoder, layers: Sequence[Lean]) -> Mapping[Product, Tensor]:
    """[in] for every product of these layers, summed over some tokens.

    Which inputs are large is the layers' matter more than the text's: tokens from all over the vocabulary
    tell as much of it as texts do, and need no tokenizer.
    """
    squares: dict[Product, Tensor] = {}
    watched = decoder.over([layer.over(partial(_Watched, squares)) for layer in layers], decoder.head)
    vocabulary = watched.config.vocab_size
    tokens = torch.arange(_TOKENS_TO_LEARN, device=decoder.rotary.device) * vocabulary // _TOKENS_TO_LEARN
    width = min(_TOKENS_OF_A_PASS, decoder.rotary.shape[1])
    for start in range(0, _TOKENS_TO_LEARN, width):
        watched.cache = KVCache(len(layers), width)
        # Far apart in the vocabulary, so that neighbours are not alike.
        ids = tokens.view(16, -1).T.flatten()[start : start + width]
        forward_early(watched, ids[None], len(layers), num_logits=0)
    return squares
