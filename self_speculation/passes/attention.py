"""torch's flash attention, for passes whose tokens see all positions up to their own, without a mask.

`scaled_dot_product_attention`, which computes all others, aligns a causal mask to the first token and key.
"""

import torch
from torch import Tensor


def has_flash_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    # AMD's aligns its causal mask to the first token and key.
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    takes_heads = dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 256
    return takes_heads and torch.cuda.get_device_capability(device) >= (8, 0)


def flash_attention(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """[B, heads, T, head_dim] queries of the last T of S positions over [B, kv_heads, S, head_dim] keys and
    values.
    """
    attend = torch.ops.aten._scaled_dot_product_flash_attention.default
    return attend(queries, keys, values, 0.0, True, scale=scale)[0]
