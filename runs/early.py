"""Ctrl-C in imports: one line, and no traceback. A script imports this module first."""

from __future__ import annotations

import os
import signal
from types import FrameType


def end_or_raise(_: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt in what `runs.program` runs. Before, and in the middle of an import, where
    libraries catch it or turn it into errors of their own, say "interrupted" at the first process and end.
    """
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        if frame.f_globals.get("__name__") == "runs.program":
            raise KeyboardInterrupt
        frame = frame.f_back
    if int(os.environ.get("RANK", 0)) == 0:
        os.write(2, b"interrupted\n")
    os._exit(130)


signal.signal(signal.SIGINT, end_or_raise)
