"""Numbers between host and device. A read waits for all queued work of a GPU, so there are few reads."""

import time
from collections.abc import Sequence

import numpy
import torch
from torch import Tensor


def on_device(
    numbers: Sequence[float] | numpy.ndarray, device: torch.device, dtype: torch.dtype = torch.long
) -> Tensor:
    """[n], without waiting for the GPU."""
    return _pinned(numbers, device, dtype).to(device, non_blocking=True)


@torch.inference_mode()
def overwrite(target: Tensor, numbers: Sequence[float]) -> None:
    """Write all numbers of a contiguous tensor, without waiting for the GPU."""
    target.view(-1).copy_(_pinned(numbers, target.device, target.dtype), non_blocking=True)


def _pinned(numbers: Sequence[float] | numpy.ndarray, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[n] on the host, in memory that a GPU copies from while the host goes on."""
    there = torch.tensor(numbers, dtype=dtype)  # a copy, since numpy's memory cannot be pinned
    return there.pin_memory() if device.type == "cuda" else there


class AsyncRead:
    """Reads several tensors at once, as float32. It holds ids below 2^24 exactly.

    A GPU copies them when the queue reaches the copy. More work may be queued before `wait`.
    """

    def __init__(self, numbers: Sequence[Tensor]) -> None:
        self._sizes = [part.numel() for part in numbers]
        parts = [part.flatten().float() for part in numbers]
        # The GPU copies a single part before work that is queued later overwrites it.
        is_copied = len(parts) == 1 and parts[0].device.type == "cuda"
        values = parts[0] if is_copied else torch.cat(parts)
        self._values = values
        self._numbers: list[list[float]] | None = None
        if values.device.type == "cuda":
            on_host = torch.empty(values.shape, dtype=torch.float32, pin_memory=True)
            self._values = on_host.copy_(values, non_blocking=True)
        self._copied = _event(values.device)

    def wait(self) -> list[list[float]]:
        """The numbers of each tensor."""
        if self._numbers is None:
            if self._copied is not None:
                self._copied.synchronize()
            self._numbers = [part.tolist() for part in self._values.split(self._sizes)]
        return self._numbers


class Stopwatch:
    """Two consecutive intervals. A GPU may still be busy with the first when `split` marks the end of it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began = time.perf_counter()
        self._start = _event(device, enable_timing=True)

    def split(self) -> None:
        """End the first interval after the work that the GPU has so far."""
        self._split_at = time.perf_counter()
        self._split = _event(self._device, enable_timing=True)

    def stop(self) -> tuple[float, float]:
        """Seconds of both. Call it after a read, when the GPU is done."""
        total = time.perf_counter() - self._began
        first = self._split_at - self._began
        if self._start and self._split:
            first = self._start.elapsed_time(self._split) / 1000
        return first, max(0.0, total - first)


def _event(device: torch.device, enable_timing: bool = False) -> torch.cuda.Event | None:
    """An event on the stream of this device; None: it is no GPU of CUDA. The default is the stream of the
    current GPU, which may be another.
    """
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=enable_timing)
    event.record(torch.cuda.current_stream(device))
    return event
