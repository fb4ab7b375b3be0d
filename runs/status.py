"""Progress at a terminal, and lines about slow work."""

import json
import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from threading import Timer

from tqdm import tqdm

from runs import ranks

_SILENCE = 1.0  # seconds before a line names the work
_SECONDS_WITHOUT_BAR = 2.0
_is_json = False


@contextmanager
def log_if_slow(what: str) -> Iterator[None]:
    """Print the name of work that takes longer than a second, and at the end how long it took. Only the first
    process prints.
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
    hidden = None if ranks.is_first() else True  # None: unless at a terminal
    options = {"unit": unit, "unit_scale": True, "leave": False}
    with tqdm(total=size, desc=what, delay=_SECONDS_WITHOUT_BAR, disable=hidden, **options) as bar:
        yield bar.update


def print_status(line: str, **fields: object) -> None:
    """Print a line to standard error at the first process. No work ends because nobody can read the line.

    Args:
        fields: of the line's object, after `log_as_json`.
    """
    if _is_json:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, "message": line.strip(), **fields})
    if ranks.is_first():
        with suppress(OSError):  # a full disk, a closed pipe
            print(line, file=sys.stderr, flush=True)


def log_as_json() -> None:
    """From now on lines are JSON objects, also lines of Python's logging and warnings."""
    global _is_json
    _is_json = True
    logging.basicConfig(handlers=[_JSONHandler(logging.WARNING)], force=True)
    logging.captureWarnings(True)


class _JSONHandler(logging.Handler):
    """Prints records of Python's logging as objects. No work ends because of a mistaken call, whose arguments
    do not fit its text: a line names the place.
    """

    def emit(self, record: logging.LogRecord) -> None:
        fields = {"level": record.levelname.lower()}
        try:
            message = record.getMessage()
            if record.exc_info:
                fields["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        except Exception:
            message = f"a mistaken log call at {record.pathname}:{record.lineno}"
            fields["traceback"] = traceback.format_exc()
        print_status(message, **fields)
