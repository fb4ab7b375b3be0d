"""Signals end a process, whatever its threads do."""

import subprocess
import sys

from conftest import ROOT

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
    """Guards against handlers that wait for the main thread, threads that are waited for, and a watch that
    waits for the interpreter.
    """
    stuck = subprocess.run(
        [sys.executable, "-c", STUCK], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert stuck.stdout == "1\n2\n"
    assert stuck.returncode == 1
    assert "in act" in stuck.stderr
