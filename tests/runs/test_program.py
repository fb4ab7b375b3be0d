"""How a script begins, tells what it does, and ends."""

import os
import subprocess
import sys
from unittest.mock import Mock

import forks
import pytest
import torch
from conftest import ROOT

from arguments import GenerationConfig, ModelArguments
from runs.program import run
from runs.startup import load_generator, set_threads, tell_of_fewer_threads
from self_speculation.machine.threads import ThreadGovernor, most_threads
from self_speculation.models.model_cache import kept

# The main thread waits in C, as for a lock; the last thread never gives the interpreter away once it begins.
STUCK = """
import os, re, signal, sys, threading
from runs.program import on_signals

def act(count):
    print(count, flush=True)
    if count == 2:
        re.match("(a|aa)+$", "a" * 60 + "b")

on_signals(act, 1.0)
lock = threading.Lock()
lock.acquire()
threading.Thread(target=lock.acquire).start()
os.kill(os.getpid(), signal.SIGTERM)
os.kill(os.getpid(), signal.SIGINT)
lock.acquire()
"""


def test_a_process_that_hangs_ends():
    """Guards against handlers, or a watch, that wait for the main thread or the interpreter."""
    command = [sys.executable, "-c", STUCK]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=forks.HANGS)
    assert (ended.returncode, ended.stdout, "in act" in ended.stderr) == (1, "1\n2\n", True)


# No memory for the first call of a thread looks so. Python then waits in `start` for ever.
NO_THREAD = """
import _thread, threading
from runs.program import run

def begin():
    raise MemoryError

def main():
    begun = threading.Event()
    _thread.start_new_thread(begin, ())
    begun.wait()

run(main)
"""


def test_a_thread_that_has_no_memory_to_begin():
    """Guards against a server under `ulimit -v` that waits for ever and answers nobody."""
    command = [sys.executable, "-c", NO_THREAD]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=forks.HANGS)
    assert (ended.returncode, ended.stderr) == (1, "error: out of memory: a thread cannot start\n")


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_an_output_that_is_closed(name, monkeypatch, capsys):
    """As `generate.py >&-` and `2>&-`. Guards against a traceback of what asks whether it is a terminal, and
    status lines in the answer.
    """
    monkeypatch.setattr(f"sys.{name}", None)
    with pytest.raises(SystemExit, match="0"):
        run(lambda: print("a line", file=getattr(sys, name)) or 0)
    assert capsys.readouterr().out == ""


def test_ctrl_c_during_imports(tmp_path):
    """Guards against a traceback in the first seconds, and a library that turns Ctrl-C into an error."""
    (tmp_path / "torch.py").write_text(
        "import os, signal, time\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    raise ImportError('half of a library')\n"
    )
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, ROOT / "generate.py", "--prompt", "x"]
    run = subprocess.run(command, capture_output=True, env=env)
    assert (run.returncode, run.stderr) == (130, b"interrupted\n")


@pytest.mark.parametrize("threads", [None, 3])
def test_threads_are_fixed_or_follow_other_programs(threads, model_folder):
    """Guards against --threads that is not used, or that the governor changes again."""
    model_args = ModelArguments(model=str(model_folder), threads=threads)
    try:
        model = load_generator(model_args, GenerationConfig()).model
        assert most_threads(model) == torch.get_num_threads() == (threads or 1)
        assert (ThreadGovernor not in kept(model)) == (threads is not None)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(("number", "warns"), [(2, False), (3, True), (None, False)])
def test_more_threads_than_processors_are_warned_of(number, warns, monkeypatch, capsys):
    """Guards against a prompt that takes thirty times as long without a word."""
    monkeypatch.setattr("self_speculation.machine.threads._processors", lambda _: [0, 1])
    try:
        set_threads(number)
    finally:
        torch.set_num_threads(1)
    assert ("warning: --threads 3: there are 2 processors, more " in capsys.readouterr().err) == warns


def test_others_are_told_of_once(capsys):
    """Guards against a slow program that says nothing, and one that says it again and again."""
    governor = Mock(num_taken=1.26, num_processors=2, num_threads=1, most=2)
    tell_of_fewer_threads(governor)
    tell_of_fewer_threads(governor)
    warning = (
        "other programs use 1.3 of 2 processors: 1 of 2 threads compute while they do, which takes longer\n"
    )
    assert capsys.readouterr().err.lstrip() == warning
