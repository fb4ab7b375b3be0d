"""What scripts say while they work: progress bars, and a line where something takes its time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod
from threading import Timer

from tqdm import tqdm

from runs import ranks

_SILENCE = 1.0  # seconds after which a line says what is being done
_SECONDS_BETWEEN_LINES = 10.0


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
