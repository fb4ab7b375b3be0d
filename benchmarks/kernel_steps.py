"""Steps of first_gpu.py that need no answers: a card's memory, kernels and products."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from self_speculation.backends.captures import GraphRecorder
from self_speculation.backends.card_runner import FusedRunner
from self_speculation.backends.torch_attention import causal_mask
from self_speculation.machine.devices import free_memory

REPEATS = 20  # of a pass that is timed
_ROTATED = 128 * 2**20  # bytes that kernels rotate through, more than a card's cache has
_COPIED = 2**30  # bytes of the copy that shows the card's speed
_ROUNDINGS = 8  # of the largest number, by which kernels may differ from float32

# Tokens of a row, window, and the first positions that rows read together.
_SHAPES = ((1, None, 0), (1, 100, 0), (8, None, 0), (32, 100, 0), (1, None, 128), (8, 100, 64))

Found = Mapping[str, Any]


class KernelSteps:
    """The steps, over one model. Each returns what it has found."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    @torch.inference_mode()
    def memory(self) -> Found:
        """GB/s of a large copy, read and written."""
        size = min(_COPIED, free_memory(self._model.device) // 4)
        source = torch.ones(size, dtype=torch.uint8, device=self._model.device)
        target = torch.empty_like(source)
        seconds = self.seconds_of(partial(repeat, partial(target.copy_, source))) / REPEATS
        return {"GB/s": round(2 * size / seconds / 1e9)}

    @torch.inference_mode()
    def kernels_compute(self) -> Found:
        """Largest difference of attention from float32, in roundings of the largest number."""
        runner = FusedRunner(self._model)
        if runner.why_no_kernels is not None:
            return {"none": runner.why_no_kernels}
        found = dict[str, float]()
        for size in (64, 96, 128, 256):
            for dtype in (torch.bfloat16, torch.float16):
                for width, window, num_shared in _SHAPES:
                    name = f"{size}, {str(dtype).removeprefix('torch.')}, {width} wide, window {window}"
                    name += f", {num_shared} shared" if num_shared else ""
                    found[name] = self._difference_of_attention(size, dtype, width, window, num_shared)
        wrong = {name: value for name, value in found.items() if not value <= _ROUNDINGS}
        worst = max(found.values())
        return {"cases": len(found), "roundings": round(worst, 2), **({"error": wrong} if wrong else {})}

    def _difference_of_attention(
        self, size: int, dtype: torch.dtype, width: int, window: int | None, num_shared: int
    ) -> float:
        device = self._model.device
        torch.manual_seed(size + width)
        lengths = [300, num_shared + 17]
        heads = 8
        kv_heads = 2
        random = partial(torch.randn, device=device, dtype=dtype)
        keys = random(len(lengths), kv_heads, 400, size)
        values = random(len(lengths), kv_heads, 400, size)
        for part in (keys, values):
            part[1, :, :num_shared] = part[0, :, :num_shared]
        prefix_reads = torch.tensor([0, num_shared, num_shared], device=device)
        qkv = random(len(lengths) * width, (heads + 2 * kv_heads) * size)
        angles = torch.arange(400)[:, None] * 1e4 ** -(torch.arange(size // 2) / (size // 2))
        cos, sin = (torch.cat((table, table), 1).to(device, dtype) for table in (angles.cos(), angles.sin()))
        positions = torch.tensor(lengths, device=device)[:, None] + torch.arange(width, device=device)
        parts = qkv.view(len(lengths), width, -1, size).transpose(1, 2).float()
        queries, new_keys, new_values = parts.split([heads, kv_heads, kv_heads], 1)
        right = torch.empty(len(lengths), width, heads, size, device=device)
        for row, length in enumerate(lengths):
            at = slice(length, length + width)
            turned, new = (_turned(each[row], cos[at], sin[at]) for each in (queries, new_keys))
            all_keys = torch.cat((keys[row, :, :length].float(), new.to(dtype).float()), 1)
            all_values = torch.cat((values[row, :, :length].float(), new_values[row]), 1)
            seen = torch.arange(length + width, device=device)
            mask = causal_mask(positions[row], seen, window, torch.float32)
            all_keys = all_keys.repeat_interleave(heads // kv_heads, 0)
            all_values = all_values.repeat_interleave(heads // kv_heads, 0)
            rounded = turned.to(dtype).float()
            attended = scaled_dot_product_attention(rounded, all_keys, all_values, mask, scale=size**-0.5)
            right[row] = attended.transpose(0, 1)
        before = (qkv, None, None, 0.0, False, cos, sin)
        after = (positions, prefix_reads, size**-0.5, window)
        attend = torch.ops.self_speculation.decode_attention
        found = attend(*before, keys, values, *after).view_as(right).float()
        largest = float(right.abs().max())
        return float((found - right).abs().max()) / (torch.finfo(dtype).eps * largest)

    @torch.inference_mode()
    def kernels_read(self) -> Found:
        """Microseconds of attention of a layer, and GB/s of keys and values, out of the card's memory."""
        runner = FusedRunner(self._model)
        if runner.why_no_kernels is not None:
            return {"none": runner.why_no_kernels}
        found = {}
        kv_heads, size = runner.key_shape
        heads = self._model.config.num_attention_heads
        like = runner.tables.like
        cases = [(1, 1, 1000, 0), (1, 8, 1000, 0), (8, 1, 1000, 0), (8, 8, 1000, 0), (1, 1, 8000, 0)]
        cases += [(8, 1, 1500, 0), (8, 1, 1500, 1472)]
        for rows, width, length, num_shared in cases:
            shape = (rows, kv_heads, length + width, size)
            bytes_of_pair = 2 * like.itemsize * rows * kv_heads * (length + width) * size
            random = partial(torch.randn, dtype=like.dtype, device=like.device)
            pairs = [(random(shape), random(shape)) for _ in range(-(-_ROTATED // bytes_of_pair))]
            qkv = random(rows * width, (heads + 2 * kv_heads) * size)
            cos, sin = runner.tables.cos_sin(runner.attention_types[0].rotation, length + width)
            positions = torch.arange(length, length + width, device=like.device).expand(rows, -1).contiguous()
            before = (qkv, None, None, 0.0, False, cos, sin)
            prefix_reads = torch.tensor([0, *[num_shared] * rows], device=like.device)
            after = (positions, prefix_reads, size**-0.5, None)
            attend = torch.ops.self_speculation.decode_attention
            seconds = self._replayed([partial(attend, *before, *pair, *after) for pair in pairs])
            position = bytes_of_pair / rows / (length + width)
            num_read = rows * (length + width - num_shared) + num_shared
            speed = position * num_read / seconds / 1e9
            of_which = f", {num_shared} shared" if num_shared else ""
            found[f"{rows} x {width} after {length}{of_which}"] = f"{1e6 * seconds:.1f} us, {speed:.0f} GB/s"
        return found

    @torch.inference_mode()
    def products(self) -> Found:
        """GB/s of weights by product: of a layer, all layers in turn, and of the head."""
        runner = FusedRunner(self._model)
        if runner.why_no_kernels is not None:
            return {"none": runner.why_no_kernels}
        found = {}
        names = ("queries, keys, values", "output", "gate and up", "down")
        kinds = {name: [layer.linears[i] for layer in runner.layers] for i, name in enumerate(names)}
        for name, products in {**kinds, "head": [runner.head.linear]}.items():
            for tokens in (1, 8):
                like = runner.tables.like
                x = torch.randn(tokens, products[0].in_features, dtype=like.dtype, device=like.device)
                seconds = self._replayed([partial(product, x) for product in products])
                speed = products[0].weight.nbytes / seconds / 1e9
                shape = " x ".join(map(str, products[0].weight.shape))
                found[f"{name}, {shape}, {tokens}"] = f"{1e6 * seconds:.1f} us, {speed:.0f} GB/s"
        return found

    def _replayed(self, calls: Sequence[Callable[[], object]]) -> float:
        """Seconds of a call, of all in one graph: the host takes longer for a call than the card."""

        def run() -> None:
            for call in calls:
                call()

        replay = GraphRecorder(self._model.device)(run)
        return self.seconds_of(partial(repeat, replay)) / (REPEATS * len(calls))

    def seconds_of(self, compute: Callable[[], object]) -> float:
        """The median of three, after one that counts not."""
        found = []
        for _ in range(4):
            self.synchronize()
            began = time.perf_counter()
            compute()
            self.synchronize()
            found.append(time.perf_counter() - began)
        return statistics.median(found[1:])

    def synchronize(self) -> None:
        """Wait for the card. Raises what it reports."""
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)


def repeat(compute: Callable[[], object]) -> None:
    for _ in range(REPEATS):
        compute()


def _turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[heads, T, size], rotated by the angles of the positions."""
    first, second = heads.chunk(2, -1)
    return heads * cos.float() + torch.cat((-second, first), -1) * sin.float()
