"""When fused layers decode by the kernels of a card, and what a pass hands to these."""

import importlib.util
from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from self_speculation.families import AttentionType
from self_speculation.passes.attention_context import AttentionTables
from self_speculation.passes.kv_cache import Pair
from self_speculation.passes.layers import RMSNorm

_SIZES = (64, 96, 128, 256)  # of a head


@cache
def why_no_kernels(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """None: triton_kernels.py computes attention while this device decodes."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "they are for NVIDIA's cards"
    if (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"the card has compute capability {'.'.join(map(str, capability))}, below 8.0"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"activations are {dtype}, not in 16 bits"
    if head_dim not in _SIZES:
        return f"a head has {head_dim} elements, not one of {', '.join(map(str, _SIZES))}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    importlib.import_module("self_speculation.passes.triton_kernels")
    return None


class DecodeContext:
    """As `AttentionContext`, for a pass by kernels: fused layers call `attend`.

    Args:
        buffers: keys and values by layer; row i of the pass is slot i.
        positions: [B, T] of the tokens; -1: padding.
    """

    def __init__(
        self, tables: AttentionTables, buffers: Mapping[int, Pair], positions: Tensor, kind: AttentionType
    ) -> None:
        self._buffers, self._positions, self._window = buffers, positions, kind.window
        self._cos, self._sin = tables.cos_sin(kind.rotation, 1).unbind()

    def attend(
        self, qkv: Tensor, layer: int, query_norm: RMSNorm | None, key_norm: RMSNorm | None, scale: float
    ) -> Tensor:
        """[B * T, (heads + 2 kv_heads) * head_dim], overwritten -> [B * T, heads * head_dim]"""
        norms: tuple[Tensor | None, Tensor | None, float, bool] = None, None, 0.0, False
        if query_norm is not None and key_norm is not None:
            norms = query_norm.weight, key_norm.weight, query_norm.epsilon, query_norm.is_centred
        return torch.ops.self_speculation.decode_attention.default(
            qkv, *norms, self._cos, self._sin, *self._buffers[layer], self._positions, scale, self._window
        )
