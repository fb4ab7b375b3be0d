"""Several processes under torchrun: who am I, and how results come together at rank 0."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


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
    dist.init_process_group("gloo")
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


def gather(thing: T) -> list[T]:
    """What every rank has, in the order of ranks, at rank 0; empty elsewhere."""
    if world_size() == 1:
        return [thing]
    things: list[Any] = [None] * world_size()
    dist.gather_object(thing, things if rank() == 0 else None, dst=0)
    return things if rank() == 0 else []
