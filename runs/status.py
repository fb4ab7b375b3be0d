"""Progress at a terminal, and lines about slow work."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Timer
from typing import TYPE_CHECKING

from tqdm import tqdm

from runs import ranks

if TYPE_CHECKING:  # it imports torch
    from self_speculation.threads import ThreadGovernor

_SILENCE = 1.0  # seconds before a line names the work
_SECONDS_WITHOUT_BAR = 2.0
_held: list[str] | None = None  # lines that wait for the end of an answer


@contextmanager
def log_if_slow(what: str) -> Iterator[None]:
    """Print at the first process what is being done, if it takes longer than a second, and then how long it
    took.
    """
    began = time.perf_counter()
    timer = Timer(_SILENCE, print_status, [f"{what} ..."])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if (seconds := time.perf_counter() - began) > _SILENCE:
        print_status(f"{what} took {seconds:.0f} s")


@contextmanager
def work_bar(what: str, size: int, unit: str) -> Iterator[Callable[[int], object]]:
    """Show a progress bar at a terminal; the caller reports work as it is done."""
    seconds, hidden = _SECONDS_WITHOUT_BAR, None if ranks.is_first() else True  # None: unless at a terminal
    options = {"unit": unit, "unit_scale": True, "leave": False}
    with tqdm(total=size, desc=what, delay=seconds, disable=hidden, **options) as bar:
        yield bar.update


def print_status(line: str) -> None:
    """Print a line to standard error at the first process."""
    if _held is not None:
        _held.append(line)
    elif ranks.is_first():
        print(line, file=sys.stderr, flush=True)


@contextmanager
def status_held(is_held: bool) -> Iterator[None]:
    """If `is_held`, print status lines after this block, in which an answer grows on the same terminal."""
    global _held
    _held = [] if is_held else None
    try:
        yield
    finally:
        lines, _held = _held or [], None
        for line in lines:
            print_status(line)


class FewerThreads:
    """Says once that other programs use processors, and what follows; given to a `ThreadGovernor`."""

    def __init__(self) -> None:
        self._is_said = False

    def __call__(self, governor: ThreadGovernor) -> None:
        if not self._is_said:
            self._is_said = True
            used = f"other programs use {governor.others:.1f} of {governor.num_processors} processors"
            threads = f"{governor.num_threads} of {governor.most} threads"
            print_status(f"{used}: decoding is slower, with {threads} while they do")
