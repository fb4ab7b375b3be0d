"""Ctrl-C while a script imports what it needs: one line, and no traceback.

A script imports this module first. In the middle of an import, libraries catch KeyboardInterrupt or turn it
into errors of their own, so the process ends at once. Once the script has begun, `runs.program` asks for a
KeyboardInterrupt outside imports.
"""

from __future__ import annotations

import os
import signal
from types import FrameType


def end(*_: object) -> None:
    """Say "interrupted" at the first process, and end this one."""
    if int(os.environ.get("RANK", 0)) == 0:
        os.write(2, b"interrupted\n")
    os._exit(130)


def end_or_raise(_: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt; in the middle of an import, end the process."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            end()
        frame = frame.f_back
    raise KeyboardInterrupt


signal.signal(signal.SIGINT, end)
