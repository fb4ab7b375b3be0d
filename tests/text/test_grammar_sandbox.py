"""Grammars are tried in a separate process, which the author of a grammar cannot use up."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
from helpers import watch

from self_speculation.text import grammar_sandbox
from self_speculation.text.grammar import Grammar, GrammarError
from self_speculation.text.grammar_sandbox import GrammarSandbox

DIGITS = Grammar.regex("[0-9]+").definition
# llguidance takes a minute and 370 MB.
SLOW = Grammar.json_schema({"type": "integer", "multipleOf": 999983}).definition
# It does not end, with the tokens of bytes alone.
ENDLESS = Grammar.json_schema(
    {"type": "string", "allOf": [{"pattern": f"a{i}"} for i in range(100)]}
).definition


@pytest.fixture
def sandbox(monkeypatch):
    monkeypatch.setattr(grammar_sandbox, "_PATIENCE", 600.0)  # a busy machine is not a process that hangs
    return GrammarSandbox("byte")


@pytest.mark.parametrize("definition", [SLOW, ENDLESS], ids=["slow", "endless"])
def test_what_takes_too_much_is_refused(sandbox, definition, monkeypatch):
    """Guards against a grammar that takes the whole machine, one that is tried again, and one that ends the
    next.
    """
    tried = watch(monkeypatch, sandbox, "_start")
    for _ in range(2):
        with pytest.raises(GrammarError, match="takes more than 1 s or 64 MB to compile"):
            sandbox.check(definition)
    assert len(tried) == 1
    sandbox.check(DIGITS)
    sandbox.check(Grammar.regex("[a-z]+").definition)
    assert tried[1][1] is tried[2][1]


def test_a_killed_process_starts_again(sandbox):
    """Guards against a server that refuses all grammars once the process was killed, and against a fork of
    this process that reads the answers to another one.
    """
    sandbox.check(DIGITS)
    sandbox._process.kill()
    sandbox.check(Grammar.regex("[a-z]+").definition)
    first = sandbox._process
    if (fork := os.fork()) == 0:
        try:
            sandbox.check(Grammar.regex("[A-Z]+").definition)
        finally:
            os._exit(int(sandbox._process is first))
    assert os.waitpid(fork, 0)[1] == 0


def test_a_process_that_does_nothing_is_ended(sandbox, monkeypatch):
    """Guards against waiting for ever, against a refusal that is kept, and against a grammar that is blamed
    for a process that cannot begin.
    """
    with monkeypatch.context() as patch:
        patch.setattr(grammar_sandbox, "_PATIENCE", 0)
        with pytest.raises(ChildProcessError, match="does not answer"):
            sandbox.check(DIGITS)
    sandbox.check(DIGITS)
    with pytest.raises(ChildProcessError, match="was ended"):
        GrammarSandbox("no tokenizer").check(DIGITS)


def test_an_interrupted_check_has_no_answer(sandbox, monkeypatch):
    """Guards against Ctrl-C after which each grammar gets the answer to the one before."""
    sandbox.check(DIGITS)
    with monkeypatch.context() as patch:
        patch.setattr(grammar_sandbox, "wait", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sandbox.check("start: nothing")
    sandbox.check(Grammar.regex("[a-z]+").definition)


def test_each_grammar_has_one_answer():
    """Guards against a process that is ended while it answers, so that the next grammar is blamed, and one
    that fails below `ulimit -v`.
    """
    program = (
        "import resource, time, grammar_sandbox as sandbox\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))\n"
        "answer, sandbox._SECONDS = sandbox._answer, 0.1\n"
        "def and_work(problem):\n"
        "    answer(problem)\n"
        "    end = time.process_time() + 0.3\n"
        "    while time.process_time() < end: pass\n"
        "sandbox._answer = and_work\n"
        "sandbox._serve()"
    )
    lines = "".join(f"{json.dumps(line)}\n" for line in (["byte"], DIGITS, DIGITS))
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(grammar_sandbox.__file__).parent,
        input=lines,
        capture_output=True,
        text=True,
    )
    assert ran.stdout == '""\n""\n', ran.stderr
