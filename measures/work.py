"""What a generation gives a device to do, by the profiler of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


class Work(NamedTuple):
    kernels: float  # on a GPU, those of replayed graphs too; on a CPU, operators
    reads: float  # copies to the host, each of which waits for the device


def work_per_token(device: torch.device, first: Callable[[], int], more: Callable[[], int]) -> Work | None:
    """The work of one decoded token; None where the driver lets nobody profile.

    Args:
        first, more: two answers to one prompt, the second of them longer; each returns its number of tokens.
            What they have in common, the pass over the prompt, does not count.
    """
    num_first, before = _profiled(device, first)
    num_more, after = _profiled(device, more)
    if not after.kernels or num_more == num_first:
        return None
    return Work(*((b - a) / (num_more - num_first) for a, b in zip(before, after, strict=True)))


def _profiled(device: torch.device, call: Callable[[], int]) -> tuple[int, Work]:
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        result = call()
        if on_gpu:
            torch.cuda.synchronize(device)
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    names = [e.name for e in profiler.events() if e.device_type == kind and not e.is_user_annotation]
    reads = sum(name.startswith(("Memcpy DtoH", "aten::_local_scalar_dense")) for name in names)
    return result, Work(sum(not name.startswith(("Memcpy", "Memset")) for name in names), reads)
