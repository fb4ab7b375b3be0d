"""Lost ranks and devices, free memory, arithmetic of a device."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import psutil
import torch
import torch.distributed as dist

# Whether products of bfloat16 could be summed in fewer bits when each thread began.
_LOCK, _WAS_ON = Lock(), list[bool]()


def is_lost_rank(error: BaseException) -> bool:
    """Whether a rank raised this because another one is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def is_lost_device(error: object) -> bool:
    """Whether this process cannot use the GPU any more: every later call fails as well."""
    return isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError)


def free_memory(device: torch.device) -> int:
    """Bytes that torch can still allocate on a device."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return psutil.virtual_memory().available


@contextmanager
def own_arithmetic(device: torch.device) -> Iterator[None]:
    """Disable the caller's autocast; GPUs sum products of bfloat16 in float32 while any thread is in here."""
    matmul = torch.backends.cuda.matmul
    with torch.autocast(device.type, enabled=False):
        with _LOCK:
            _WAS_ON.append(matmul.allow_bf16_reduced_precision_reduction)
            matmul.allow_bf16_reduced_precision_reduction = False
        try:
            yield
        finally:
            with _LOCK:  # the first thread found the caller's, the others found it off
                matmul.allow_bf16_reduced_precision_reduction = _WAS_ON.pop()


def round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def padded(number: int) -> int:
    """The least power of two that is not below the number."""
    return 1 << (number - 1).bit_length()
