"""A fused layer in four bits, by our own kernel (kernels.py): two operators for a token of one row.

A draft step multiplies by few weights, so the norms, activations and sums around the products take as long as
the products, each as a kernel of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from self_speculation.model.fused_layers import FusedLayer
from self_speculation.model.int4_linear import Int4Linear
from self_speculation.model.kv_cache import Appendable

_SILU = ("SiLUActivation", "SiLU")  # of transformers and of torch


class Int4Layer(FusedLayer):
    """See the module.

    Args:
        layer: for which `fits` is true.
    """

    def __init__(self, layer: FusedLayer) -> None:
        vars(self).update(vars(layer))
        self._of_heads = [norm and norm.weight for norm in (self._query_norm, self._key_norm)]
        # Numbers of the layer itself: a trace with another one is another trace.
        self._epsilon, self._mlp_epsilon = self._input_norm.epsilon, self._mlp_norm.epsilon
        epsilons = {norm.epsilon for norm in (self._input_norm, self._query_norm, self._key_norm) if norm}
        self._can_attend = self._head_dim % 16 == 0 and len(epsilons) == 1

    @staticmethod
    def fits(layer: Any) -> bool:
        """Whether the kernel computes this layer: one as Llama's, over copies of its own format."""
        if type(layer) is not FusedLayer:
            return False
        is_own = all(isinstance(linear, Int4Linear) and linear.is_own for linear in layer.linears)
        has_llamas_norms = (
            layer._attended_norm is layer._output_norm is None and not layer._mlp_norm.is_centred
        )
        activation: Any = layer._activation
        is_silu = type(activation.__self__).__name__ in _SILU
        return is_own and has_llamas_norms and is_silu and all(x.bias is None for x in layer.linears[1:])

    def __call__(self, hidden: Tensor, context: Any, cache: Appendable) -> Tensor:
        if context.rows * context.width > 1 or cache.one_row is None or not self._can_attend:
            return super().__call__(hidden, context, cache)
        keys, values, past = cache.one_row
        qkv, norm = self.linears[0], self._input_norm.weight
        attended = torch.ops.self_speculation.int4_attend(
            hidden, norm, self._epsilon, *qkv.tensors()[:2], qkv.bias, *self._of_heads,
            context.rotations, keys, values, past, self._scaling, self._num_heads,
        )  # fmt: skip
        return self._finish(hidden, attended)

    def _project(self, hidden: Tensor) -> Tensor:
        return self.linears[0].matmul_bf16(hidden, self._input_norm.weight, self._epsilon)

    def _finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        _, out, gate_up, down = (linear.tensors() for linear in self.linears)
        norm = self._mlp_norm.weight, self._mlp_epsilon
        torch.ops.self_speculation.int4_mlp(hidden, attended, *out, *norm, *gate_up, *down, self._width)
        return hidden
