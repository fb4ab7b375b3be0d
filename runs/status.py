"""What scripts say while they work: progress bars, and a line where something takes its time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partialmethod
from threading import Timer
from typing import Any

from tqdm import tqdm

from runs import ranks

_SILENCE = 1.0  # seconds after which a line says what is being done
_SECONDS_BETWEEN_LINES = 10.0
# The share of its threads that a program has on a quiet machine at least, and the seconds that tell it.
_QUIET, _TOO_SHORT_TO_TELL = 0.75, 1.0
_SECONDS_WITHOUT_BAR = 2.0


@contextmanager
def says_if_slow(what: str) -> Iterator[None]:
    """Say at the first process what is being done, if it is not done by then."""
    timer = Timer(_SILENCE, lambda: print(f"{what} ...", file=sys.stderr, flush=True))
    timer.daemon = True
    if ranks.is_first():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def busy_processor(model: Any, processor_seconds: float, seconds: float) -> str | None:
    """What to say where other programs held the processor while a model decoded; None where none did.

    Threads that decode wait for each other without sleeping, so on a quiet machine all are busy all the time:
    the share is .95 there, and .6 and .5 of two threads beside one and two busy programs.
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


@contextmanager
def work_bar(what: str, size: int, unit: str) -> Iterator[Callable[[int], object]]:
    """A progress bar at a terminal: call it with what is done since the last call."""
    with tqdm(
        total=size,
        desc=what,
        unit=unit,
        unit_scale=True,
        leave=False,
        delay=_SECONDS_WITHOUT_BAR,
        disable=not (sys.stderr.isatty() and ranks.is_first()),
    ) as bar:
        yield bar.update


def bars_fit_the_output() -> None:
    """Where standard error is no terminal, let progress bars write a line now and then.

    Bars draw over themselves by carriage returns, which a file keeps, all in one line. All bars are meant,
    those of libraries too; hence the change in tqdm itself.
    """
    if not sys.stderr.isatty():
        tqdm.__init__ = partialmethod(tqdm.__init__, file=_Lines(), mininterval=_SECONDS_BETWEEN_LINES)


class _Lines:
    """Where a bar draws itself: what is left without control characters is a line on standard error."""

    encoding = "utf-8"

    def write(self, text: str) -> None:
        if text := text.replace("\x1b[A", "").strip():
            print(text, file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Each line is flushed as it is written."""
