"""The kernels of a fused layer between projections, while it decodes on a GPU.

Three kernels are attention. They rotate queries and write rotated keys and values into the cache; attend,
with the keys of a row split among programs; and merge the splits. Positions are read on the device, so one
CUDA graph serves rows of any length, and rows that differ in length need no mask. Position -1 is padding:
nothing is written for it, and the output is 0. Row i is slot i of the cache. What is compiled depends on
powers of two, not on each width. A fourth kernel multiplies what the MLP gates.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from self_speculation.devices import padded

# Queries of a program; tensor cores take 16 and more.
_LEAST_QUERIES = 16
_MOST_QUERIES = 64
_MOST_SPLITS = 32  # shares of a row's keys
_BLOCK = 1024  # numbers of a program of `gate`
_NO_WINDOW = 1 << 30


@triton.jit(do_not_specialize=["width", "window", "tiles"])
def rotate_and_write(
    qkv, query_norm, key_norm, epsilon, cos, sin, keys, values, positions, width, of_slot, of_head,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
    ADDED: tl.constexpr,
):  # fmt: skip
    """Grid [B * T, KV_HEADS]: a head of keys and values of a token, and the heads of queries that share it.

    Args:
        qkv: [B * T, HEADS + 2 KV_HEADS, SIZE]; queries are overwritten.
        query_norm, key_norm: [SIZE] weights, to which ADDED is added; None: no norm.
        cos, sin: [P, SIZE], of which the second half repeats the first one.
        keys, values: [slots, KV_HEADS, capacity, SIZE] with steps `of_slot` and `of_head`.
        positions: [B, T]
        ROWS, HALF: the next powers of two of heads of a program, and of SIZE / 2.
    """
    token = tl.program_id(0).to(tl.int64)
    kv = tl.program_id(1)
    position = tl.load(positions + token)
    group = HEADS // KV_HEADS
    half = SIZE // 2
    row = tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, HALF)[None]
    is_query = row < group
    is_key = row == group
    is_value = row == group + 1
    is_there = (row < group + 2) & (d < half) & (position >= 0)
    head = tl.where(is_query, kv * group + row, HEADS + kv + tl.where(is_key, 0, KV_HEADS))
    head_at = qkv + (token * (HEADS + 2 * KV_HEADS) + head) * SIZE + d
    first = tl.load(head_at, is_there, 0.0)
    second = tl.load(head_at + half, is_there, 0.0)
    a = first.to(tl.float32)
    b = second.to(tl.float32)
    if query_norm is not None:
        q1 = tl.load(query_norm + d, d < half, 0.0)
        q2 = tl.load(query_norm + half + d, d < half, 0.0)
        k1 = tl.load(key_norm + d, d < half, 0.0)
        k2 = tl.load(key_norm + half + d, d < half, 0.0)
        scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / SIZE + epsilon)[:, None]
        a = a * scale * (tl.where(is_query, q1, k1).to(tl.float32) + ADDED)
        b = b * scale * (tl.where(is_query, q2, k2).to(tl.float32) + ADDED)
        a = a.to(first.dtype).to(tl.float32)  # as a separate norm does
        b = b.to(first.dtype).to(tl.float32)
    at = tl.maximum(position, 0) * SIZE + d
    c = tl.load(cos + at, d < half, 0.0).to(tl.float32)
    s = tl.load(sin + at, d < half, 0.0).to(tl.float32)
    first = tl.where(is_value, first, (a * c - b * s).to(first.dtype))
    second = tl.where(is_value, second, (b * c + a * s).to(first.dtype))
    tl.store(head_at, first, is_there & is_query)
    tl.store(head_at + half, second, is_there & is_query)
    at += token // width * of_slot + kv.to(tl.int64) * of_head
    at = tl.where(row >= 0, at, 0)  # [ROWS, HALF]
    tl.store(keys + at, first, is_there & is_key)
    tl.store(keys + at + half, second, is_there & is_key)
    tl.store(values + at, first, is_there & is_value)
    tl.store(values + at + half, second, is_there & is_value)


@triton.jit(do_not_specialize=["width", "window", "tiles"])
def attend(
    qkv, keys, values, positions, sums, stats, scale, window, width, of_slot, of_head,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Grid [B * KV_HEADS, splits, tiles]: QUERIES of the heads that share keys, over one share of those that
    they see.

    Args:
        qkv, keys, values, positions: as above; queries are rotated.
        sums: [B * KV_HEADS, tiles, splits, QUERIES, PADDED] weighted values, written.
        stats: [B * KV_HEADS, tiles, splits, QUERIES, 2] the largest score and the sum of weights, written.
        window: positions that a token sees, the token's included.
        PADDED: SIZE, or the next power of two.
        KEYS: that are read at a time.
    """
    row = (tl.program_id(0) // KV_HEADS).to(tl.int64)
    kv = tl.program_id(0) % KV_HEADS
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    tile = tl.program_id(2)
    group = HEADS // KV_HEADS
    q = tl.arange(0, QUERIES)
    d = tl.arange(0, PADDED)
    token = (tile * QUERIES + q) // group
    head = kv * group + (tile * QUERIES + q) % group
    position = tl.load(positions + row * width + token, token < width, -1).to(tl.int32)
    length = tl.max(position, 0) + 1
    oldest = tl.min(tl.where(position < 0, length, position), 0) - window + 1  # that any of them sees
    start = tl.maximum(oldest, 0) // KEYS * KEYS
    share = tl.cdiv(tl.cdiv(length - start, KEYS), splits) * KEYS
    begin = start + split * share
    end = tl.minimum(begin + share, length)
    at = ((row * width + token)[:, None] * (HEADS + 2 * KV_HEADS) + head[:, None]) * SIZE + d[None]
    queries = tl.load(qkv + at, (position[:, None] >= 0) & (d[None] < SIZE), 0.0)
    base = row * of_slot + kv.to(tl.int64) * of_head
    largest = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    out = tl.zeros([QUERIES, PADDED], tl.float32)
    for first in range(begin, end, KEYS):
        n = first + tl.arange(0, KEYS)
        there = base + n[:, None] * SIZE + d[None]
        is_there = (n[:, None] < end) & (d[None] < SIZE)
        k = tl.load(keys + there, is_there, 0.0)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
        sees = (n[None] <= position[:, None]) & (n[None] > position[:, None] - window) & (n[None] < end)
        scores = tl.where(sees, scores, -float("inf"))
        new = tl.maximum(largest, tl.max(scores, 1))
        finite = tl.where(new == -float("inf"), 0.0, new)
        weights = tl.exp(scores - finite[:, None])
        keep = tl.exp(largest - finite)
        v = tl.load(values + there, is_there, 0.0)
        out = out * keep[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        total = total * keep + tl.sum(weights, 1)
        largest = new
    part = ((tl.program_id(0) * tl.num_programs(2) + tile) * splits + split) * QUERIES + q
    is_read = token < width  # by `merge`
    tl.store(sums + part[:, None] * PADDED + d[None], out, is_read[:, None])
    tl.store(stats + part * 2, largest, is_read)
    tl.store(stats + part * 2 + 1, total, is_read)


@triton.jit(do_not_specialize=["width", "window", "tiles"])
def merge(
    sums, stats, out, width, tiles,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr,
    QUERIES: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Grid [B * T, HEADS]: out [B * T, HEADS, SIZE] from what `attend` has written."""
    token = tl.program_id(0)
    head = tl.program_id(1)
    group = HEADS // KV_HEADS
    q = token % width * group + head % group
    of_row = (token // width * KV_HEADS + head // group) * tiles + q // QUERIES
    split = tl.arange(0, SPLITS)
    d = tl.arange(0, PADDED)
    part = (of_row * SPLITS + split) * QUERIES + q % QUERIES
    largest = tl.load(stats + part * 2)
    total = tl.load(stats + part * 2 + 1)
    most = tl.max(largest, 0)
    keep = tl.exp(largest - tl.where(most == -float("inf"), 0.0, most))
    weight = tl.sum(total * keep, 0)  # 0: the token is padding
    merged = tl.sum(tl.load(sums + part[:, None] * PADDED + d[None]) * keep[:, None], 0)
    merged = merged / tl.where(weight == 0.0, 1.0, weight)
    at = out + (token.to(tl.int64) * HEADS + head) * SIZE + d
    tl.store(at, merged.to(out.dtype.element_ty), d < SIZE)


@triton.jit
def gate(joint, out, width, IS_GELU: tl.constexpr, BLOCK: tl.constexpr):
    """Grid [T, blocks]: out [T, width] = activation(gates) * up, of joint [T, 2 width]: gates, then up."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gates_at = joint + token * 2 * width + at
    gates = tl.load(gates_at, at < width, 0.0)
    up = tl.load(gates_at + width, at < width, 0.0)
    x = gates.to(tl.float32)
    inner = x
    if IS_GELU:  # by tanh: (1 + tanh(y)) / 2 = 1 / (1 + exp(-2 y))
        inner = 1.5957691216 * (x + 0.044715 * x * x * x)
    active = (x / (1.0 + tl.exp(-inner))).to(gates.dtype)
    tl.store(out + token * width + at, active * up, at < width)


_LIBRARY = torch.library.Library("self_speculation", "FRAGMENT")
_LIBRARY.define("gated(Tensor joint, bool is_gelu) -> Tensor")
_LIBRARY.define(
    "decode_attention(Tensor(a!) qkv, Tensor? query_norm, Tensor? key_norm, float epsilon, bool is_centred, "
    "Tensor cos, Tensor sin, Tensor(b!) keys, Tensor(c!) values, Tensor positions, float scale, int? window) "
    "-> Tensor"
)


class Shape(NamedTuple):
    """The constants of programs of `attend`, and their grid."""

    constants: dict[str, int]
    grid: tuple[int, int, int]


def shape_of(rows: int, width: int, heads: int, kv_heads: int, size: int, processors: int) -> Shape:
    """Splits give all processors work."""
    most = _MOST_QUERIES if size <= 128 else _LEAST_QUERIES  # as registers hold
    queries = padded(padded(width) * heads // kv_heads)  # of all heads that share keys
    tile = min(max(queries, _LEAST_QUERIES), most)
    splits = min(padded(-(-processors // (rows * kv_heads))), _MOST_SPLITS)
    constants = {"HEADS": heads, "KV_HEADS": kv_heads, "SIZE": size, "PADDED": padded(size)}
    return Shape(constants | {"QUERIES": tile}, (rows * kv_heads, splits, -(-queries // tile)))


def decode_attention(
    qkv: Tensor, query_norm: Tensor | None, key_norm: Tensor | None, epsilon: float, is_centred: bool,
    cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float,
    window: int | None,
) -> Tensor:  # fmt: skip
    """[B * T, (HEADS + 2 KV_HEADS) SIZE] -> [B * T, HEADS SIZE], see the kernels. Overwrites `qkv`."""
    rows, width = positions.shape
    _, kv_heads, _, size = keys.shape
    heads = qkv.shape[1] // size - 2 * kv_heads
    steps = (width, keys.stride(0), keys.stride(1))
    constants, grid = shape_of(rows, width, heads, kv_heads, size, _processors(qkv.device))
    rotate_and_write[rows * width, kv_heads](
        qkv, query_norm, key_norm, epsilon, cos, sin, keys, values, positions, *steps,
        heads, kv_heads, size, padded(heads // kv_heads + 2), padded(size // 2), float(is_centred),
    )  # fmt: skip
    parts = grid[0], grid[2], grid[1], constants["QUERIES"]
    sums = torch.empty(*parts, padded(size), dtype=torch.float32, device=qkv.device)
    stats = torch.empty(*parts, 2, dtype=torch.float32, device=qkv.device)
    attend[grid](
        qkv, keys, values, positions, sums, stats, scale, window or _NO_WINDOW, *steps,
        KEYS=keys_at_a_time(size), **constants,
    )  # fmt: skip
    out = torch.empty(len(qkv), heads * size, dtype=qkv.dtype, device=qkv.device)
    merge[rows * width, heads](sums, stats, out, width, grid[2], SPLITS=grid[1], **constants)
    return out


def gated(joint: Tensor, is_gelu: bool) -> Tensor:
    """[T, 2 width] gates and what they gate -> [T, width]"""
    width = joint.shape[1] // 2
    out = joint.new_empty(len(joint), width)
    gate[len(joint), -(-width // _BLOCK)](joint, out, width, is_gelu, _BLOCK)
    return out


def try_out(device: torch.device, dtype: torch.dtype) -> None:
    """Launch a kernel and wait for it. Raises what triton raises, without a C compiler for example."""
    joint = torch.zeros(1, 2, dtype=dtype, device=device)
    torch.ops.self_speculation.gated(joint, False).cpu()


def _on_its_card(launch: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Triton launches on the current card, whichever has the tensors."""

    def launched(tensor: Tensor, *rest: object) -> Tensor:
        with torch.cuda.device_of(tensor):
            return launch(tensor, *rest)

    return launched


_LIBRARY.impl("decode_attention", _on_its_card(decode_attention), "CUDA")
_LIBRARY.impl("gated", _on_its_card(gated), "CUDA")


def keys_at_a_time(size: int) -> int:
    return 64 if size <= 128 else 32


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
