"""x W^T + b over the weights of modules, by torch's matmul or, on a CPU, by a kernel over a packed copy of W.

A `Linear` keeps what is made of its weight (packed copies, copies in four bits, some rows) until it changes.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import RLock
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor

from self_speculation.model.fingerprint import contents
from self_speculation.model.mapped import release
from self_speculation.model.progress import progress

T = TypeVar("T")

# Passes over more tokens are those of prompts and use ordinary kernels.
NARROW = 16
# Passes over prompts, of at least so many tokens, may multiply in bfloat16. With fewer, conversion of the
# weights takes longer than float32 products (measured: docs/performance.md).
LONG = 128
# By dtype of the weight, the numbers of tokens for which oneDNN is fastest on a CPU, over a packed copy
# (measured: docs/performance.md).
_PACKED = {torch.float32: range(5, NARROW + 1), torch.bfloat16: range(1, NARROW + 1)}
# MKL multiplies one token on a single thread, but blocks of rows on all threads.
_BLOCKS = 16
# Elements that become bfloat16 at a time, by way of float32 in the processor's cache: twice as fast as by
# torch's own conversion of float16.
_CONVERTED = 2**18
# The most elements that a thread packs in float16 at a time, from a copy in float32.
_PIECE = 2**24


class Linear:
    """x [T, in] -> x W^T + b [T, out].

    Args:
        projections: of the same input. Their weights become one tensor, see `_side_by_side`.
        fp32_activations: W16A32. Products read a packed copy; weights stay where they are, such as in a file
            that they are mapped from.
    """

    def __init__(self, *projections: Any, fp32_activations: bool = False) -> None:
        self._weights = [projection.weight for projection in projections]
        biases = [projection.bias for projection in projections if projection.bias is not None]
        or_zeros = [p.weight.new_zeros(len(p.weight)) if p.bias is None else p.bias for p in projections]
        self.bias = _side_by_side(or_zeros) if biases else None
        self._parameters = [*self._weights, *biases]
        self.fp32_activations = fp32_activations
        joint = None if fp32_activations else _side_by_side(self._weights)
        self._weight_t: Any = None if joint is None else joint.t()
        self._left: Any = None if joint is None else _blocks(joint)
        self.may_be_packed = False  # whether memory has room for a packed copy
        self.copies: dict[Hashable, Any] = {}  # what was made of the weight
        self._contents_when_made: Hashable = None
        self._lock = RLock()  # passes of several threads may miss the same copy

    def __call__(self, x: Tensor) -> Tensor:
        kernel = self._kernel(x.shape[0])
        product = torch.mm(x, self._weight_t) if kernel is None else kernel(x).contiguous()
        return product if self.bias is None else product.add_(self.bias)

    matmul_bf16 = __call__  # copies that compute in bfloat16 return it here

    def add_to(self, hidden: Tensor, x: Tensor) -> Tensor:
        """hidden += x W^T + b, in one kernel."""
        kernel = self._kernel(x.shape[0])
        hidden = hidden.addmm_(x, self._weight_t) if kernel is None else hidden.add_(kernel(x))
        return hidden if self.bias is None else hidden.add_(self.bias)

    def _kernel(self, width: int) -> Callable[[Tensor], Tensor] | None:
        """The fastest for so many tokens, [T, in] -> x W^T [T, out] of any strides; None: `torch.mm`."""
        if self.fp32_activations or self.is_packed(width):
            return self._copy()
        return None if self._left is None or width > NARROW else self._by_blocks

    def _by_blocks(self, x: Tensor) -> Tensor:
        columns = x.t().expand(self._left.shape[0], -1, -1)  # [blocks, in, T]
        return torch.bmm(self._left, columns).flatten(0, 1).t()

    @property
    def weight(self) -> Tensor:
        """[out, in] of all projections; a copy with `fp32_activations`."""
        if self.fp32_activations:
            return torch.cat([weight.data for weight in self._weights])
        return self._weight_t.t()

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight."""
        return self._weights[0].dtype

    @property
    def shape(self) -> torch.Size:
        """[out, in]"""
        return torch.Size((sum(map(len, self._weights)), self._weights[0].shape[1]))

    @property
    def num_bytes(self) -> int:
        """Of the weight, without copies."""
        return sum(weight.nbytes for weight in self._weights)

    def tensors(self) -> list[Tensor]:
        """All tensors that a pass reads."""
        return [part for part in (self._weight_t, self._left, self.bias) if part is not None]

    def rows(self, ids: Tensor) -> Tensor:
        """[n, in] some rows of the weight of a single projection."""
        (weight,) = self._weights
        return weight.data[ids.to(weight.device)]

    def select_rows(self, ids: Tensor) -> Linear:
        """A `Linear` over a copy of some rows [n] of the weight."""
        bias = None if self.bias is None else self.bias[ids]
        projection = SimpleNamespace(weight=self.rows(ids), bias=bias)
        rows = Linear(projection, fp32_activations=self.fp32_activations)
        rows.may_be_packed = self.may_be_packed
        return rows

    def cached_copy(self, key: Hashable, make: Callable[[], T]) -> T:
        """The result of `make`, kept by key until `follow_weights` finds other weights. Unlike in `made`,
        nothing is compared: every product gets its copy here.
        """
        if (kept := self.copies.get(key)) is not None:
            return kept
        with self._lock:
            if (kept := self.copies.get(key)) is None:
                if not self.copies:  # the first copy fixes the contents for all later ones
                    [self._contents_when_made] = contents([self._parameters])
                kept = self.copies[key] = make()
                for weight in self._weights:
                    release(weight)
        return kept

    @property
    def can_be_packed(self) -> bool:
        """Whether oneDNN has kernels for this weight here."""
        kernels = {torch.float32: torch.backends.mkldnn.is_available}
        kernels[torch.bfloat16] = torch.ops.mkldnn._is_mkldnn_bf16_supported
        is_on_cpu = not self.fp32_activations and self._weights[0].device.type == "cpu"
        return is_on_cpu and self.dtype in kernels and kernels[self.dtype]()

    def is_packed(self, width: int) -> bool:
        """Whether passes over so many tokens read a copy packed for oneDNN."""
        return self.may_be_packed and width in _PACKED[self.dtype]

    def _copy(self) -> Callable[[Tensor], Tensor]:
        if self.fp32_activations:
            return self.cached_copy(
                Float16Linear, lambda: Float16Linear(*map(_within_float16, self._weights))
            )
        return self.cached_copy(PackedLinear, lambda: PackedLinear(self.weight))

    @property
    def packed_copy(self) -> Float16Linear | PackedLinear | None:
        """The copy that passes of the target read, if it was made."""
        return self.copies.get(Float16Linear if self.fp32_activations else PackedLinear)


