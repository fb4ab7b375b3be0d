"""Ctrl-C while a script imports what it needs: one line, and no traceback.

A script imports this module first. In the middle of an import, libraries catch KeyboardInterrupt or turn it
into errors of their own, so the process ends at once. `runs.program` replaces this when the script begins.
"""

import os
import signal


def _end(*_: object) -> None:
    if int(os.environ.get("RANK", 0)) == 0:
        os.write(2, b"interrupted\n")
    os._exit(130)


signal.signal(signal.SIGINT, _end)
