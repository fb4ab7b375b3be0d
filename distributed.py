"""Several processes under torchrun: who am I, what does rank 0 say, are the others done?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")

PATIENCE = timedelta(days=7)  # ranks may finish hours apart; one that dies is noticed at once all the same


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def process_group() -> Iterator[None]:
    """Join the other ranks, if there are any. Only small objects are exchanged: over the CPU."""
    if world_size() == 1:
        yield
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    yield
    # Not in a `finally`: a rank that fails must end at once, so that torchrun ends the others.
    dist.destroy_process_group()


def share(thing: T) -> T:
    """What rank 0 has, at every rank."""
    if world_size() == 1:
        return thing
    box: list[Any] = [thing]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    """Wait for the other ranks."""
    if world_size() > 1:
        dist.barrier()
