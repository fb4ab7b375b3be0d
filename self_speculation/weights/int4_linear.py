"""x W^T over a copy of W in four bits, for drafts.

32 elements of a row share a scale and a zero point. An element is one of 16 quants, and takes five bits,
scale and zero point included. Both minimise the error of x W^T, for inputs as large as the
model's. Other groups and roundings are in docs/tried.md.

On a CPU a copy is a `FewBitsLinear`, which our operator multiplies by. torch's kernel, on a GPU, takes and
returns bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from self_speculation.machine.devices import round_up
from self_speculation.weights.few_bits import FewBitsLinear
from self_speculation.weights.kernels import cpu_operators

# Elements of a weight that are quantised at a time, about. Each piece is about 200 kernels on a GPU and takes
# 50 bytes per element.
_AT_A_TIME = 2**24

# Elements of a row that share a scale and a zero point.
_GROUP = 32

# Scales that are tried, as shares of the range of a group. The best one is fitted by least squares.
_SHARES_OF_RANGE = (1.0, 0.9, 0.8)

# Kernels take rows by so many; other weights are padded.
_BLOCK_OF_ROWS = 16

BYTES_PER_WEIGHT = 0.5 + 4 / _GROUP


def int4_copy(linear: Any, squares: Tensor | None = None) -> FewBitsLinear | Int4Linear:
    """A copy in four bits of a module with a weight [out, in] and a bias.

    Args:
        squares: [in] mean squares of inputs, up to a factor; None: all alike.
    """
    weight = linear.dequantized() if isinstance(linear, FewBitsLinear) else linear.weight.detach()
    bias = None if linear.bias is None else linear.bias.detach()
    squares = torch.ones(weight.shape[1], device=weight.device) if squares is None else squares
    if weight.device.type != "cpu":
        return Int4Linear(weight, bias, squares)
    bias = None if bias is None else bias.float()
    return FewBitsLinear(four_bits(weight, squares), linear.out_features, linear.in_features, bias)


def copy_bytes(linear: Any) -> int:
    """Size of the copy of a weight [out, in], about."""
    elements = round_up(linear.out_features, _BLOCK_OF_ROWS) * round_up(linear.in_features, _GROUP)
    return int(elements * BYTES_PER_WEIGHT)


def has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there is a kernel for copies of weights of this dtype on this device."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False
    if device.type == "cpu":
        return cpu_operators().variant is not None
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


class Int4Linear(nn.Module):
    """[..., in] -> [..., out] by a kernel of torch, which computes in bfloat16."""

    def __init__(self, weight: Tensor, bias: Tensor | None, squares: Tensor) -> None:
        super().__init__()
        importance = _importance(squares)
        self.out_features, self.in_features = weight.shape
        self.num_bytes = copy_bytes(self)
        self._padding = -weight.shape[1] % _GROUP
        self.bias = None if bias is None else bias.bfloat16()
        packed = []
        scales = []
        # Kernels keep rows in blocks of at most 64: multiples of 64 are packed apart.
        for rows in weight.split(max(1, _AT_A_TIME // weight.shape[1] // 64) * 64):
            padded = pad(rows, (0, self._padding, 0, -len(rows) % _BLOCK_OF_ROWS))
            quants, scale = in_four_bits(padded, importance)
            packed.append(_packed(quants))
            scales.append(scale)
        # Quants as kernels take them; scales and zero points [groups of a row, out, 2].
        self._quants = torch.cat(packed)
        self._scales = torch.cat(scales, 1)

    def forward(self, x: Tensor) -> Tensor:
        inputs = x.flatten(0, -2).bfloat16()
        inputs = pad(inputs, (0, self._padding)) if self._padding else inputs
        outputs = torch.ops.aten._weight_int4pack_mm(inputs, self._quants, _GROUP, self._scales)
        if outputs.shape[1] != self.out_features:
            outputs = outputs[:, : self.out_features].contiguous()
        outputs = outputs if self.bias is None else outputs.add_(self.bias)
        return outputs.view(*x.shape[:-1], -1).to(x.dtype)


def four_bits(weight: Tensor, squares: Tensor) -> Tensor:
    """A weight [out, in] in the format of `FewBitsLinear`, for inputs with mean squares `squares` [in]."""
    importance = _importance(squares).flatten()
    return torch.ops.self_speculation.int4_round(weight.detach().contiguous(), importance)


def in_four_bits(rows: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """[n, in] and `_importance` of inputs -> quants [n, in] of int32 from 0 to 15, and for each group
    [groups of a row, n, 2] scale and zero point, the value of quant 8. `int4_round` does this on a CPU.
    """
    groups = rows.float().unflatten(1, (-1, _GROUP))  # [n, groups of a row, elements]
    least, largest = groups.aminmax(dim=2, keepdim=True)
    mean = (groups * importance).sum(2, keepdim=True)
    fits = []
    for share in _SHARES_OF_RANGE:
        scale = ((largest - least) * share / 15).clamp(min=1e-12)
        quants = _quants(groups, scale, (least + largest + scale) / 2)
        weighted = quants * importance
        mean_quant = weighted.sum(2, keepdim=True)
        variance = ((weighted * quants).sum(2, keepdim=True) - mean_quant.square()).clamp(min=1e-12)
        covariance = (weighted * groups).sum(2, keepdim=True) - mean_quant * mean
        # Least squares for the quants lower the weighted error by covariance^2 / variance.
        fits.append((covariance.square() / variance, covariance / variance, mean_quant))
    gains, scales, mean_quants = map(torch.stack, zip(*fits, strict=True))
    best = gains.argmax(0, keepdim=True)
    scales = scales.gather(0, best)[0]
    mean_quants = mean_quants.gather(0, best)[0]
    parameters = torch.cat((scales.clamp(min=1e-12), mean - scales * mean_quants), 2).to(torch.bfloat16)
    quants = _quants(groups, *parameters.float().split(1, 2)) + 8
    return quants.to(torch.int32).flatten(1), parameters.transpose(0, 1).contiguous()


def _quants(groups: Tensor, scales: Tensor, zero_points: Tensor) -> Tensor:
    return ((groups - zero_points) * (1 / scales)).round_().clamp_(-8, 7)


def _importance(squares: Tensor) -> Tensor:
    """Squares of inputs [in] -> their shares of each group's sum [groups of a row, elements]."""
    importance = pad(squares, (0, -len(squares) % _GROUP)).float().unflatten(0, (-1, _GROUP))
    importance = importance + 1e-3 * importance.mean(1, keepdim=True) + 1e-30  # one alone fits by any scale
    return importance / importance.sum(1, keepdim=True)


def _packed(quants: Tensor) -> Tensor:
    """[n, in] -> [n / 8, in / (16 t), 32, t / 2] of int32, t the largest of 2, 4, 8 that fits."""
    tiles = next(t for t in (8, 4, 2) if quants.shape[1] % (16 * t) == 0)
    pairs = (quants[:, ::2] << 4 | quants[:, 1::2]).to(torch.uint8)
    return torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), tiles)
