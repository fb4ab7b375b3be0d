"""One model on several devices, or held by several processes together."""

from __future__ import annotations

from typing import TypeVar

import psutil
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

T = TypeVar("T")


def num_ranks(model: PreTrainedModel) -> int:
    """Processes that hold this model together."""
    return model.tp_size or 1


def broadcast_from_rank0(model: PreTrainedModel, value: T) -> T:
    """The first rank's value, on all ranks that hold this model. Clocks and input differ between ranks, and a
    rank that decides otherwise leaves the others waiting.
    """
    if num_ranks(model) == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def ends_ranks(model: PreTrainedModel, error: Exception) -> bool:
    """Whether other ranks wait in a pass that failed here, such as for want of memory: this process must end.
    All other errors follow from the request, and all ranks have them.
    """
    return isinstance(error, RuntimeError) and num_ranks(model) > 1


def is_lost_rank(error: BaseException) -> bool:
    """Whether a rank raised this because another one is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def is_lost_device(error: object) -> bool:
    """Whether this process cannot use the GPU any more: every later call fails as well."""
    return isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError)


def free_memory(device: torch.device, num_ranks: int = 1) -> int:
    """Bytes that torch can still allocate on a device; the least of several ranks that call it together: one
    that refuses for want of memory would leave the others waiting.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + cached
    else:
        free = psutil.virtual_memory().available
    if num_ranks == 1:
        return free
    least = torch.tensor(free)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)


def round_up(number: int, step: int) -> int:
    return -(-number // step) * step
