"""Progress at a terminal, and lines about slow work."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import Timer

from tqdm import tqdm

from runs import ranks

_SILENCE = 1.0  # seconds before a line names the work
_SECONDS_WITHOUT_BAR = 2.0


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
    """Print a line to standard error at the first process. No work ends because nobody can read the line."""
    if ranks.is_first():
        with suppress(OSError):  # a full disk, a closed pipe
            print(line, file=sys.stderr, flush=True)
