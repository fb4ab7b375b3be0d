"""Lean layers over weights in fewer bits, made from the model's own: for cheap drafts, never for the target.

Weight-only, by kernels that torch has:
- float16: of a float32 model on a CPU. Activations stay as they are.
- int8: a row of a weight is stored in 127 steps of its largest element, a byte each; activations in bfloat16.
- int4: 32 elements of a row share a scale and an offset and are stored in 16 steps, five bits each with
  those; activations in bfloat16. Scale and offset are those by which the product is off least for inputs as
  large as the model's own are. The head, where four bits cost most agreement, is in float16 or else in int8.
- auto: of these, what promises most on this machine with this model.

What other groups and roundings give is in docs/performance.md.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from self_speculation.config import DraftWeights
from self_speculation.model.decoder import Decoder, forward_early
from self_speculation.model.devices import free_memory
from self_speculation.model.kv_cache import KVCache, round_up
from self_speculation.model.lean_layers import Lean, LeanHead, lean_head, lean_layer
from self_speculation.model.prepared import Prepared, prepared
from self_speculation.model.products import Product

# Elements of a weight that are quantised at a time, about: a large one needs no large copies in fp32.
_AT_A_TIME = 2**20

# Elements of a row that share a scale and an offset.
_GROUP = 32

# Scales that are tried reach over so much of the range of a group.
_SHARES_OF_RANGE = (1.0, 0.9, 0.8)

# How large inputs are is learnt from so many tokens, in passes over at most so many.
_TOKENS_TO_LEARN, _TOKENS_OF_A_PASS = 256, 64

# Kernels for four bits take rows by so many: a weight that has others is padded.
_BLOCK_OF_ROWS = 16

# That for eight bits reads rows by so many elements, also where a row ends before.
_BLOCK_OF_COLUMNS = 16

# What is timed to find the fastest: products of so many elements, so often; between them, so many others are
# read, since decoding does not find weights in the processor's cache either.
_SAMPLE, _TURNS, _LARGER_THAN_CACHES = 2**23, 5, 2**25


class LowBitProduct(ABC):
    """As `Product`, over a copy of its weight in fewer bits."""

    bytes_per_weight: float
    dtype = torch.bfloat16  # of what is multiplied, and of the product
    weighs_inputs = False

    def __init__(self, product: Product, squares: Tensor | None = None) -> None:  # noqa: ARG002
        """
        Args:
            squares: [in] how large the squares of inputs are, where `weighs_inputs`; None: all alike.
        """
        self._bias = None if product.bias is None else product.bias.to(self.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return self.unconverted(x).to(x.dtype)

    def unconverted(self, x: Tensor) -> Tensor:
        """The product in a format of its own, whatever x is."""
        product = self._multiply(x.to(self.dtype))
        return product if self._bias is None else product.add_(self._bias)

    def add_to(self, hidden: Tensor, x: Tensor) -> Tensor:
        """As that of `Product`."""
        return hidden.add_(self.unconverted(x))

    @abstractmethod
    def _multiply(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out] in `dtype`, without a bias."""

    @staticmethod
    @abstractmethod
    def num_bytes(weight: Tensor) -> int:
        """That a copy of a weight [out, in] takes."""


class Float16Product(LowBitProduct):
    """Each element rounded, by a kernel of FBGEMM's."""

    bytes_per_weight = 2.0
    dtype = torch.float32

    def __init__(self, product: Product, squares: Tensor | None = None) -> None:
        super().__init__(product, squares)
        if product.weight.dtype != torch.float32:
            raise NotImplementedError("the model's own weights have no more bits")
        self._weight = torch.ops.quantized.linear_prepack_fp16(product.weight, None)

    def _multiply(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x, self._weight)

    @staticmethod
    def num_bytes(weight: Tensor) -> int:
        return 2 * weight.numel()


