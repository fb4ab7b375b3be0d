"""Attention by the operators of torch, each called by its name.

`scaled_dot_product_attention` prefers cuDNN's on Hopper and newer, which makes a plan, for tens of
milliseconds, for every new number of keys: in decoding, for every token.
"""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# Its causal mask is aligned to the last token and key; those of the others to the first ones.
flash_attention = torch.ops.aten._scaled_dot_product_flash_attention.default
efficient_attention = torch.ops.aten._scaled_dot_product_efficient_attention.default


class AttentionKernel(Enum):
    """A kernel of torch."""

    FLASH = "flash"  # splits keys; takes no mask
    EFFICIENT = "efficient"  # wants a mask at an address of 16 bytes, with strides of a multiple of 8
    ANY = "any"  # torch chooses: never cuDNN's, since FLASH takes every format that cuDNN does

    @property
    def with_mask(self) -> AttentionKernel:
        """The kernel of the same passes with a mask."""
        return AttentionKernel.EFFICIENT if self is AttentionKernel.FLASH else self


def attention_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> AttentionKernel:
    """The kernel of passes without a mask."""
    # AMD's flash attention aligns its causal mask to the first token and key.
    if device.type != "cuda" or torch.version.hip is not None or head_dim % 8:
        return AttentionKernel.ANY
    is_ampere = torch.cuda.get_device_capability(device) >= (8, 0)
    if is_ampere and dtype in (torch.bfloat16, torch.float16) and head_dim <= 256:
        return AttentionKernel.FLASH
    takes_dtype = dtype in (torch.float32, torch.float16) or (is_ampere and dtype == torch.bfloat16)
    return AttentionKernel.EFFICIENT if takes_dtype else AttentionKernel.ANY


def attend(
    kernel: AttentionKernel,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float,
    is_causal: bool = False,
) -> Tensor:
    """[N, heads, M, head_dim] queries over [N, heads, S, head_dim] keys and values.

    Args:
        kernel: with a mask, not FLASH.
        mask: [M, S] or [N or 1, heads or 1, M, S], added to the scores.
        is_causal: without a mask.
    """
    if kernel is AttentionKernel.ANY:
        return scaled_dot_product_attention(queries, keys, values, mask, is_causal=is_causal, scale=scale)
    if kernel is AttentionKernel.FLASH:  # which may have fewer heads of keys than of queries
        return flash_attention(queries, keys, values, 0.0, is_causal, scale=scale)[0]
    if mask is not None:
        mask = mask.expand(*queries.shape[:3], -1)
    return efficient_attention(queries, keys, values, mask, False, 0.0, is_causal, scale=scale)[0]
