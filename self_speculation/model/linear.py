"""x W^T + b over the weights of modules.

On a GPU, projections of the same input become one weight. On a CPU nothing is made of them: passes over few
tokens multiply by our operator (kernels.py), which reads each weight as it lies, all others by torch, from
weights that are converted for the pass.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import cache
from threading import RLock
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear as torch_linear

from self_speculation.model.few_bits import FewBitsLinear, eight_bits
from self_speculation.model.fingerprint import version_of
from self_speculation.model.kernels import cpu_operators

T = TypeVar("T")

# The most tokens that an operator reads of a prompt at a time. Torch's products are faster for more.
MAX_NARROW_TOKENS = 32
# Passes over prompts, of at least so many tokens, may multiply in bfloat16.
MIN_BFLOAT16_PREFILL = 128
# The most rows of logits by an operator. Only log-likelihoods of whole texts have more.
_MOST_ROWS = 1024

# A tensor that a pass reads: where it stands, so that one that takes its place is read next time.
Slot = tuple[Mapping[str, Any], str]


class Linear:
    """x [T, in] -> x W^T + b [T, out].

    Args:
        projections: of the same input. On a GPU their weights become one tensor, see `_side_by_side`.
    """

    def __init__(self, *projections: Any) -> None:
        self.projections = projections
        self.is_in_few_bits = isinstance(projections[0], FewBitsLinear)
        self._tables = [_table(projection) for projection in projections]
        self.has_biases = [table["bias"] is not None for table in self._tables]
        self._joint: tuple[Tensor, Tensor | None] | None = None
        on_cpu = self._tables[0]["weight"].device.type == "cpu"
        self.is_in_place = self.is_in_few_bits or (on_cpu and all(w.stride(1) == 1 for w in self.weights))
        if not on_cpu:
            biases = None
            if any(self.has_biases):
                biases = _side_by_side(
                    [weight.new_zeros(len(weight)) if b is None else b for weight, b in self.pairs]
                )
            self._joint = _side_by_side(self.weights).t(), biases
        self.copies: dict[Hashable, Any] = {}  # what was made of the weight
        self._version_when_made: Hashable = None
        self._lock = RLock()  # passes of several threads may miss the same copy

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor | None]]:
        """Weight and bias of each projection."""
        return list(zip(self.weights, (table["bias"] for table in self._tables), strict=True))

    @property
    def weights(self) -> list[Tensor]:
        """[out, in] of each projection. Those in few bits are dequantised."""
        if self.is_in_few_bits:
            return [projection.dequantized() for projection in self.projections]
        return [table["weight"] for table in self._tables]

    def slots(self) -> list[Slot]:
        """Weight and bias, if there is one, of each projection, for operators."""
        return [slot for i in range(len(self._tables)) for slot in self.slots_of(i)]

    def slots_of(self, index: int) -> list[Slot]:
        """Those of one projection."""
        return [(self._tables[index], name) for name in ("weight", "bias")[: 1 + self.has_biases[index]]]

    def __call__(self, x: Tensor) -> Tensor:
        if self._joint is not None:
            product, bias = torch.mm(x, self._joint[0]), self._joint[1]
            return product if bias is None else product.add_(bias)
        if self.is_in_few_bits or (self.is_in_place and is_multiplied_in_place(x, MAX_NARROW_TOKENS)):
            parts = [project(x, self.slots_of(i), rows) for i, rows in enumerate(self._num_rows)]
            return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        product = x.new_empty(len(x), self.shape[0])
        parts = product.split(self._num_rows, 1)
        for part, (weight, bias) in zip(parts, self.pairs, strict=True):
            torch.mm(x, weight.to(x.dtype).t(), out=part)
            if bias is not None:
                part.add_(bias)
        return product

    def logits(self, hidden: Tensor, norm: Any) -> Tensor:
        """Of a single projection, over normed states."""
        if self.is_in_few_bits or (self.is_in_place and is_multiplied_in_place(hidden, _MOST_ROWS)):
            return project(hidden, self.slots(), self.shape[0], norm)
        return self(norm(hidden))

    matmul_native = __call__  # copies that compute in bfloat16 return it here

    def add_to(self, hidden: Tensor, x: Tensor) -> Tensor:
        """hidden += x W^T + b"""
        if self._joint is None:
            return hidden.add_(self(x))
        hidden = hidden.addmm_(x, self._joint[0])
        return hidden if self._joint[1] is None else hidden.add_(self._joint[1])

    @property
    def weight(self) -> Tensor:
        """[out, in] of all projections; on a CPU a copy, if there are several."""
        if self._joint is not None:
            return self._joint[0].t()
        return self.weights[0].data if len(self._tables) == 1 else torch.cat([w.data for w in self.weights])

    @property
    def bias(self) -> Tensor | None:
        """[out] of all projections, as `weight`."""
        if self._joint is not None:
            return self._joint[1]
        if not any(self.has_biases):
            return None
        biases = zip(self._num_rows, self._tables, strict=True)
        return torch.cat([torch.zeros(n) if t["bias"] is None else t["bias"].data for n, t in biases])

    @property
    def shape(self) -> torch.Size:
        """[out, in]"""
        return torch.Size((sum(self._num_rows), _shape(self.projections[0])[1]))

    @property
    def _num_rows(self) -> list[int]:
        return [_shape(projection)[0] for projection in self.projections]

    @property
    def num_bytes(self) -> int:
        """Of the weight, without copies."""
        return sum(table["weight"].nbytes for table in self._tables)

    def rows(self, ids: Tensor) -> Tensor:
        """[n, in] some rows of the weight of a single projection."""
        if self.is_in_few_bits:
            return self.projections[0].rows(ids.flatten()).view(*ids.shape, self.shape[1])
        (weight,) = self.weights
        return weight.data[ids.to(weight.device)]

    def select_rows(self, ids: Tensor) -> Linear:
        """A `Linear` over a copy of some rows [n] of the weight, in eight bits if that is in few."""
        bias = None if self.bias is None else self.bias[ids]
        if self.is_in_few_bits:
            return Linear(FewBitsLinear(eight_bits(self.rows(ids)), len(ids), self.shape[1], bias))
        return Linear(SimpleNamespace(weight=self.rows(ids), bias=bias))

    @property
    def version(self) -> Hashable:
        """Changes when a weight or bias is replaced, moved or written to, but not through `.data`."""
        return tuple((tensor.data_ptr(), version_of(tensor)) for tensor in tensors_in(self.slots()))

    def cached_copy(self, key: Hashable, make: Callable[[], T]) -> T:
        """The result of `make`, kept by key until `follow_weights` finds another `version`. Unlike in `made`,
        nothing is compared: every product gets its copy here.
        """
        if (kept := self.copies.get(key)) is not None:
            return kept
        with self._lock:
            if (kept := self.copies.get(key)) is None:
                if not self.copies:  # the first copy fixes the version for all later ones
                    self._version_when_made = self.version
                kept = self.copies[key] = make()
        return kept

    def follow_weights(self) -> None:
        """Drop what was made of weights that have changed."""
        if self.copies and self.version != self._version_when_made:
            with self._lock:
                self.copies.clear()


def _table(projection: Any) -> Mapping[str, Any]:
    """Where weight and bias stand."""
    if isinstance(projection, SimpleNamespace):
        return vars(projection)
    return projection._buffers if isinstance(projection, FewBitsLinear) else projection._parameters


def _shape(projection: Any) -> torch.Size:
    return projection.shape if isinstance(projection, FewBitsLinear) else projection.weight.shape


def is_multiplied_in_place(x: Tensor, most: int) -> bool:
    """Whether an operator multiplies up to `most` tokens [T, in] by weights where they lie."""
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32 and len(x) <= most
    return on_cpu and cpu_operators().variant is not None


def project(x: Tensor, slots: Sequence[Slot], rows: int, norm: Any = None) -> Tensor:
    """norm(x) W^T + b by our operator, for one projection with so many rows."""
    of_norm = ([], 0.0, False) if norm is None else ([norm.weight], norm.epsilon, norm.is_centred)
    weight, has_bias = tensors_in(slots), slots[-1][1] == "bias"
    return torch.ops.self_speculation.project(x.contiguous(), *of_norm, weight, has_bias, rows)


def tensors_in(slots: Iterable[Slot]) -> list[Tensor]:
    return [table[name] for table, name in slots]


class BFloat16Linear:
    """x W^T + b with x, W and the product in bfloat16 and sums in float32."""

    def __init__(self, linear: Linear) -> None:
        self.pairs = linear.pairs

    def __call__(self, x: Tensor) -> Tensor:
        return self.matmul_native(x).float()

    def matmul_native(self, x: Tensor) -> Tensor:
        """In bfloat16."""
        x = x.bfloat16()
        parts = [torch_linear(x, w.bfloat16(), None if b is None else b.bfloat16()) for w, b in self.pairs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def replace_linears(part: T, make: Callable[[Linear], Any]) -> T:
    """A copy of a fused layer or a head with each `Linear` replaced by `make(linear)`."""
    other: Any = copy.copy(part)
    other.linears = tuple(make(linear) for linear in other.linears)
    return other


@cache
@torch.no_grad()
def has_kernel(
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