class Int8Product(LowBitProduct):
    """Each row in 127 steps of its largest element."""

    bytes_per_weight = 1.0

    def __init__(self, product: Product, squares: Tensor | None = None) -> None:
        super().__init__(product, squares)
        columns = product.weight.shape[1]
        self._padding = round_up(columns, _BLOCK_OF_COLUMNS) - columns
        rows = [_in_eight_bits(pad(rows, (0, self._padding))) for rows in _some_rows(product.weight)]
        weights, scales = zip(*rows, strict=True)
        self._weight, self._scales = torch.cat(weights), torch.cat(scales)  # [out, in], [out]

    def _multiply(self, x: Tensor) -> Tensor:
        columns = pad(x, (0, self._padding)) if self._padding else x
        return torch._weight_int8pack_mm(columns, self._weight, self._scales)

    @staticmethod
    def num_bytes(weight: Tensor) -> int:
        return len(weight) * (round_up(weight.shape[1], _BLOCK_OF_COLUMNS) + 2)  # and the scales


class Int4Product(LowBitProduct):
    """Each group of a row in 16 steps."""

    bytes_per_weight = 0.5 + 4 / _GROUP
    weighs_inputs = True

    def __init__(self, product: Product, squares: Tensor | None = None) -> None:
        super().__init__(product, squares)
        weight = product.weight
        squares = weight.new_ones(weight.shape[1]) if squares is None else squares
        self._num_rows = len(weight)
        self._padding = round_up(weight.shape[1], _GROUP) - weight.shape[1]
        is_on_cpu = weight.device.type == "cpu"
        pack = _packed_for_cpu if is_on_cpu else _packed
        self._kernel = (
            torch.ops.aten._weight_int4pack_mm_for_cpu if is_on_cpu else torch.ops.aten._weight_int4pack_mm
        )
        parts, scales = [], []
        for rows in _some_rows(weight):
            steps, scale = in_four_bits(_padded(rows), pad(squares, (0, self._padding)))
            parts.append(pack(steps))
            scales.append(scale)
        self._weight = torch.cat(parts)
        self._scales = torch.cat(scales, 1)  # [groups of a row, out, 2]

    def _multiply(self, x: Tensor) -> Tensor:
        columns = pad(x, (0, self._padding)) if self._padding else x
        product = self._kernel(columns, self._weight, _GROUP, self._scales)
        # [T, out], of rows that lie one after another as those of every product
        return product if product.shape[1] == self._num_rows else product[:, : self._num_rows].contiguous()

    @staticmethod
    def num_bytes(weight: Tensor) -> int:
        rows, columns = round_up(len(weight), _BLOCK_OF_ROWS), round_up(weight.shape[1], _GROUP)
        return rows * columns // 2 + rows * columns // _GROUP * 4  # and scales and middles


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
        raise ValueError(f"draft_weights {draft_weights}: there is no kernel for {has}")
    return possible[draft_weights]


def _possible(parts: Sequence[Lean]) -> dict[DraftWeights, Kinds]:
    """By the formats that there are kernels for."""
    weight = parts[0].products[0].weight
    possible: dict[DraftWeights, Kinds] = {}
    for draft_weights, (of_layers, for_head) in KINDS.items():
        of_head = next((kind for kind in for_head if _works(kind, weight.device, weight.dtype)), None)
        if of_head is not None and _works(of_layers, weight.device, weight.dtype):
            possible[draft_weights] = {
                part: of_head if isinstance(part, LeanHead) else of_layers for part in parts
            }
    return possible


