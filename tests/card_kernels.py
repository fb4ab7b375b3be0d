"""What the kernels of a card compute, by torch in float32. test_triton_kernels.py compares them."""

from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch.nn.functional import scaled_dot_product_attention


def decode_attention(
    qkv, query_norm, key_norm, epsilon, is_centred, cos, sin, keys, values, positions, prefix_reads, scale,
    window,
):  # fmt: skip
    """Row by row and token by token. Writes to keys and values."""
    source, *lengths = prefix_reads.tolist()
    rows, width = positions.shape
    assert rows <= len(lengths), "programs of padded rows would read behind the end"
    kv_heads, size = keys.shape[1::2]
    heads = qkv.shape[1] // size - 2 * kv_heads
    q, k, v = qkv.view(rows, width, -1, size).split([heads, kv_heads, kv_heads], 2)
    if query_norm is not None:
        q, k = (_normed(*each, epsilon, is_centred) for each in ((q, query_norm), (k, key_norm)))
    angles = [table.float()[positions.clamp(min=0)][:, :, None] for table in (cos, sin)]
    q, k = _rotated(q, *angles), _rotated(k, *angles)
    out = torch.zeros_like(q, dtype=torch.float32)
    tokens = (positions >= 0).nonzero().tolist()
    for row, token in tokens:
        at = positions[row, token]
        keys[row, :, at], values[row, :, at] = k[row, token], v[row, token]
    for row, token in tokens:
        at = int(positions[row, token])
        seen = slice(max(0, at + 1 - window) if window else 0, at + 1)
        groups = q[row, token].float().view(kv_heads, -1, size)
        of_row = [
            torch.cat((part[source, :, : lengths[row]], part[row, :, lengths[row] :]), 1)[:, seen].float()
            for part in (keys, values)
        ]
        weights = (groups @ of_row[0].mT * scale).softmax(-1)
        out[row, token] = (weights @ of_row[1]).flatten(0, 1)
    return out.view(len(qkv), -1).to(qkv.dtype)


def _normed(heads, weight, epsilon, is_centred):
    return torch.rms_norm(heads.float(), weight.shape, weight.float() + is_centred, epsilon).to(heads.dtype)


def _rotated(heads, cos, sin):
    first, second = heads.float().chunk(2, -1)
    return (heads.float() * cos + torch.cat((-second, first), -1) * sin).to(heads.dtype)


def gated(joint, is_gelu):
    gates, ups = joint.chunk(2, 1)
    active = (
        torch.nn.functional.gelu(gates, approximate="tanh") if is_gelu else torch.nn.functional.silu(gates)
    )
    return active * ups


def flash_attention(queries, keys, values, scale):
    """The last token sees all keys."""
    width = queries.shape[2]
    length = keys.shape[2]
    mask = torch.ones(width, length, dtype=torch.bool).tril(length - width)
    return scaled_dot_product_attention(queries, keys, values, mask, scale=scale, enable_gqa=True)


@contextmanager
def on_cpu(decode_attention, gated):
    """Fused layers decode by the operators above, and read prompts by flash attention."""
    library = torch.library.Library("self_speculation", "IMPL")
    library.impl("decode_attention", decode_attention, "CPU")
    library.impl("gated", gated, "CPU")
    try:
        of_layers = {"why_no_kernels": lambda *_: None, "flash_attention": flash_attention}
        with patch.multiple("self_speculation.backends.card_runner", **of_layers):
            yield
    finally:
        library._destroy()
