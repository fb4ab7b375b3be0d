"""What a generation gives a device to do, by torch.profiler."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from measures.sides import Generate
from self_speculation.model.decoder import synchronize


@dataclass(frozen=True)
class Work:
    """For one decoded token."""

    kernels: float  # on a GPU, those in replayed graphs too; on a CPU, operators that Python called
    reads: float  # copies to the host, each of which waits for the device


def work_per_token(model: PreTrainedModel, generate: Generate, prompt: list[int], num_tokens: int) -> Work:
    """Of the tokens after the first one, which comes with the pass over the prompt."""
    num_prefilled, kernels, reads = _counted(model, lambda: len(generate(prompt, 1).ids))
    num_all, all_kernels, all_reads = _counted(model, lambda: len(generate(prompt, num_tokens).ids))
    decoded = num_all - num_prefilled
    return Work((all_kernels - kernels) / decoded, (all_reads - reads) / decoded)


def _counted(model: PreTrainedModel, call: Callable[[], int]) -> tuple[int, int, int]:
    """What a call returns, and the kernels and the reads that it took."""
    if model.device.type == "cuda":
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            result = call()
            synchronize(model)
        names = [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]
        reads = sum(name.startswith("Memcpy DtoH") for name in names)
        return result, sum(not name.startswith(("Memcpy", "Memset")) for name in names), reads
    to_host = 0

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        def read(*args: Any, **kwargs: Any) -> Any:
            nonlocal to_host
            to_host += 1
            return method(*args, **kwargs)

        return read

    with ExitStack() as stack:
        for name in ("tolist", "numpy", "cpu"):  # on a CPU these are no operators
            stack.enter_context(patch.object(torch.Tensor, name, watched(getattr(torch.Tensor, name))))
        profiler = stack.enter_context(profile(activities=[ProfilerActivity.CPU]))
        result = call()
    operators = [event for event in profiler.events() if event.name.startswith("aten::")]
    called = [e for e in operators if not (e.cpu_parent and e.cpu_parent.name.startswith("aten::"))]
    to_host += sum(event.name == "aten::_local_scalar_dense" for event in operators)
    return result, len(called), to_host