@cache
@torch.no_grad()
def _works(kind: type[LowBitProduct], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is a kernel."""
    tiny = nn.Linear(_GROUP, _BLOCK_OF_ROWS, bias=False, device="meta")  # which draws no random numbers
    tiny.weight = nn.Parameter(torch.zeros(tiny.weight.shape, device=device, dtype=dtype))
    try:
        kind(Product(tiny))(torch.zeros(1, _GROUP, device=device, dtype=dtype))
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return True


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


def _some_rows(weight: Tensor) -> Sequence[Tensor]:
    """A weight part by part. Kernels for four bits keep rows in blocks of 64 at most: a multiple of it can be
    packed on its own.
    """
    return weight.split(max(1, _AT_A_TIME // weight.shape[1] // 64) * 64)


def _in_eight_bits(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[n, in] -> steps [n, in] from -127 to 127, and how large a step is in each row [n]."""
    exact = rows.float()
    scales = exact.abs().amax(1).clamp(min=1e-12) / 127
    return (exact / scales[:, None]).round().to(torch.int8), scales.to(torch.bfloat16)


def in_four_bits(rows: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """[n, in] and how large the squares of inputs [in] are -> steps [n, in] of int32 from 0 to 15, and for
    each group [groups of a row, n, 2] how large a step is, and the value of step 8.
    """
    groups = rows.float().unflatten(1, (-1, _GROUP))  # [n, groups of a row, elements]
    counts = squares.float().unflatten(0, (-1, _GROUP))
    counts = counts + 1e-6 * counts.mean() + 1e-30  # what was never used does not count, but must be a number
    counts = counts / counts.sum(1, keepdim=True)
    least, largest = groups.aminmax(dim=2)
    mean = (groups * counts).sum(2)
    best = None
    for share in _SHARES_OF_RANGE:
        scales = (largest - least) * share / 15
        tried = _Rounded(groups, counts, mean, scales, (least + largest + scales) / 2)
        for one in (tried, _Rounded(groups, counts, mean, *tried.fitted())):
            best = one if best is None else best.where_better(one)
    assert best is not None
    numbers = torch.stack((best.scales, best.middles), 2).to(torch.bfloat16).transpose(0, 1).contiguous()
    return (best.steps + 8).to(torch.int32).flatten(1), numbers


class _Rounded:
    """Groups [n, g, elements] rounded to steps from -8 to 7 by scales and middles [n, g], these as the
    kernels keep them; and how far off that is.

    Args:
        counts: [g, elements] how much an element counts, 1 in sum.
        mean: [n, g] of the groups, so weighted.
    """

    def __init__(self, groups: Tensor, counts: Tensor, mean: Tensor, scales: Tensor, middles: Tensor) -> None:
        self.scales = scales = scales.clamp(min=1e-12).to(torch.bfloat16).float()
        self.middles = middles = middles.to(torch.bfloat16).float()
        self.steps = steps = ((groups - middles[..., None]) / scales[..., None]).round_().clamp_(-8, 7)
        weighted = steps * counts
        self._mean, self._mean_step = mean, weighted.sum(2)
        self._square, self._product = (weighted * steps).sum(2), (weighted * groups).sum(2)
        # Of (middle + scale * step - element)^2, what depends on the choice.
        of_scales = scales * (scales * self._square + 2 * (middles * self._mean_step - self._product))
        self._off = of_scales + middles * (middles - 2 * mean)

    def fitted(self) -> tuple[Tensor, Tensor]:
        """By least squares, the scales and middles for these steps."""
        variance = self._square - self._mean_step.square()
        scales = (self._product - self._mean_step * self._mean) / variance.clamp(min=1e-12)
        return scales, self._mean - scales * self._mean_step

    def where_better(self, other: _Rounded) -> _Rounded:
        """Group by group, whichever is less far off."""
        better, chosen = other._off < self._off, copy.copy(self)
        chosen.steps = torch.where(better[..., None], other.steps, self.steps)
        for name in ("scales", "middles", "_off"):
            setattr(chosen, name, torch.where(better, getattr(other, name), getattr(self, name)))
        return chosen


def _padded(rows: Tensor) -> Tensor:
    """With zeros, to whole groups and to as many rows as kernels take at once."""
    n, columns = rows.shape
    return pad(rows, (0, round_up(columns, _GROUP) - columns, 0, round_up(n, _BLOCK_OF_ROWS) - n))


def _packed_for_cpu(steps: Tensor) -> Tensor:
    """[n, in] of int32 -> [n, in / 2] of uint8, in an order that is the kernel's business."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(steps, 1)


def _packed(steps: Tensor) -> Tensor:
    """[n, in] of int32 -> [n / 8, in / (16 t), 32, t / 2] of int32, t the largest of 2, 4 and 8 that fits."""
    tiles = next(t for t in (8, 4, 2) if steps.shape[1] % (16 * t) == 0)
    pairs = (steps[:, ::2] << 4 | steps[:, 1::2]).to(torch.uint8)
    return torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), tiles)
