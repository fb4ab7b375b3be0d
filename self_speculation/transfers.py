"""Numbers between host and device. A read waits for all that a GPU was given to do, so there are few."""

from __future__ import annotations

import itertools
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