class PackedLinear:
    """x W^T over a copy of W packed for oneDNN, best for so many tokens."""

    def __init__(self, weight: Tensor, num_tokens: int = NARROW) -> None:
        self.num_bytes = weight.nbytes
        self._copy = torch.ops.mkldnn._reorder_linear_weight(weight, num_tokens)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._copy, None, "none", [], "")


class Float16Linear:
    """x W^T + b with x in float32, over a copy of W in float16 packed for FBGEMM.

    The copy holds bfloat16 weights exactly from 6e-5 to 65504, and smaller ones to within 3e-8.

    Args:
        weights: [n, in] each; their rows are concatenated. They are packed in pieces, each from a copy in
            float32: a head of 150,000 rows needs no copy of all of it.
    """

    bytes_per_weight = 2.0

    def __init__(self, *weights: Tensor, bias: Tensor | None = None) -> None:
        joint = weights[0] if len(weights) == 1 else torch.cat(weights)
        self.num_bytes = self.copy_bytes(joint.shape)
        rows = math.ceil(len(joint) / math.ceil(joint.numel() / _PIECE))
        pieces = joint.detach().split(rows)
        biases = [None] * len(pieces) if bias is None else bias.split(rows)
        pack = torch.ops.quantized.linear_prepack_fp16
        self.packed = [pack(piece.float(), part) for piece, part in zip(pieces, biases, strict=True)]

    def __call__(self, x: Tensor) -> Tensor:
        pieces = [torch.ops.quantized.linear_dynamic_fp16(x, piece) for piece in self.packed]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)

    @staticmethod
    def copy_bytes(shape: torch.Size) -> int:
        """Size of the copy of a weight [out, in]."""
        return 2 * shape.numel()


