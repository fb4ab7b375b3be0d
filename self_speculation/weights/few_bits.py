"""`apply_linear`, x W^T by the operator of a CPU, and modules with quantised weights. The weights come from a
`.gguf` file, or are rounded here.

cpp/few_bits.h has the formats. Inputs are rounded to eight bits, 32 at a time, as llama.cpp does; outputs
are float32. The bits of a token do not depend on the pass, so prompts, drafts and verifications agree.
"""

from collections import Counter
from collections.abc import Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

# ggml's number of a format -> the name. The operator keeps elements in these formats exactly.
FORMATS = {
    2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K",
    14: "Q6_K", 20: "IQ4_NL", 23: "IQ4_XS",
}  # fmt: skip
_Q8_0 = 8
_GROUP = 32  # columns that share a scale
NONE = torch.empty(0)  # in the place of a norm or a bias, for the operator
_AT_A_TIME = 2**22  # elements that are rounded: intermediate results are small


class _FewBits(nn.Module):
    """A matrix [rows, columns] in few bits. A state dict has it in float32.

    Args:
        weight: bytes, see cpp/few_bits.h.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, rows: int, columns: int) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.shape = torch.Size((rows, columns))

    def rows(self, ids: Tensor) -> Tensor:
        """[n, columns] in float32"""
        return torch.ops.self_speculation.dequantize_rows(self.weight, ids.long().contiguous(), *self.shape)

    @property
    def num_bytes(self) -> int:
        return self.weight.nbytes

    def dequantized(self) -> Tensor:
        """[rows, columns] in float32"""
        return self.rows(torch.arange(self.shape[0]))

    def _save_to_state_dict(
        self, destination: MutableMapping[str, object], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.dequantized()


class FewBitsLinear(_FewBits):
    """In place of an `nn.Linear`: [..., in] -> [..., out]."""

    bias: Tensor | None

    def __init__(self, weight: Tensor, rows: int, columns: int, bias: Tensor | None = None) -> None:
        super().__init__(weight, rows, columns)
        self.out_features = rows
        self.in_features = columns
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return apply_linear(x.flatten(0, -2), self).view(*x.shape[:-1], self.out_features).to(x.dtype)


class FewBitsEmbedding(_FewBits):
    """In place of an `nn.Embedding`: [...] ids -> [..., columns].

    Args:
        scale: of the result.
    """

    def __init__(self, weight: Tensor, rows: int, columns: int, scale: float | None = None) -> None:
        super().__init__(weight, rows, columns)
        self.num_embeddings = rows
        self.embedding_dim = columns
        self.scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        rows = self.rows(ids.flatten()).view(*ids.shape, self.embedding_dim)
        return rows if self.scale is None else rows * self.scale


def apply_linear(x: Tensor, module: Any, norm: Any = None) -> Tensor:
    """x W^T + b, or norm(x) W^T + b, in float32: [T, in] -> [T, out].

    Args:
        module: has W and b.
        norm: an `RMSNorm`.
    """
    norm_arguments = (NONE, 0.0, False) if norm is None else (norm.weight, norm.epsilon, norm.is_centred)
    bias = NONE if module.bias is None else module.bias
    return torch.ops.self_speculation.linear.default(
        x.float().contiguous(), *norm_arguments, module.weight, bias, module.out_features
    )


def eight_bits(weight: Tensor) -> Tensor:
    """Round a matrix [n, k] to Q8_0."""
    rows = []
    for chunk in weight.split(max(1, _AT_A_TIME // weight.shape[1])):
        groups = pad(chunk, (0, -chunk.shape[1] % _GROUP)).float().unflatten(1, (-1, _GROUP))
        scales = (groups.abs().amax(2, keepdim=True) / 127).half()
        quants = (groups / scales.float().clamp(min=1e-30)).round_().clamp_(-127, 127).to(torch.int8)
        rows.append(torch.cat((scales.view(torch.uint8), quants.view(torch.uint8)), 2).flatten(1))
    columns = -(-weight.shape[1] // _GROUP) * _GROUP
    return torch.ops.self_speculation.repack_weight(torch.cat(rows), _Q8_0, columns)


def is_in_few_bits(model: PreTrainedModel) -> bool:
    """Whether a layer of the model has weights in few bits."""
    return any(isinstance(module, _FewBits) for module in model.base_model.layers.modules())


def formats_of(model: nn.Module) -> str:
    """Names of the formats of a model's matrices, those with most bytes first; empty: none is in few bits."""
    sizes = Counter[str]()
    for matrix in _matrices(model):
        sizes[FORMATS.get(int(matrix.weight[0]), "int4")] += matrix.weight.nbytes
    return "/".join(name for name, _ in sizes.most_common())


def num_parameters(model: PreTrainedModel) -> int:
    """Elements of all weights, in any format."""
    return model.num_parameters() + sum(matrix.shape.numel() for matrix in _matrices(model))


def _matrices(model: nn.Module) -> Iterable[_FewBits]:
    """The matrices in few bits; a head that shares the weight of the embedding counts once."""
    return {id(module.weight): module for module in model.modules() if isinstance(module, _FewBits)}.values()


def mean_bytes_per_weight(*modules: nn.Module) -> float:
    """Bytes per weight of all matrices in the modules, on average."""
    matrices = [
        (matrix.weight.nbytes, (matrix.shape if isinstance(matrix, _FewBits) else matrix.weight).numel())
        for module in modules
        for matrix in module.modules()
        if isinstance(matrix, nn.Linear | _FewBits)
    ]
    sizes, num_weights = zip(*matrices, strict=True)
    return sum(sizes) / sum(num_weights)
