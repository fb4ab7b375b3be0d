"""The kernels of a fused layer between projections, while it decodes on a GPU.

Three kernels are attention. They rotate queries and write rotated keys and values into the cache; attend,
with the keys of a row split among programs; and merge the splits. Positions are read on the device, so one
CUDA graph serves rows of any length, and rows that differ in length need no mask. A negative position is
padding: nothing is written for it, and the output is 0. Row i is slot i of the cache. What is compiled
depends on powers of two, not on each width. A fourth kernel multiplies what the MLP gates.

Where prompts of rows begin alike, programs of these positions read them once for the queries of all rows, see
`Buffers.prefix_reads`. It is read on the device, too: the same graph serves rows that share nothing.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from self_speculation.machine.devices import padded

# Queries of a program; tensor cores take 16 and more.
_MIN_QUERY_BLOCK = 16
_MAX_QUERY_BLOCK = 64
_MAX_SPLITS = 32  # of the keys of a row
_BLOCK = 1024  # numbers of a program of `gate`
_NO_WINDOW = 1 << 30


@triton.jit(do_not_specialize=["width"])
def rotate_and_write(
    qkv, query_norm, key_norm, epsilon, cos, sin, keys, values, positions, width, slot_stride, head_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_ROWS: tl.constexpr,
    HALF_DIM: tl.constexpr, NORM_OFFSET: tl.constexpr,
):  # fmt: skip
    """Grid [B * T, KV_HEADS]: a head of keys and values of a token, and the heads of queries that share it.

    Args:
        qkv: [B * T, HEADS + 2 KV_HEADS, HEAD_DIM]; queries are overwritten.
        query_norm, key_norm: [HEAD_DIM] weights, to which NORM_OFFSET is added; None: no norm.
        cos, sin: [P, HEAD_DIM], of which the second half repeats the first one.
        keys, values: [slots, KV_HEADS, capacity, HEAD_DIM] with strides `slot_stride` and `head_stride`.
        positions: [B, T]
        HEAD_ROWS, HALF_DIM: the next powers of two of the heads of a program, and of HEAD_DIM / 2.
    """
    token = tl.program_id(0).to(tl.int64)
    kv = tl.program_id(1)
    position = tl.load(positions + token)
    group = HEADS // KV_HEADS
    half = HEAD_DIM // 2
    row = tl.arange(0, HEAD_ROWS)[:, None]
    d = tl.arange(0, HALF_DIM)[None]
    is_query = row < group
    is_key = row == group
    is_value = row == group + 1
    is_valid = (row < group + 2) & (d < half) & (position >= 0)
    head = tl.where(is_query, kv * group + row, HEADS + kv + tl.where(is_key, 0, KV_HEADS))
    head_at = qkv + (token * (HEADS + 2 * KV_HEADS) + head) * HEAD_DIM + d
    first = tl.load(head_at, is_valid, 0.0)
    second = tl.load(head_at + half, is_valid, 0.0)
    a = first.to(tl.float32)
    b = second.to(tl.float32)
    if query_norm is not None:
        q1 = tl.load(query_norm + d, d < half, 0.0)
        q2 = tl.load(query_norm + half + d, d < half, 0.0)
        k1 = tl.load(key_norm + d, d < half, 0.0)
        k2 = tl.load(key_norm + half + d, d < half, 0.0)
        scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / HEAD_DIM + epsilon)[:, None]
        a = a * scale * (tl.where(is_query, q1, k1).to(tl.float32) + NORM_OFFSET)
        b = b * scale * (tl.where(is_query, q2, k2).to(tl.float32) + NORM_OFFSET)
        a = a.to(first.dtype).to(tl.float32)  # as a separate norm does
        b = b.to(first.dtype).to(tl.float32)
    at = tl.maximum(position, 0) * HEAD_DIM + d
    c = tl.load(cos + at, d < half, 0.0).to(tl.float32)
    s = tl.load(sin + at, d < half, 0.0).to(tl.float32)
    first = tl.where(is_value, first, (a * c - b * s).to(first.dtype))
    second = tl.where(is_value, second, (b * c + a * s).to(first.dtype))
    tl.store(head_at, first, is_valid & is_query)
    tl.store(head_at + half, second, is_valid & is_query)
    at += token // width * slot_stride + kv.to(tl.int64) * head_stride
    at = tl.where(row >= 0, at, 0)  # [HEAD_ROWS, HALF_DIM]
    tl.store(keys + at, first, is_valid & is_key)
    tl.store(keys + at + half, second, is_valid & is_key)
    tl.store(values + at, first, is_valid & is_value)
    tl.store(values + at + half, second, is_valid & is_value)


@triton.jit(do_not_specialize=["rows", "width", "window"])
def attend(
    qkv, keys, values, positions, prefix_reads, sums, stats, scale, window, rows, width,
    slot_stride, head_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, SPLITS: tl.constexpr, PREFIX_SPLITS: tl.constexpr, KEY_BLOCK: tl.constexpr,
):  # fmt: skip
    """A program is attention of QUERY_BLOCK queries of the heads that share keys, over one split of the keys
    that they see.

    Grid [B * KV_HEADS * tiles * SPLITS + KV_HEADS * prefix tiles * PREFIX_SPLITS]: programs of the queries of
    a row, and then those of the queries of all rows over the positions that `prefix_reads` names.

    Args:
        qkv, keys, values, positions: as above; queries are rotated.
        prefix_reads: [1 + rows] a slot, and how many of the first positions each row reads there.
        sums: [programs, QUERY_BLOCK, PADDED_DIM] weighted values, written where it has weights.
        stats: [programs, QUERY_BLOCK, 2] maximum of scores and sum of weights, written.
        window: positions that a token sees, the token's included.
        PADDED_DIM: HEAD_DIM, or the next power of two.
        KEY_BLOCK: keys that are read at a time.
    """
    program = tl.program_id(0)
    group = HEADS // KV_HEADS
    num_of_rows = rows * KV_HEADS * tl.cdiv(width * group, QUERY_BLOCK) * SPLITS
    is_prefix = program >= num_of_rows
    splits = tl.where(is_prefix, PREFIX_SPLITS, SPLITS)
    num_tokens = tl.where(is_prefix, rows * width, width)
    tiles = tl.cdiv(num_tokens * group, QUERY_BLOCK)
    index = tl.where(is_prefix, program - num_of_rows, program)
    split = index % splits
    tile = index // splits % tiles
    kv = index // splits // tiles % KV_HEADS
    row = (index // splits // tiles // KV_HEADS).to(tl.int64)  # 0 for a prefix
    q = tl.arange(0, QUERY_BLOCK)
    d = tl.arange(0, PADDED_DIM)
    query = tile * QUERY_BLOCK + q
    is_token = query // group < num_tokens
    token = row * width + query // group
    head = kv * group + query % group
    position = tl.load(positions + token, is_token, -1).to(tl.int32)
    has_prefixes = is_token & (PREFIX_SPLITS > 0)
    of_prefix = tl.load(prefix_reads + 1 + token // width, has_prefixes, 0).to(tl.int32)
    last = tl.where(is_prefix, tl.minimum(position, of_prefix - 1), position)  # key that a query sees
    length = tl.maximum(tl.max(last, 0) + 1, 0)
    oldest = tl.min(tl.where(last < 0, length, position), 0) - window + 1  # that a query sees
    start = tl.maximum(oldest, tl.where(is_prefix, 0, tl.max(of_prefix, 0))) // KEY_BLOCK * KEY_BLOCK
    share = tl.cdiv(tl.cdiv(tl.maximum(length - start, 0), KEY_BLOCK), splits) * KEY_BLOCK
    begin = start + split * share
    end = tl.minimum(begin + share, length)
    at = (token[:, None] * (HEADS + 2 * KV_HEADS) + head[:, None]) * HEAD_DIM + d[None]
    queries = tl.load(qkv + at, (last[:, None] >= 0) & (d[None] < HEAD_DIM), 0.0)
    slot = tl.where(is_prefix, tl.load(prefix_reads), row)
    head_at = slot * slot_stride + kv.to(tl.int64) * head_stride
    max_score = tl.full([QUERY_BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([QUERY_BLOCK], tl.float32)
    out = tl.zeros([QUERY_BLOCK, PADDED_DIM], tl.float32)
    for first in range(begin, end, KEY_BLOCK):
        n = first + tl.arange(0, KEY_BLOCK)
        key_at = n[:, None] * HEAD_DIM + d[None]
        is_valid = (n[:, None] < end) & (d[None] < HEAD_DIM)
        k = tl.load(keys + head_at + key_at, is_valid, 0.0)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
        sees = (n[None] <= last[:, None]) & (n[None] > position[:, None] - window) & (n[None] < end)
        scores = tl.where(sees, scores, -float("inf"))
        new_max = tl.maximum(max_score, tl.max(scores, 1))
        shift = tl.where(new_max == -float("inf"), 0.0, new_max)
        weights = tl.exp(scores - shift[:, None])
        scale_old = tl.exp(max_score - shift)
        v = tl.load(values + head_at + key_at, is_valid, 0.0)
        out = out * scale_old[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        total = total * scale_old + tl.sum(weights, 1)
        max_score = new_max
    partial = program * QUERY_BLOCK + q
    tl.store(stats + partial * 2, max_score, is_token)
    tl.store(stats + partial * 2 + 1, total, is_token)
    if begin < end:
        tl.store(sums + partial[:, None] * PADDED_DIM + d[None], out, is_token[:, None])


@triton.jit(do_not_specialize=["rows", "width"])
def merge(
    sums, stats, out, rows, width,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, SPLITS: tl.constexpr, PREFIX_SPLITS: tl.constexpr, ALL_SPLITS: tl.constexpr,
):  # fmt: skip
    """Grid [B * T, HEADS]: out [B * T, HEADS, HEAD_DIM] from `sums` and `stats` of `attend`.

    Args:
        ALL_SPLITS: the next power of two of the splits of a row and of a prefix.
    """
    token = tl.program_id(0)
    head = tl.program_id(1)
    row = token // width
    kv = head // (HEADS // KV_HEADS)
    group = HEADS // KV_HEADS
    tiles = tl.cdiv(width * group, QUERY_BLOCK)
    prefix_tiles = tl.cdiv(rows * width * group, QUERY_BLOCK)
    q = token % width * group + head % group
    prefix_q = token * group + head % group
    split = tl.arange(0, ALL_SPLITS)
    is_of_row = split < SPLITS
    of_row = ((row * KV_HEADS + kv) * tiles + q // QUERY_BLOCK) * SPLITS + split
    of_prefix = (kv * prefix_tiles + prefix_q // QUERY_BLOCK) * PREFIX_SPLITS + split - SPLITS
    program = tl.where(is_of_row, of_row, rows * KV_HEADS * tiles * SPLITS + of_prefix).to(tl.int64)
    partial = program * QUERY_BLOCK + tl.where(is_of_row, q, prefix_q) % QUERY_BLOCK
    is_split = split < SPLITS + PREFIX_SPLITS
    d = tl.arange(0, PADDED_DIM)
    max_score = tl.load(stats + partial * 2, is_split, -float("inf"))
    total = tl.load(stats + partial * 2 + 1, is_split, 0.0)
    row_max = tl.max(max_score, 0)
    scale = tl.exp(max_score - tl.where(row_max == -float("inf"), 0.0, row_max))
    weight = tl.sum(total * scale, 0)  # 0: the token is padding
    of_splits = tl.load(sums + partial[:, None] * PADDED_DIM + d[None], total[:, None] > 0.0, 0.0)
    merged = tl.sum(of_splits * scale[:, None], 0) / tl.where(weight == 0.0, 1.0, weight)
    at = out + (token.to(tl.int64) * HEADS + head) * HEAD_DIM + d
    tl.store(at, merged.to(out.dtype.element_ty), d < HEAD_DIM)


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
    "Tensor cos, Tensor sin, Tensor(b!) keys, Tensor(c!) values, Tensor positions, Tensor prefix_reads, "
    "float scale, int? window) -> Tensor"
)


class Shape(NamedTuple):
    """The constants of programs of `attend`, and their number."""

    constants: dict[str, int]
    num_programs: int


def shape_of(rows: int, width: int, heads: int, kv_heads: int, size: int, processors: int) -> Shape:
    """The shape for tensors of these sizes. Splits give all processors work."""
    group = heads // kv_heads
    most = _MAX_QUERY_BLOCK if size <= 128 else _MIN_QUERY_BLOCK  # registers hold so many
    block = min(max(padded(padded(width) * group), _MIN_QUERY_BLOCK), most)
    tiles = -(-width * group // block)
    prefix_tiles = -(-rows * width * group // block)
    splits = min(padded(-(-processors // (rows * kv_heads))), _MAX_SPLITS)
    prefix_splits = min(padded(-(-processors // (prefix_tiles * kv_heads))), _MAX_SPLITS)
    if rows == 1:  # it shares nothing
        prefix_splits = 0
    constants = {
        "HEADS": heads, "KV_HEADS": kv_heads, "HEAD_DIM": size, "PADDED_DIM": padded(size),
        "QUERY_BLOCK": block, "SPLITS": splits, "PREFIX_SPLITS": prefix_splits,
    }  # fmt: skip
    return Shape(constants, kv_heads * (rows * tiles * splits + prefix_tiles * prefix_splits))


def decode_attention(
    qkv: Tensor, query_norm: Tensor | None, key_norm: Tensor | None, epsilon: float, is_centred: bool,
    cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, positions: Tensor, prefix_reads: Tensor,
    scale: float, window: int | None,
) -> Tensor:  # fmt: skip
    """[B * T, (heads + 2 kv_heads) size] -> [B * T, heads size], see the kernels. Overwrites `qkv`."""
    rows, width = positions.shape
    _, kv_heads, _, size = keys.shape
    heads = qkv.shape[1] // size - 2 * kv_heads
    strides = keys.stride(0), keys.stride(1)
    constants, num_programs = shape_of(rows, width, heads, kv_heads, size, _processors(qkv.device))
    rotate_and_write[rows * width, kv_heads](
        qkv, query_norm, key_norm, epsilon, cos, sin, keys, values, positions, width, *strides,
        heads, kv_heads, size, padded(heads // kv_heads + 2), padded(size // 2), float(is_centred),
    )  # fmt: skip
    partial_shape = num_programs, constants["QUERY_BLOCK"]
    sums = torch.empty(*partial_shape, padded(size), dtype=torch.float32, device=qkv.device)
    stats = torch.empty(*partial_shape, 2, dtype=torch.float32, device=qkv.device)
    attend[num_programs,](
        qkv, keys, values, positions, prefix_reads, sums, stats, scale, window or _NO_WINDOW, rows, width,
        *strides, KEY_BLOCK=64 if size in (64, 128) else 32, **constants,
    )  # fmt: skip
    out = torch.empty(len(qkv), heads * size, dtype=qkv.dtype, device=qkv.device)
    num_splits = constants["SPLITS"] + constants["PREFIX_SPLITS"]
    merge[rows * width, heads](sums, stats, out, rows, width, ALL_SPLITS=padded(num_splits), **constants)
    return out


def gated(joint: Tensor, is_gelu: bool) -> Tensor:
    """[T, 2 width] gates, then ups -> [T, width]"""
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


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
