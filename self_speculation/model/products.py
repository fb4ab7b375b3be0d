"""x W^T + b over the weights of modules: by torch's own product, or on a CPU over a copy of W in the order
that another library's kernels read.

What is made of a weight (a packed copy, a copy in fewer bits, some of its rows) stays here with it, and is
forgotten as soon as the weight changes.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import torch
import xxhash
from torch import Tensor, nn

from self_speculation.model.devices import free_memory

T = TypeVar("T")

# Packing is for passes of at most so many tokens; from one width that is measured to the next.
_WIDTHS = (1, 2, 4, 8, 16)
# How often both ways are timed, over weights of so many elements. Packing must be clearly faster.
_TURNS, _SAMPLE, _CLEARLY = 5, 2**24, 0.9
# Packed copies may take so much of the memory that is free.
_SHARE_OF_ROOM = 1 / 3


class Product:
    """x [T, in] -> x W^T + b [T, out].

    Args:
        projections: become one product. Their weights are laid side by side, see `_side_by_side`.
        is_widened: weights in 16 bits multiply inputs in float32, over a copy of them alone. They stay where
            they are: in the mapped file, if they were read from one.
    """

    def __init__(self, *projections: nn.Linear, is_widened: bool = False) -> None:
        self._weights = [projection.weight for projection in projections]
        biases = [projection.bias for projection in projections if projection.bias is not None]
        self.bias = _side_by_side(biases) if biases else None
        self._parameters = [*self._weights, *biases]
        self.is_widened = is_widened
        self._joint = None if is_widened else _side_by_side(self._weights)
        self._weight_t: Any = None if self._joint is None else self._joint.t()
        self.packed_widths: frozenset[int] = frozenset()  # numbers of tokens that the packed copy serves
        self._derived: dict[Hashable, Any] = {}
        self._state_when_made: Hashable = None

    def __call__(self, x: Tensor) -> Tensor:
        product = self._copy()(x) if self._reads_copy(x) else torch.mm(x, self._weight_t)
        return product if self.bias is None else product.add_(self.bias)

    def unconverted(self, x: Tensor) -> Tensor:
        """The product in the format that it is computed in, which copies in fewer bits have of their own."""
        return self(x)

    def add_to(self, hidden: Tensor, x: Tensor) -> Tensor:
        """hidden + x W^T + b, in the place of `hidden`: one kernel, not two."""
        copied = self._reads_copy(x)
        hidden = hidden.add_(self._copy()(x)) if copied else hidden.addmm_(x, self._weight_t)
        return hidden if self.bias is None else hidden.add_(self.bias)

    @property
    def weight(self) -> Tensor:
        """[out, in] of all projections; where it is widened, made for whoever asks."""
        return torch.cat([w.data for w in self._weights]) if self._joint is None else self._joint

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight."""
        return self._weights[0].dtype

    @property
    def shape(self) -> torch.Size:
        """[out, in]"""
        return torch.Size((sum(map(len, self._weights)), self._weights[0].shape[1]))

    def derived(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` makes of this weight. It is called once for each key, until the weight changes."""
        if key not in self._derived:
            self._derived[key] = make()
            self._state_when_made = self._state()
        return self._derived[key]

    def has_derived(self, key: Hashable) -> bool:
        """Whether something has been made of this weight under this key."""
        return key in self._derived

    @property
    def all_derived(self) -> Sequence[Any]:
        return [*self._derived.values()]

    def follow_weight(self) -> None:
        """Forget what was made of the weight, if it has changed since; make what every pass reads.

        Raises:
            ValueError: a weight that is to be widened is by now one that float16 cannot hold.
        """
        if self._derived and self._state() != self._state_when_made:
            self._derived.clear()
        if self.is_widened:
            self._copy()

    def of_rows(self, ids: Tensor) -> Product:
        """The same over a copy of some rows [n] of the weight."""
        rows, weight = copy.copy(self), self.weight[ids]
        rows._joint, rows.bias = weight, None if self.bias is None else self.bias[ids]
        rows._weight_t, rows._weights, rows._parameters, rows._derived = weight.t(), [weight], [weight], {}
        return rows

    @property
    def num_bytes(self) -> int:
        return sum(weight.nbytes for weight in self._weights)

    def tensors(self) -> list[Tensor]:
        """All that a pass reads."""
        return [part for part in (self._joint, self._weight_t, self.bias) if part is not None]

    @property
    def can_be_packed(self) -> bool:
        """On a CPU another library may have faster products than `torch.mm`."""
        weight = self._weights[0]
        kernels = {torch.float32: torch.backends.mkldnn.is_available}
        kernels[torch.bfloat16] = torch.ops.mkldnn._is_mkldnn_bf16_supported
        return (
            not self.is_widened
            and weight.device.type == "cpu"
            and self.dtype in kernels
            and kernels[self.dtype]()
        )

    def _copy(self) -> Callable[[Tensor], Tensor]:
        if self.is_widened:
            return self.derived(InFloat16, lambda: InFloat16(_within_float16(self.weight)))
        return self.derived(Packed, lambda: Packed(self.weight))

    def is_packed(self, width: int) -> bool:
        """Whether passes over so many tokens read a copy in oneDNN's order."""
        return width in self.packed_widths and not torch.compiler.is_compiling()

    def _reads_copy(self, x: Tensor) -> bool:
        return self.is_widened or self.is_packed(x.shape[0])

    @property
    def copy_read(self) -> InFloat16 | Packed | None:
        """The copy that they read, if there is one already."""
        return self._derived.get(InFloat16 if self.is_widened else Packed)

    def _state(self) -> Hashable:
        """A value that changes whenever the weight does.

        A write through `.data` changes nothing but the bits. They are hashed where the model itself reads a
        copy, which takes as long as one or two plain steps. Drafts from an old copy are worse but never
        wrong, so for them the versions that torch counts are enough.
        """
        versions = tuple(p._version for p in self._parameters if not p.is_inference())
        if not {Packed, InFloat16} & self._derived.keys():
            return versions
        return versions, *map(digest, self._weights)


def digest(weight: Tensor) -> Hashable:
    """Changes whenever a bit of a weight on the CPU does."""
    bits = weight.detach().contiguous().flatten().view(torch.uint8).numpy()
    return xxhash.xxh3_128_digest(bits)  # type: ignore[arg-type]


class Packed:
    """x W^T over a copy of W in the order that oneDNN's kernels read."""

    def __init__(self, weight: Tensor) -> None:
        self._weight, self.num_bytes = weight, weight.nbytes
        self._copy = torch.ops.mkldnn._reorder_linear_weight(weight, _WIDTHS[-1])

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._copy, None, "none", [], "")


class InFloat16:
    """x W^T, all in float32, over a copy of W in float16 in the order that FBGEMM's kernels read.

    Weights in bfloat16 are kept exactly from 6e-5 on, smaller ones to within 3e-8; beyond 65504 they are cut.
    """

    def __init__(self, weight: Tensor) -> None:
        self.num_bytes = 2 * weight.numel()
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), None)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


def _within_float16(weight: Tensor) -> Tensor:
    """The weight itself. Raises ValueError where there are numbers in it that float16 cannot hold."""
    if not bool(weight.abs().amax() <= torch.finfo(torch.float16).max):
        raise ValueError("weights beyond 65504, or NaN, cannot be held in 16 bits: they need --dtype float32")
    return weight


def follow_weights(products: Sequence[Product]) -> None:
    """`Product.follow_weight` of each, on as many threads as torch has."""
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        list(threads.map(Product.follow_weight, products))


def _side_by_side(parameters: Sequence[Tensor]) -> Tensor:
    """One tensor of all rows; from then on the parameters are parts of it.

    Each part is a storage of its own over its share of the memory, not a view. So whatever saves, flattens or
    shards a model finds no two parameters that share a storage, and leaves none out.
    """
    if len(parameters) == 1:
        return parameters[0].data
    joint = torch.cat([parameter.data for parameter in parameters])
    for parameter, part in zip(parameters, joint.split([len(p) for p in parameters]), strict=True):
        parameter.data = torch.from_dlpack(part)
    return joint


def _times(weight_t: Tensor, x: Tensor) -> Tensor:
    return torch.mm(x, weight_t)


@torch.inference_mode()
def choose_packed_widths(weights: Sequence[Tensor]) -> frozenset[int]:
    """The numbers of tokens for which packed copies of these weights are clearly faster: up to threefold on
    one processor, never on another. It is measured, in a second at most. None where copies find no room.
    """
    room = _SHARE_OF_ROOM * free_memory(torch.device("cpu"))
    if sum(weight.nbytes for weight in weights) > room:
        return frozenset()
    # Layer after layer, as decoding reads them: another weight is in the cache by the time one comes again.
    up_to = itertools.accumulate(weight.numel() for weight in weights)
    sample = [weight for weight, total in zip(weights, up_to, strict=True) if total <= _SAMPLE] or [
        weights[0]
    ]
    ways: list[list[Callable[[Tensor], Tensor]]] = [
        [Packed(weight) for weight in sample],
        [partial(_times, weight.t()) for weight in sample],
    ]
    inputs = {weight.shape[1]: weight.new_ones(_WIDTHS[-1], weight.shape[1]) for weight in sample}
    took = {(width, way): math.inf for width in _WIDTHS for way in range(2)}
    for _, (width, way) in itertools.product(range(_TURNS), took):  # in turns: a slow moment hits both alike
        started = time.perf_counter()
        for multiply, weight in zip(ways[way], sample, strict=True):
            multiply(inputs[weight.shape[1]][:width])
        took[width, way] = min(took[width, way], time.perf_counter() - started)
    chosen: set[int] = set()
    for narrower, width in itertools.pairwise((0, *_WIDTHS)):
        if took[width, 0] < _CLEARLY * took[width, 1]:
            chosen |= set(range(narrower + 1, width + 1))
    return frozenset(chosen)