class BFloat16Linear:
    """x W^T + b with x, W and the product in bfloat16 and sums in float32, over a copy of W."""

    def __init__(self, linear: Linear) -> None:
        joint = torch.empty(linear.shape, dtype=torch.bfloat16)
        rows = math.ceil(_CONVERTED / joint.shape[1])
        parts = joint.split([len(weight) for weight in linear._weights])
        for part, weight in zip(parts, linear._weights, strict=True):
            for copied, piece in zip(part.split(rows), weight.detach().split(rows), strict=True):
                copied.copy_(piece.float() if weight.dtype == torch.float16 else piece)
            release(weight)
        self._packed, self._bias = PackedLinear(joint, LONG), linear.bias

    def __call__(self, x: Tensor) -> Tensor:
        return self.matmul_bf16(x).float()

    def matmul_bf16(self, x: Tensor) -> Tensor:
        """In bfloat16, or with a bias in float32."""
        product = self._packed(x.bfloat16())
        return product if self._bias is None else product.float().add_(self._bias)


def replace_linears(part: T, make: Callable[[Linear], Any]) -> T:
    """A copy of a fused layer or a head with each `Linear` replaced by `make(linear)`."""
    other: Any = copy.copy(part)
    other.linears = tuple(make(linear) for linear in other.linears)
    return other


@cache
@torch.no_grad()
def works(
    kind: Callable[[Tensor], Callable[[Tensor], Tensor]], device: torch.device, dtype: torch.dtype
) -> bool:
    """Whether there is a kernel for copies of this kind, of weights of this dtype on this device.

    Raises:
        torch.OutOfMemoryError: the next call tries again.
    """
    weight = torch.zeros(16, 32, device=device, dtype=dtype)
    try:
        kind(weight)(weight[:1])
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, RuntimeError):
        return False
    return True


def follow_weights(linears: Sequence[Linear]) -> None:
    """Drop what was made of weights that have changed; make the copies that every pass reads, on all threads.

    Raises:
        ValueError: float16 cannot hold a weight that has changed.
    """
    copied = [linear for linear in linears if linear.copies]
    current = contents([linear._parameters for linear in copied])
    pairs = zip(copied, current, strict=True)
    changed = [linear for linear, contents_now in pairs if linear._contents_when_made != contents_now]
    for linear in changed:
        with linear._lock:
            linear.copies.clear()
    missing = [linear for linear in linears if linear.fp32_activations and linear.packed_copy is None]
    missing.sort(key=lambda linear: -linear.num_bytes)  # no thread ends with a large one
    with (
        ThreadPoolExecutor(torch.get_num_threads()) as threads,
        progress("packing weights", sum(linear.num_bytes for linear in missing)) as advance,
    ):
        for linear, _ in zip(missing, threads.map(Linear._copy, missing), strict=True):
            advance(linear.num_bytes)


def warn_of_fp32_precision() -> None:
    """Warn if this process lets oneDNN round the inputs of float32 products, which it does with AMX."""
    backends: Any = torch.backends.mkldnn
    precision = backends.matmul.fp32_precision
    if precision not in ("none", "ieee") and _rounds_inputs():
        why = "torch.set_float32_matmul_precision or an fp32_precision of torch.backends"
        warnings.warn(
            f"float32 products round their inputs ({precision}, by {why}): texts change", stacklevel=3
        )


def _rounds_inputs() -> bool:
    """Whether products of float32 matrices on the CPU are less exact than float32."""
    fine = torch.full((64, 64), 1 + 2.0**-20)
    return not torch.equal(torch.mm(fine, torch.eye(64)), fine)


def _within_float16(weight: Tensor) -> Tensor:
    """Returns the weight. Raises ValueError if float16 cannot hold one of its numbers."""
    least, largest = weight.detach().aminmax()
    if not bool(torch.maximum(-least, largest) <= torch.finfo(torch.float16).max):
        raise ValueError("weights beyond 65504, or NaN, cannot be held in 16 bits: they need --dtype float32")
    return weight


def _side_by_side(parameters: Sequence[Tensor]) -> Tensor:
    """Concatenate parameters into one tensor, and point them at their parts of its memory.

    Each part is a storage of its own, not a view: code that saves or shards a model skips parameters that
    share a storage.
    """
    if len(parameters) == 1:
        return parameters[0].data
    joint = torch.cat([parameter.data for parameter in parameters])
    with torch.cuda.device_of(joint):  # the only GPU that `from_dlpack` takes tensors of
        for parameter, part in zip(parameters, joint.split([len(p) for p in parameters]), strict=True):
            parameter.data = torch.from_dlpack(part)
    return joint


def _blocks(weight: Tensor) -> Tensor | None:
    """[out, in] -> a view of blocks of its rows [blocks, out / blocks, in], in float32 on a CPU; else None.

    As left operand for a few tokens it is up to three times as fast as `mm(x, W^T)`.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return None
    return weight.unflatten(0, (math.gcd(len(weight), _BLOCKS), -1))
