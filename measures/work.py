"""What a generation gives a device to do: kernels, by the profiler, or on a CPU operators, as dispatched."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from measures.sides import Generate
from self_speculation.model.compiled import is_compiled
from self_speculation.model.devices import synchronize

_READING = (torch.ops.aten.item, torch.ops.aten.is_nonzero, torch.ops.aten._local_scalar_dense)


@dataclass(frozen=True)
class Work:
    """For one decoded token."""

    kernels: float  # on a GPU, those in replayed graphs too; on a CPU, operators that are no views
    reads: float  # copies to the host, each of which waits for the device


def work_per_token(
    model: PreTrainedModel, generate: Generate, prompt: list[int], num_tokens: int
) -> Work | None:
    """Of the tokens after the first one, which comes with the pass over the prompt.

    None where nothing can be seen: on a CPU of compiled passes, whose operators are not dispatched, and on a
    GPU whose driver lets nobody profile.
    """
    if model.device.type == "cpu" and is_compiled(model):
        return None
    num_prefilled, kernels, reads = _counted(model, lambda: len(generate(prompt, 1).ids))
    num_all, all_kernels, all_reads = _counted(model, lambda: len(generate(prompt, num_tokens).ids))
    if not all_kernels:
        return None
    decoded = num_all - num_prefilled
    return Work((all_kernels - kernels) / decoded, (all_reads - reads) / decoded)


def _counted(model: PreTrainedModel, call: Callable[[], int]) -> tuple[int, int, int]:
    """What a call returns, and the kernels and the reads that it took."""
    if model.device.type == "cuda":
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            result = call()
            synchronize(model)
        names = [
            event.name
            for event in profiler.events()
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation
        ]
        reads = sum(name.startswith("Memcpy DtoH") for name in names)
        return result, sum(not name.startswith(("Memcpy", "Memset")) for name in names), reads
    counting = _Operators()

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        def read(*args: Any, **kwargs: Any) -> Any:
            counting.reads += 1
            return method(*args, **kwargs)

        return read

    with ExitStack() as stack:
        for name in ("tolist", "numpy", "cpu"):  # on a CPU these are no operators
            stack.enter_context(patch.object(torch.Tensor, name, watched(getattr(torch.Tensor, name))))
        stack.enter_context(counting)
        result = call()
    return result, counting.computing, counting.reads


class _Operators(TorchDispatchMode):
    """Counts operators that compute something, and those that take numbers out of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.computing = self.reads = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.computing += not function.is_view
        self.reads += function.overloadpacket in _READING
        return function(*args, **(kwargs or {}))
