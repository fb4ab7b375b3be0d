"""Progress at a terminal, and lines about slow work."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Timer
from typing import Any

from tqdm import tqdm

from runs import ranks

_SILENCE = 1.0  # seconds before a line names the work
_SECONDS_WITHOUT_BAR = 2.0
# A program has at least this share of its threads on a quiet machine; shorter times do not tell.
_QUIET, _TOO_SHORT_TO_TELL = 0.75, 1.0


@contextmanager
def says_if_slow(what: str) -> Iterator[None]:
    """Print at the first process what is being done, if it takes longer than a second."""
    timer = Timer(_SILENCE, lambda: print(f"{what} ...", file=sys.stderr, flush=True))
    timer.daemon = True
    if ranks.is_first():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def work_bar(what: str, size: int, unit: str) -> Iterator[Callable[[int], object]]:
    """Show a progress bar at a terminal; the caller reports work as it is done."""
    seconds, hidden = _SECONDS_WITHOUT_BAR, None if ranks.is_first() else True  # None: unless at a terminal
    options = {"unit": unit, "unit_scale": True, "leave": False}
    with tqdm(total=size, desc=what, delay=seconds, disable=hidden, **options) as bar:
        yield bar.update


def busy_processor(model: Any, processor_seconds: float, seconds: float) -> str | None:
    """A remark if other programs held the processor while a model decoded, or None.

    Decoding threads spin while they wait for each other: their share is .95 on a quiet machine, and .6 and .5
    of two threads beside one and two busy programs.
    """
    import torch

    threads = torch.get_num_threads()
    share = processor_seconds / seconds / threads
    if model.device.type != "cpu" or seconds < _TOO_SHORT_TO_TELL or share >= _QUIET:
        return None
    return (
        f"other programs held the processor: this one had {share * threads:.1f} of {threads} threads, "
        "and may decode several times faster on a quiet machine"
    )
