"""Several processes under torchrun: which one this is, what rank 0 tells the others, waiting for each other.

With --parallel data, each process has a copy of the model and does a share of the work. With --parallel
tensor, each holds a part of one model, and all do the same work in step: `rank` is then 0 and `world_size` 1
in every process, so that each does all of the work, and only the first process shows and writes anything.
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

import arguments

if TYPE_CHECKING:  # torch is imported where ranks exchange something: flags are read before
    import torch.distributed as dist

T = TypeVar("T")

PATIENCE = timedelta(days=7)  # ranks may finish hours apart; one that dies is noticed at once anyway

_one_model_together = False
# Kept, because it holds tensors of earlier exchanges. If a thread of gloo were the last to hold it, that
# thread would free them, for which it needs the interpreter's lock. The main thread may have this lock while
# it destroys the process group, and waits for the thread: for ever.
_last_barrier: dist.Work | None = None


def num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first() -> bool:
    """Whether this is the process that shows and writes."""
    return int(os.environ.get("RANK", 0)) == 0


def rank() -> int:
    """Which copy of the model this process has."""
    return 0 if _one_model_together else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many copies of the model there are."""
    return 1 if _one_model_together else num_processes()


def alone() -> str:
    """What follows a figure that is of this process, where others work beside it."""
    return f" by rank {rank()} alone" if world_size() > 1 else ""


def join_as_one() -> None:
    """Join the other processes to hold one model together, and silence all but the first."""
    import torch
    import torch.distributed as dist

    global _one_model_together
    _one_model_together = True
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    if is_first():
        return
    errors = arguments.errors = sys.stderr

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not is_lost(error):
            traceback.print_exception(kind, error, trace, file=errors)

    sys.excepthook = show
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process gets Ctrl-C and tells the others


def place_to_write(resume: str | None, output_dir: str) -> tuple[str | None, str]:
    """`--resume` and `--output_dir` for this process; a temporary folder for one that is silenced."""
    if is_first() or not _one_model_together:
        return resume, output_dir
    own = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return resume and shutil.copytree(Path(resume).expanduser(), Path(own, "resumed")).as_posix(), own


@contextmanager
def process_group() -> Iterator[None]:
    """Join the other ranks, if there are any. Only small objects are exchanged, so over the CPU.

    Meanwhile SIGTERM raises KeyboardInterrupt, as Ctrl-C does: torchrun sends it when another rank is lost.
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
    # Not in the `finally`: a rank that fails must end at once, so that torchrun ends the others.
    leave()


def leave() -> None:
    """Leave the group of ranks, if there is one."""
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_initialized():
        dist.destroy_process_group()


def is_lost(error: BaseException) -> bool:
    """Whether a process that waited for another one learnt so that it is gone."""
    from self_speculation.model.devices import is_lost_rank

    return is_lost_rank(error)


class AnotherRankFailed(Exception):
    """Another rank has raised an error. That rank says why, and ends the program."""


def together(make: Callable[[], T]) -> T:
    """What `make` returns at this rank, once all ranks have called it. No rank is left waiting for one that
    fails here.

    Raises:
        Exception: what `make` raises at this rank.
        AnotherRankFailed: `make` raises something at another rank, and not at this one.
    """
    if world_size() == 1:
        return make()
    import torch.distributed as dist

    made, failure = list[T](), None
    try:
        made.append(make())
    except Exception as error:
        failure = error
    has_failed = [False] * world_size()
    dist.all_gather_object(has_failed, failure is not None)
    if failure is not None:
        raise failure
    if any(has_failed):
        raise AnotherRankFailed
    return made[0]


def first_of_machine_first(make: Callable[[], T]) -> T:
    """As `together`, but the first rank of each machine calls `make` before the others do, which find what it
    has cached.
    """
    if world_size() == 1:
        return make()
    is_first_of_machine = os.environ["LOCAL_RANK"] == "0"
    made = together(lambda: [make()] if is_first_of_machine else [])
    return together(lambda: made[0] if is_first_of_machine else make())


def share(make: Callable[[], T]) -> T:
    """Give every rank what `make` returns at rank 0, which alone calls it; raises as `together`."""
    made = together(lambda: [make()] if rank() == 0 else [])
    if world_size() > 1:
        import torch.distributed as dist

        made = made or [None]  # type: ignore[list-item]
        dist.broadcast_object_list(made, src=0)
    return made[0]


def let_the_failed_end_first() -> None:
    """Wait until a rank that has failed is gone: torchrun ends all ranks as soon as one of them is, and that
    one has yet to say why it failed.
    """
    try:
        barrier()
    except RuntimeError as error:
        if not is_lost(error):
            raise


def barrier() -> None:
    """Wait for the other ranks."""
    global _last_barrier
    if world_size() > 1:
        import torch.distributed as dist

        _last_barrier = dist.barrier(async_op=True)
        _last_barrier.wait()
