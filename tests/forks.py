"""Scripts as processes, forked from one that has imported everything: an import takes seconds.

Forking is safe since that process has no threads: numerical libraries start theirs with their first kernel.
Tests of imports, and of variables that are read during imports such as HF_HOME, use `subprocess` instead.
"""

import atexit
import contextlib
import fcntl
import functools
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import time
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).parent.parent
PATHS = [ROOT, ROOT / "tests", ROOT / "tests/scripts"]
HANGS = 300.0  # seconds after which a script is ended and the test fails; no verdict on speed

# Modules that scripts import before and after they parse flags.
HEAVY = [
    "transformers.models.llama.modeling_llama", "transformers.trainer", "matplotlib.pyplot",
    "prompt_toolkit", "starlette.applications", "uvicorn", "prometheus_client",
]  # fmt: skip
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(HEAVY)


class Fork:
    """A running script. Streams are file descriptors; `terminal`: stdin's Ctrl-C reaches the script."""

    def __init__(self, script, *args, stdin=None, stdout=None, stderr=None, env=None, terminal=False):
        args = [str(script), *map(str, args)]
        with open(os.devnull, "r+b") as null:
            numbers = [null.fileno() if stream is None else stream for stream in (stdin, stdout, stderr)]
            streams = [Connection(os.dup(number)) for number in numbers]  # the server takes the copies
        job = (args, os.getcwd(), {**os.environ, **(env or {})}, terminal, streams)
        self._process = SERVER.Process(target=become, args=job)
        self._process.start()
        for stream in streams:
            stream.close()
        self.pid = self._process.pid

    def poll(self):
        """The exit status, or None."""
        return self._process.exitcode

    def wait(self):
        """The exit status."""
        self._process.join(HANGS)
        assert self.poll() is not None, "it hangs"
        return self.poll()

    def send_signal(self, number):
        with contextlib.suppress(ProcessLookupError):
            if self.poll() is None:
                os.kill(self.pid, number)

    def end(self):
        self.send_signal(signal.SIGKILL)
        self.wait()


def run_ranks(ranks, script, *args, env=None):
    """As `torchrun --nproc_per_node RANKS`; a `CompletedProcess` with the output of all ranks together.

    When a rank fails, the rest get SIGTERM, and the status of the failed rank counts.
    """
    with contextlib.ExitStack() as stack:
        stdout, stderr = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(2))
        started = []
        for variables in environments(ranks):
            rank_env = {**variables, **(env or {})}
            started.append(Fork(script, *args, stdout=stdout.fileno(), stderr=stderr.fileno(), env=rank_env))
            stack.callback(started[-1].end)
        status = wait_for_all(started)
        done = subprocess.CompletedProcess([script, *args], status, read(stdout), read(stderr))
        print(done.stderr)  # a test that fails shows it
        return done


run = functools.partial(run_ranks, 1)


def environments(ranks):
    """torchrun's variables for each rank; none for a single process."""
    if ranks == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    shared |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(ranks))
    return [shared | dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)) for rank in range(ranks)]


def wait_for_all(processes):
    """The first status that is not 0, or 0."""
    until = time.monotonic() + HANGS
    while any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            break
        assert time.monotonic() < until, "they hang"
        time.sleep(0.005)
    failed = [status for process in processes if (status := process.poll())]
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        process.wait()
    return failed[0] if failed else 0


def read(stream):
    stream.seek(0)
    return stream.read().decode(errors="surrogateescape")


def become(args, cwd, environment, terminal, streams):
    """Run the script in this process, to the end."""
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream.fileno(), number)
        stream.close()
    if terminal:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests may run under nohup, which ignores it
    sys.argv = args
    sys.path.insert(0, os.path.dirname(os.path.abspath(args[0])))
    try:
        runpy.run_path(args[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves out exit functions
