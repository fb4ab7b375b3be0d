"""Start a server as a process, and end it with a `with` block."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryFile

from arguments import refuse
from runs import ranks

SERVE = [sys.executable, str(Path(__file__).parent.parent / "serve.py")]

_STARTS = 600  # seconds to start
_ENDS = 60  # seconds to end


@contextlib.contextmanager
def started(name: str, command: Sequence[str]) -> Iterator[str]:
    """The address of a ready server. If it does not start, end the program with the server's last line.

    Args:
        command: takes --host and --port as well, and answers GET /health when it is ready.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with ranks.process_group(), TemporaryFile("w+", errors="replace") as log:  # SIGTERM ends it, too
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        try:
            deadline = time.monotonic() + _STARTS
            while not _is_ready(address):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    refuse(f"{name} does not start: {log.read().strip().rpartition(chr(10))[2]}", status=1)
                time.sleep(0.2)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(_ENDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=10):
            return True
    except OSError:
        return False
