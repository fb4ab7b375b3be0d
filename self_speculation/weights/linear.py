"""x W^T + b and norms over the weights of modules.

On a GPU, projections of the same input become one weight. On a CPU nothing is made of them: our operator
(kernels.py) reads each weight as it lies. Without operators torch multiplies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from self_speculation.weights.few_bits import FewBitsLinear
from self_speculation.weights.kernels import cpu_operators

# Norms that multiply by 1 + weight, in float32.
_CENTRED_NORMS = ("Gemma3RMSNorm",)

# x [T, in] -> x W^T + b [T, out], over some format of W, in the dtype that the product has.
Product = Callable[[Tensor], Tensor]


class Linear:
    """x [T, in] -> x W^T + b [T, out], in the dtype of x.

    Args:
        projections: `nn.Linear` or `FewBitsLinear` of the same input. On a GPU their weights become one
            tensor, see `_side_by_side`.
    """

    def __init__(self, *projections: Any) -> None:
        self.projections = projections
        self.is_in_few_bits = any(isinstance(projection, FewBitsLinear) for projection in projections)
        self._num_rows = [projection.out_features for projection in projections]
        self.shape = torch.Size((sum(self._num_rows), projections[0].in_features))
        self.has_biases = [projection.bias is not None for projection in projections]
        tensors = [(projection.weight, projection.bias) for projection in projections]
        self._tensors: list[list[Tensor]] = [[each for each in pair if each is not None] for pair in tensors]
        self._joint: tuple[Tensor, Tensor | None] | None = None
        weights = [projection.weight for projection in projections]
        on_cpu = weights[0].device.type == "cpu"
        self.is_in_place = on_cpu and all(weight.stride(-1) == 1 for weight in weights)
        if not on_cpu:
            bias = _side_by_side(self._biases()) if any(self.has_biases) else None
            self._joint = _side_by_side([weight for weight, _ in self.pairs]).t(), bias
        self.copy: Any = None  # in four bits, see quantized_layers.py

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor | None]]:
        """Weight [out, in] and bias of each projection. Weights in few bits are dequantised."""
        return [
            (each.dequantized() if isinstance(each, FewBitsLinear) else each.weight, each.bias)
            for each in self.projections
        ]

    @property
    def tensors(self) -> list[Tensor]:
        """Weight and bias, if there is one, of each projection, for operators."""
        return [tensor for of_one in self._tensors for tensor in of_one]

    def __call__(self, x: Tensor) -> Tensor:
        if self._joint is not None:
            product, bias = torch.mm(x, self._joint[0]), self._joint[1]
            return product if bias is None else product.add_(bias)
        if self._is_by_operator(x):
            parts = [project(x, *pair) for pair in zip(self._tensors, self._num_rows, strict=True)]
            return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).to(x.dtype)
        product = x.new_empty(len(x), self.shape[0])
        parts = product.split(self._num_rows, 1)
        for part, (weight, bias) in zip(parts, self.pairs, strict=True):
            torch.mm(x, weight.to(x.dtype).t(), out=part)
            if bias is not None:
                part.add_(bias)
        return product

    def logits(self, hidden: Tensor, norm: RMSNorm) -> Tensor:
        """Of a single projection, over normed states."""
        if hidden.dtype == torch.float32 and self._is_by_operator(hidden):
            return project(hidden, self.tensors, self.shape[0], norm)
        return self(norm(hidden))

    def _is_by_operator(self, x: Tensor) -> bool:
        is_read = self.is_in_place and x.dtype == torch.float32
        return self.is_in_few_bits or (is_read and cpu_operators().variant is not None)

    def add_to(self, hidden: Tensor, x: Tensor) -> Tensor:
        """hidden += x W^T + b"""
        if self._joint is None:
            return hidden.add_(self(x))
        hidden = hidden.addmm_(x, self._joint[0])
        return hidden if self._joint[1] is None else hidden.add_(self._joint[1])

    @property
    def bias(self) -> Tensor | None:
        """[out] of all projections; on a CPU a copy."""
        if self._joint is not None:
            return self._joint[1]
        return torch.cat([bias.data for bias in self._biases()]) if any(self.has_biases) else None

    def _biases(self) -> list[Tensor]:
        """Of each projection; zeros if it has none."""
        return [
            each.weight.new_zeros(each.out_features) if each.bias is None else each.bias
            for each in self.projections
        ]

    @property
    def num_bytes(self) -> int:
        """Of the weight, without copies."""
        return sum(projection.weight.nbytes for projection in self.projections)

    def rows(self, ids: Tensor) -> Tensor:
        """[..., in] some rows of the weight of a single projection."""
        if self.is_in_few_bits:
            return self.projections[0].rows(ids.flatten()).view(*ids.shape, self.shape[1])
        return self.projections[0].weight.data[ids]


def project(x: Tensor, weight: list[Tensor], rows: int, norm: RMSNorm | None = None) -> Tensor:
    """norm(x) W^T + b by our operator, for one projection with so many rows.

    Args:
        weight: and bias, if there is one.
    """
    of_norm = ([], 0.0, False) if norm is None else ([norm.weight], norm.epsilon, norm.is_centred)
    return torch.ops.self_speculation.project.default(
        x.float().contiguous(), *of_norm, weight, len(weight) == 2, rows
    )


class RMSNorm:
    """[..., n] -> [..., n], over the weight of a module."""

    def __init__(self, module: Any) -> None:
        self.is_centred = type(module).__name__ in _CENTRED_NORMS
        self.epsilon = module.eps if self.is_centred else module.variance_epsilon
        self.weight: Tensor = module.weight

    def __call__(self, hidden: Tensor) -> Tensor:
        weight = self.weight
        if self.is_centred:
            return torch.rms_norm(hidden.float(), weight.shape, weight.float() + 1, self.epsilon).to(
                hidden.dtype
            )
        if weight.dtype != hidden.dtype:
            weight = weight.to(hidden.dtype)
        return torch.rms_norm(hidden, weight.shape, weight, self.epsilon)


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
