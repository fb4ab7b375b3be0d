"""A separate process tries grammars before this one compiles them.

A grammar of 40 characters can take minutes and gigabytes to compile, whatever limits llguidance is given. The
kernel ends the process beyond a second of processor time or 64 MB. What passes costs about as much again
where it is compiled to be used. Later masks keep to `LIMITS`: 0.1 s each.

This file is also the program of that process. It needs llguidance alone, so the process has 20 MB and the
tokenizer.
"""

import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import suppress
from functools import lru_cache
from multiprocessing.connection import wait
from threading import Lock

import llguidance
import psutil

LIMITS = llguidance.LLParserLimits(max_grammar_size=10_000, max_lexer_states=50_000)
_SECONDS = 1.0  # of processor time: a busy machine refuses no grammar that a quiet one compiles
_MEMORY = 64_000_000  # bytes beside the tokenizer
_PATIENCE = 5.0  # seconds of any time, for a process that does nothing
_TOO_MUCH = f"the grammar takes more than {_SECONDS:g} s or {_MEMORY // 10**6} MB to compile"


class GrammarError(ValueError):
    """A grammar is invalid, too large, or matches nothing."""


def grammar_error(problem: str) -> GrammarError:
    """The error for what llguidance says."""
    first, *more = problem.partition("\n<state>")[0].splitlines()
    if first == "NoExtensionBias":
        return GrammarError("the grammar matches nothing")
    if first.endswith(":"):  # the reason is in the other lines
        first = " ".join(" ".join([first, *more]).split())
    return GrammarError(first[:300])


class GrammarSandbox:
    """Tries grammars, one at a time, from any thread. Its process starts with the first grammar, and again
    after it was ended.

    Args:
        tokenizer: arguments of `llguidance.LLTokenizer`.
    """

    def __init__(self, *tokenizer: object) -> None:
        self._tokenizer = tokenizer
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._problem = lru_cache(maxsize=64)(self._try)

    def check(self, definition: str) -> None:
        """Raises GrammarError if a grammar in llguidance's format is invalid, or costs too much;
        ChildProcessError if somebody ends the process again and again.
        """
        if problem := self._problem(definition):
            raise grammar_error(problem)

    def _try(self, definition: str) -> str:
        """The problem of a grammar, or an empty text."""
        for _ in range(2):  # somebody may have killed the process since
            with self._lock:
                answer = b""
                status = 0
                try:
                    with suppress(BrokenPipeError):
                        process = self._start()
                        _send(process, definition)
                        assert process.stdout is not None
                        if wait([process.stdout.fileno()], _PATIENCE):
                            answer = process.stdout.readline()
                finally:  # also after Ctrl-C: the next grammar would get this one's answer
                    if not answer and self._process is not None:
                        self._process.kill()
                        status = self._process.wait()
            if answer:
                return json.loads(answer)
            if status < 0 and status != -signal.SIGKILL:  # a limit ended it; above 0: it could not begin
                return _TOO_MUCH
        raise ChildProcessError("the process that tries grammars was ended, or does not answer: try again")

    def _start(self) -> subprocess.Popen[bytes]:
        """The running process. In a fork `poll` says that the parent's has ended, so a new one starts."""
        if self._process is None or self._process.poll() is not None:
            path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # an allocator that aborts says so
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C is for this process
            )
            _send(self._process, self._tokenizer)
        return self._process


def _send(process: subprocess.Popen[bytes], content: object) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(content).encode() + b"\n")
    process.stdin.flush()


def _serve() -> None:
    """Read the arguments of a tokenizer, then grammars, as lines of JSON; write the problem of each."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # if the parent was killed, end without a word
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tokenizer = llguidance.LLTokenizer(*json.loads(sys.stdin.readline()))
    most = resource.getrlimit(resource.RLIMIT_AS)[1]  # `ulimit -v`, or -1
    for line in sys.stdin:
        limit = psutil.Process().memory_info().vms + _MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit if most < 0 else min(limit, most), most))
        signal.setitimer(signal.ITIMER_PROF, _SECONDS)
        try:
            matcher = llguidance.LLMatcher(tokenizer, json.loads(line), log_level=0, limits=LIMITS)
            matcher.compute_bitmask()
            problem = matcher.get_error()
        except BaseException:  # no memory, or a panic
            os.abort()  # as an allocator does
        signal.setitimer(signal.ITIMER_PROF, 0)  # to be ended now would be a second answer
        _answer(problem)


def _answer(problem: str) -> None:
    print(json.dumps(problem), flush=True)


if __name__ == "__main__":
    _serve()
