"""Numbers between host and device. A read waits for all that a GPU was given to do, so there are few."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import torch
from torch import Tensor


def on_device(numbers: Sequence[float], device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    """[n]; nobody waits for what a GPU still has to do."""
    there = torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")
    return there.to(device, non_blocking=True)


class Reading:
    """One read: all of these numbers, ids among them; fp32 holds ids below 2^24 exactly.

    A GPU copies them when it comes to it, and can be given more to do before anybody waits for them.
    """

    def __init__(self, numbers: Sequence[Tensor]) -> None:
        self._values = values = torch.cat([part.flatten().float() for part in numbers])
        self._numbers: list[float] | None = None
        self._copied: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            on_host = torch.empty(values.shape, dtype=torch.float32, pin_memory=True)
            self._values = on_host.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            # By itself it would take the stream of the current GPU, which need not be the one that copies.
            self._copied.record(torch.cuda.current_stream(values.device))

    def wait(self) -> list[float]:
        """The numbers; the second time nothing is waited for."""
        if self._numbers is None:
            if self._copied is not None:
                self._copied.synchronize()
            self._numbers = self._values.tolist()
        return self._numbers


def read(numbers: Sequence[Tensor]) -> list[list[float]]:
    """The numbers of each tensor, by one read."""
    values = iter(Reading(numbers).wait())
    return [list(itertools.islice(values, part.numel())) for part in numbers]


class Stopwatch:
    """Two intervals on end, of which the first may still be going on at a GPU when it is marked."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began = time.perf_counter()
        self._start = self._event()
        self._split: float | torch.cuda.Event | None = None

    def split(self) -> None:
        """The first interval ends, once all is done that the GPU was given so far. Nobody waits for it."""
        self._split = self._event() or time.perf_counter()

    def stop(self) -> tuple[float, float]:
        """Seconds of both. To be called after a read: what the GPU was given is done."""
        total, first = time.perf_counter() - self._began, 0.0
        if isinstance(self._split, float):
            first = self._split - self._began
        elif self._split is not None and self._start is not None:
            first = self._start.elapsed_time(self._split) / 1000
        return first, max(0.0, total - first)

    def _event(self) -> torch.cuda.Event | None:
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event
