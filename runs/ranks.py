"""The processes that torchrun starts: ranks, exchanges between them, and how they end.

Each has a copy of the model and does a share of the work.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")

PATIENCE = timedelta(days=7)  # ranks may finish hours apart; a rank that dies is noticed at once

# The last barrier holds tensors of earlier exchanges. Without this reference, a gloo thread could free them
# and wait for the interpreter's lock, which the main thread may hold while it waits for that thread.
_last_barrier: object = None


def num_processes() -> int:
    """The number of processes of torchrun, or 1."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """The number of this process."""
    return int(os.environ.get("RANK", 0))


def is_first() -> bool:
    """Whether this process prints."""
    return rank() == 0


@contextmanager
def process_group() -> Iterator[None]:
    """Join the other ranks, if there are any, to exchange small objects between CPUs.

    In this block SIGTERM raises KeyboardInterrupt, as Ctrl-C does: torchrun sends it when a rank is lost.
    """
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if num_processes() > 1:
            import torch.distributed as dist

            if not dist.is_initialized():
                dist.init_process_group("gloo", timeout=PATIENCE)
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def leave() -> None:
    """Destroy the process group, if there is one."""
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_initialized():
        dist.destroy_process_group()


def share(make: Callable[[], T]) -> T:
    """Call `make` at the first process and give the result to every process."""
    box = [make() if is_first() else None]
    if num_processes() > 1:
        import torch
        import torch.distributed as dist

        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]  # type: ignore[return-value]


def barrier() -> None:
    """Wait for the other processes."""
    global _last_barrier
    if num_processes() > 1:
        import torch.distributed as dist

        _last_barrier = work = dist.barrier(async_op=True)
        work.wait()
