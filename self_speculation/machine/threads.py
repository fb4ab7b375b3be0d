"""How many threads of a CPU compute: fewer while other programs hold the processors.

The threads of a pass wait for each other after every product. If one of them has no processor, all wait for
it, and a pass takes several times as long as with one thread less.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import psutil
import torch
from transformers import PreTrainedModel

from self_speculation.models.model_cache import kept


class _Reading(NamedTuple):
    """Seconds of a clock, and of the processors: all that is used, and what this process uses."""

    clock: float
    used: float
    by_this: float


class ThreadGovernor:
    """Between two rounds, sets torch's number of threads to the processors that other programs leave.

    The number is at most the one at the start. It falls at once, and rises after two quiet seconds.

    Args:
        on_fewer: called after the number has fallen.
    """

    _WINDOW = 0.2  # seconds between two readings; the system counts hundredths
    _TOLERATED = 0.4  # processors that other programs may use: one thread less costs about as much
    _QUIET = 2.0  # seconds

    def __init__(self, on_fewer: Callable[[ThreadGovernor], object] = lambda governor: None) -> None:
        self.most = self.num_threads = torch.get_num_threads()
        self.num_taken = 0.0  # processors that other programs used in the last window
        self._on_fewer = on_fewer
        self._crowded = -float("inf")  # when other programs left no more
        self._processors = _processors(self.most)
        self.num_processors = len(self._processors)
        self._last = self._read()

    def adjust(self) -> None:
        """Set the number of threads for the thread that calls this."""
        if self.most > 1 and time.perf_counter() - self._last.clock >= self._WINDOW:
            last = self._last
            self._last = self._read()
            clock, used, by_this = (now - before for now, before in zip(self._last, last, strict=True))
            self.num_taken = max(0.0, used - by_this) / clock
            self._choose(self._last.clock)
        if torch.get_num_threads() != self.num_threads:
            torch.set_num_threads(self.num_threads)

    def _choose(self, now: float) -> None:
        left = int(self.num_processors - self.num_taken + self._TOLERATED)
        left = max(1, min(left, self.most))
        if left <= self.num_threads:
            self._crowded = now
        if left < self.num_threads:
            self.num_threads = left
            self._on_fewer(self)
        elif left > self.num_threads and now - self._crowded >= self._QUIET:
            self.num_threads = left

    def _read(self) -> _Reading:
        times = psutil.cpu_times(percpu=True)
        # Programs of low priority give way, unless this one has it, too.
        counted = ["user", "system", "irq", "softirq", "steal", *(["nice"] if os.nice(0) > 0 else [])]
        used = sum(getattr(times[i], name, 0.0) for i in self._processors for name in counted)
        return _Reading(time.perf_counter(), used, time.process_time())


def _processors(num_threads: int) -> list[int]:
    """The processors of this process. A library that binds threads may have bound this one to a
    processor: then all of the machine.
    """
    every = range(psutil.cpu_count() or 1)
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else every
    return sorted(allowed if len(allowed) >= num_threads else every)


def govern_threads(model: PreTrainedModel, governor: ThreadGovernor | None) -> None:
    """Let a governor set torch's number of threads while this model decodes; None: leave it as it is.

    The whole process has one number of threads, so the library does this only for callers who ask for it.
    """
    kept(model)[ThreadGovernor] = governor


def most_threads(model: PreTrainedModel) -> int:
    """The number of threads that compute while other programs leave the processors alone."""
    governor = kept(model).get(ThreadGovernor)
    return torch.get_num_threads() if governor is None else governor.most


def adjust_threads(model: PreTrainedModel) -> None:
    """Adjust the number of threads, if the model has a governor."""
    if (governor := kept(model).get(ThreadGovernor)) is not None:
        governor.adjust()


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on the calling thread alone: threads of short products would wait for each other."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(number)
