"""Products over copies of weights in fewer bits, by kernels that torch has; the formats themselves.

- float16: the head of a float32 model on a CPU, beside layers in four bits. Activations stay as they are.
- int8: a row of a weight is stored in 127 steps of its largest element, a byte each; activations in bfloat16.
- int4: 32 elements of a row share a scale and an offset and are stored in 16 steps, five bits each with
  those; activations in bfloat16. Scale and offset are those by which the product is off least for inputs as
  large as the model's own are.

What other groups and roundings give is in docs/performance.md.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from self_speculation.model.kv_cache import round_up
from self_speculation.model.linear import Float16Linear, Linear

# Elements of a weight that are quantised at a time, about. Each piece is some 200 kernels on a GPU and takes
# 50 bytes per element; on a CPU it stays in the processor's cache.
_AT_A_TIME, _AT_A_TIME_ON_CPU = 2**24, 2**18

# Elements of a row that share a scale and an offset.
_GROUP = 32

# Scales that are tried reach over so much of the range of a group.
_SHARES_OF_RANGE = (1.0, 0.9, 0.8)

# Kernels for four bits take rows by so many: a weight that has others is padded.
_BLOCK_OF_ROWS = 16

# That for eight bits reads rows by so many elements, also where a row ends before.
_BLOCK_OF_COLUMNS = 16


class LowBitLinear(ABC):
    """As `Linear`, over a copy of its weight in fewer bits."""

    bytes_per_weight: float
    num_bytes: int  # that the copy takes
    dtype = torch.bfloat16  # of what is multiplied, and of the product
    weighs_inputs = False

    def __init__(self, product: Linear, squares: Tensor | None = None) -> None:  # noqa: ARG002
        """
        Args:
            squares: [in] how large the squares of inputs are, where `weighs_inputs`; None: all alike.
        """
        self._bias = None if product.bias is None else product.bias.to(self.dtype)
        self.num_bytes = self.bytes_of(product.shape)

    @property
    def copy_read(self) -> Any:
        """As that of `Linear`."""
        return self

    def __call__(self, x: Tensor) -> Tensor:
        return self.unconverted(x).to(x.dtype)

    def unconverted(self, x: Tensor) -> Tensor:
        """The product in a format of its own, whatever x is."""
        product = self._multiply(x.to(self.dtype))
        return product if self._bias is None else product.add_(self._bias)

    def add_to(self, hidden: Tensor, x: Tensor) -> Tensor:
        """As that of `Linear`."""
        return hidden.add_(self.unconverted(x))

    def tensors(self) -> list[Tensor]:
        """As those of `Linear`."""
        return [part for part in vars(self).values() if isinstance(part, Tensor)]

    @abstractmethod
    def _multiply(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out] in `dtype`, without a bias."""

    @staticmethod
    @abstractmethod
    def bytes_of(shape: torch.Size) -> int:
        """That a copy of a weight [out, in] takes, made or not."""


class Float16Head(LowBitLinear):
    """Each element of a float32 weight rounded, by a kernel of FBGEMM's."""

    bytes_per_weight = 2.0
    dtype = torch.float32

    def __init__(self, product: Linear, squares: Tensor | None = None) -> None:
        super().__init__(product, squares)
        self._copy = Float16Linear(product.weight)

    def _multiply(self, x: Tensor) -> Tensor:
        return self._copy(x)

    @staticmethod
    def bytes_of(shape: torch.Size) -> int:
        return 2 * shape.numel()


class Int8Linear(LowBitLinear):
    """Each row in 127 steps of its largest element."""

    bytes_per_weight = 1.0

    def __init__(self, product: Linear, squares: Tensor | None = None) -> None:
        super().__init__(product, squares)
        columns = product.shape[1]
        self._padding = round_up(columns, _BLOCK_OF_COLUMNS) - columns
        rows = [_in_eight_bits(pad(rows, (0, self._padding))) for rows in _some_rows(product.weight)]
        weights, scales = zip(*rows, strict=True)
        self._weight, self._scales = torch.cat(weights), torch.cat(scales)  # [out, in], [out]

    def _multiply(self, x: Tensor) -> Tensor:
        columns = pad(x, (0, self._padding)) if self._padding else x
        return torch._weight_int8pack_mm(columns, self._weight, self._scales)

    @staticmethod
    def bytes_of(shape: torch.Size) -> int:
        return shape[0] * (round_up(shape[1], _BLOCK_OF_COLUMNS) + 2)  # and the scales


class Int4Linear(LowBitLinear):
    """Each group of a row in 16 steps."""

    bytes_per_weight = 0.5 + 4 / _GROUP
    weighs_inputs = True

    def __init__(self, product: Linear, squares: Tensor | None = None) -> None:
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
    def bytes_of(shape: torch.Size) -> int:
        rows, columns = round_up(shape[0], _BLOCK_OF_ROWS), round_up(shape[1], _GROUP)
        return rows * columns // 2 + rows * columns // _GROUP * 4  # and scales and middles


@cache
@torch.no_grad()
def works(kind: type[LowBitLinear], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is a kernel for models of this format there.

    Raises:
        torch.OutOfMemoryError: there was no room to try; it is tried again when it is asked again.
    """
    tiny = nn.Linear(_GROUP, _BLOCK_OF_ROWS, bias=False, device="meta")  # which draws no random numbers
    tiny.weight = nn.Parameter(torch.zeros(tiny.weight.shape, device=device, dtype=dtype))
    try:
        kind(Linear(tiny))(torch.zeros(1, _GROUP, device=device, dtype=dtype))
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, RuntimeError):
        return False
    return True


def _some_rows(weight: Tensor) -> Sequence[Tensor]:
    """A weight part by part. Kernels for four bits keep rows in blocks of 64 at most: a multiple of it can be
    packed on its own.
    """
    at_a_time = _AT_A_TIME_ON_CPU if weight.device.type == "cpu" else _AT_A_TIME
    return weight.split(max(1, at_a_time // weight.shape[1] // 64) * 64)


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
