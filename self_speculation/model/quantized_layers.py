"""Fused layers over weights in fewer bits, made from the model's own: for cheap drafts, never for the target.

The formats are those of `low_bit_linear`. With layers in four bits the head has more: it is where four cost
most agreement. Each copy stays with the product that it was made of, see `Linear.derived`.
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
from self_speculation.model.devices import free_memory, num_ranks
from self_speculation.model.families import context_length
from self_speculation.model.fused_layers import FUSED_MODEL_TYPES, FusedHead, FusedLayer
from self_speculation.model.kv_cache import KVCache
from self_speculation.model.linear import Linear
from self_speculation.model.low_bit_linear import (
    Float16Head,
    Int4Linear,
    Int8Linear,
    LowBitLinear,
    works,
)
from self_speculation.model.model_runner import ModelRunner, forward_early
from self_speculation.model.progress import progress
from self_speculation.model.short_head import ShortHead

# How large inputs are is learnt from so many tokens, in passes over at most so many.
_TOKENS_TO_LEARN, _TOKENS_OF_A_PASS = 256, 64


class Formats(NamedTuple):
    """What the layers and the head of a copy multiply by; None: the model's own head."""

    of_layers: type[LowBitLinear]
    of_head: type[LowBitLinear] | None


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
        wanted: Formats = Formats(Int8Linear, Int8Linear)
    elif device.type == "cuda" or dtype != torch.float32:
        wanted = Formats(Int4Linear, None)
    else:
        halves = works(Float16Head, device, dtype)
        wanted = Formats(Int4Linear, Float16Head if halves else Int8Linear)
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
    if draft_weights != "exact" and model_type not in FUSED_MODEL_TYPES:
        known = ", ".join(FUSED_MODEL_TYPES)
        raise ValueError(
            f"draft_weights {draft_weights}: there are no copies of a {model_type} model, only of {known}"
        )


def quantized(
    runner: ModelRunner, num_layers: int, draft_weights: DraftWeights, short_head: ShortHead | None = None
) -> ModelRunner:
    """The first layers and the head of a decoder in fewer bits, over its own cache. Each copy is made once.

    Args:
        short_head: takes the place of the head.

    Raises:
        ValueError: another family, layers that are not fused, no kernels for them, or no room for the copies.
    """
    check_family(draft_weights, runner.config.model_type)
    layers = [layer for layer in runner.layers[:num_layers] if isinstance(layer, FusedLayer)]
    if len(layers) < num_layers or not isinstance(runner.head, FusedHead):
        raise ValueError(
            f"draft_weights {draft_weights}: needs fused layers, so fuse(model), attn_implementation sdpa,"
            " and layers and head without hooks, adapters or quantised weights"
        )
    head = short_head or runner.head
    of_layers, of_head = formats(draft_weights, runner.rotary.device, runner.model.dtype)
    if short_head is not None:  # it misses more ids than four bits of its rows confuse
        of_head = of_layers
    kinds = {linear: of_layers for layer in layers for linear in layer.linears}
    if of_head is not None:
        kinds |= dict.fromkeys(head.linears, of_head)
    missing = {linear: kind for linear, kind in kinds.items() if not linear.has_derived(kind)}
    _check_room(missing, draft_weights, runner)
    weigh = any(kind.weighs_inputs for kind in missing.values())
    squares = _squares_of_inputs(runner, layers) if weigh else {}

    def copied(linear: Linear) -> LowBitLinear:
        kind = kinds[linear]
        return linear.derived(kind, lambda: kind(linear, squares.get(linear)))

    # On a CPU each copy is many short operations, which one thread does faster than several together.
    num_threads = torch.get_num_threads() if runner.rotary.device.type == "cpu" else 1
    with (
        progress(f"copies for drafts, {draft_weights}", _num_bytes(missing)) as advance,
        ThreadPoolExecutor(num_threads) as threads,
    ):
        for made in threads.map(copied, missing):
            advance(made.num_bytes)
    copies = [layer.over(copied) for layer in layers]
    return runner.over(copies, head if of_head is None else head.over(copied))


def _num_bytes(kinds: Mapping[Linear, type[LowBitLinear]]) -> int:
    """Of copies of these kinds."""
    return sum(kind.bytes_of(linear.shape) for linear, kind in kinds.items())


def _check_room(
    missing: Mapping[Linear, type[LowBitLinear]], draft_weights: DraftWeights, runner: ModelRunner
) -> None:
    """Raises ValueError where these copies do not fit."""
    if not missing:
        return
    needed = _num_bytes(missing)
    free = free_memory(runner.rotary.device, num_ranks(runner.model))
    if needed > free:
        raise ValueError(
            f"draft_weights {draft_weights}: takes {needed / 2**30:.2f} GiB more than the model, and "
            f"{free / 2**30:.2f} GiB are free; fewer layers (exit_layer) take less"
        )


class _Watched:
    """A product that adds up the squares of its inputs."""

    def __init__(self, squares: MutableMapping[Linear, Tensor], linear: Linear) -> None:
        self._squares, self._product = squares, linear

    def __call__(self, x: Tensor) -> Tensor:
        sums = x.float().square().sum(0)
        self._squares[self._product] = self._squares.get(self._product, 0) + sums
        return self._product(x)

    unconverted = __call__

    def add_to(self, hidden: Tensor, x: Tensor) -> Tensor:
        return hidden.add_(self(x))


@torch.no_grad()
def _squares_of_inputs(runner: ModelRunner, layers: Sequence[FusedLayer]) -> Mapping[Linear, Tensor]:
    """[in] for every product of these layers, summed over some tokens.

    Which inputs are large is the layers' matter more than the text's: tokens from all over the vocabulary
    tell as much of it as texts do, and need no tokenizer.
    """
    squares: dict[Linear, Tensor] = {}
    watched = runner.over([layer.over(partial(_Watched, squares)) for layer in layers], runner.head)
    vocabulary = watched.config.vocab_size
    tokens = torch.arange(_TOKENS_TO_LEARN, device=runner.rotary.device) * vocabulary // _TOKENS_TO_LEARN
    width = min(_TOKENS_OF_A_PASS, context_length(runner.config))
    for start in range(0, _TOKENS_TO_LEARN, width):
        watched.cache = KVCache(len(layers), width)
        watched.reserve(width, width)
        # Far apart in the vocabulary, so that neighbours are not alike.
        ids = tokens.view(16, -1).T.flatten()[start : start + width]
        forward_early(watched, ids[None], len(layers), num_logits=0)
    return squares
