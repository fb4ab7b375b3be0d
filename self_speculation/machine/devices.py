"""Lost ranks and devices, free memory, powers of two."""

import math
import resource

import psutil
import torch
import torch.distributed as dist

# Bytes of addresses that keys and values leave to libraries which abort where they get no memory.
RESERVED_ADDRESSES = 2**27

_DRIVERS = {12: "525", 13: "580"}  # the oldest ones, by CUDA's version


def is_lost_rank(error: BaseException) -> bool:
    """Whether a rank raised this because another one is gone."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def is_lost_device(error: object) -> bool:
    """Whether this process cannot use the GPU any more: every later call fails as well."""
    return isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError)


def why_no_gpu() -> str:
    """Why torch sees no GPU of NVIDIA, as far as this process can tell."""
    built_for = torch.version.cuda
    if built_for is None:
        return f"torch {torch.__version__} is built without CUDA"
    major = int(built_for.partition(".")[0])
    driver = _DRIVERS.get(major, f"of CUDA {major}")
    return f"torch {torch.__version__} is built for CUDA {built_for}, which needs driver {driver} or newer"


def free_memory(device: torch.device) -> int:
    """Bytes that torch can still allocate on a device."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return psutil.virtual_memory().available


def free_addresses() -> float:
    """Bytes of addresses that the process may still take; infinite without `ulimit -v`."""
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    return math.inf if most == resource.RLIM_INFINITY else most - psutil.Process().memory_info().vms


def round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def padded(number: int) -> int:
    """The least power of two that is not below the number."""
    return 1 << (number - 1).bit_length()
