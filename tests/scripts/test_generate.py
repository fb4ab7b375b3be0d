"""generate.py: pipes, terminals and ranks."""

import io
import os
import pty
import re
import signal
import tempfile
import termios
from subprocess import CompletedProcess
from unittest.mock import Mock

import forks
import pexpect
import pexpect.fdpexpect
import pytest
from conftest import ROOT
from helpers import SPECULATION

import generate

GREEDY = ["--sample", "False", "--max_steps", "20"]


@pytest.fixture
def generated(model_folder, capsys, monkeypatch):
    """Status and output of the script for a pipe; `piped` None: standard input is closed."""

    def call(*args, piped=b"def"):
        stream = None if piped is None else io.TextIOWrapper(io.BytesIO(piped), encoding="utf-8")
        monkeypatch.setattr("sys.stdin", stream)
        try:
            status = generate.main(["--model", str(model_folder), *args])
        except SystemExit as end:
            status = end.code
        return CompletedProcess(args, status, *capsys.readouterr())

    return call


class Terminal(pexpect.fdpexpect.fdspawn):
    """A terminal, and the script in it."""

    def __init__(self, *args):
        mine, terminal = pty.openpty()
        termios.tcsetwinsize(terminal, (24, 80))
        env = {"PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"}
        self.script = forks.Fork(
            ROOT / "generate.py",
            *args,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env=env,
            terminal=True,
        )
        os.close(terminal)
        super().__init__(mine, timeout=forks.HANGS, encoding="utf-8", codec_errors="replace")

    def sends(self, keys):
        """Send keys as soon as they are read. The prompt is drawn again at every change: it says nothing."""
        self.expect(r"\x1b\[\?2004h")  # from here on, the terminal marks pasted text
        self.expect(">>>")
        self.send(keys)

    def ends_well(self, keys="\x04"):
        """Send keys, Ctrl-D without any; the script then ends with status 0."""
        self.sends(keys)
        self.expect(pexpect.EOF)
        return self.script.wait() == 0


@pytest.fixture
def talk(model_folder):
    terminals = []

    def spawn(*args):
        terminals.append(Terminal("--model", model_folder, *args))
        return terminals[-1]

    yield spawn
    for terminal in terminals:
        terminal.script.end()
        terminal.close()


@pytest.mark.parametrize("streamer", ["standard", "none", "speculative"])
def test_every_strategy_and_streamer_prints_the_same_answer(generated, streamer):
    """Guards against statistics or a stop word on standard output, and an early exit that does not say so."""
    plain = generated("--prompt", "def add", *GREEDY)
    assert (plain.returncode, len(plain.stdout) > 20) == (0, True)
    assert not re.search("acceptance|early exit", plain.stderr)
    shared = ["--prompt", "def add", *GREEDY, "--streamer", streamer]
    drafted = generated(*shared, *SPECULATION, "--compare")
    assert drafted.stdout == plain.stdout
    shown = ("20 tokens in", "acceptance rate", "prefill", "without streaming: ")
    assert all(figure in drafted.stderr for figure in shown)
    early = generated(*shared, "--exit_layer", "2")
    assert "by the early exit at layer 2 alone, not by the full model" in early.stderr
    word = plain.stdout[5:8]
    assert generated(*shared, "--stop_words", word).stdout == plain.stdout[: plain.stdout.index(word)] + "\n"


def test_ctrl_c_ends_a_comparison(generated, monkeypatch):
    """Guards against a traceback, and a conversation that ends."""
    monkeypatch.setattr("runs.conversation.Conversation._comparison", Mock(side_effect=KeyboardInterrupt))
    result = generated("--prompt", "def add", *GREEDY, *SPECULATION, "--compare", "True")
    assert result.returncode == 130
    assert result.stderr.endswith("\n  without streaming: interrupted\n")


def test_prompts_that_mean_the_same(generated):
    """Guards against a prompt for each line of a pipe, and a command outside of conversations."""
    for flags, piped, prompt in (
        ([], b"a\nb\n", "a\nb"),
        ([], b"/exit\n", "/exit"),
        (["--prompt", ""], b"def", "<s>"),
        (["--prompt", "def f():\r\n    pass\r\n"], b"", "def f():\n    pass\n"),
        (["--prompt", "hi", "--chat", "True"], b"", "user: hi\nassistant:"),
    ):
        expected = generated("--prompt", prompt, *GREEDY)
        found = generated(*flags, *GREEDY, piped=piped)
        assert expected.stdout.strip()
        assert (found.returncode, found.stdout) == (0, expected.stdout)
        assert ("standard input is one prompt of 2 lines\n" in found.stderr) == (piped == b"a\nb\n")


def test_input_that_is_no_prompt_is_refused(generated):
    """Guards against an answer to nothing, and a traceback if standard input is closed or is no text."""
    for piped, message in (
        (b"", 'the prompt is empty: standard input has no text; --prompt "" stands for'),
        (b"\n", "the prompt is empty"),
        (None, "the prompt is empty"),
        (b"\xff\xfe", "not valid UTF-8"),
        (b"x " * 400, "leaves no room in the model's context of 256"),
    ):
        result = generated(piped=piped)
        lines = [line for line in result.stderr.splitlines() if not line.startswith("warning: products by")]
        assert (result.returncode, result.stdout, len(lines)) == (2, "", 1)
        assert message in result.stderr


@pytest.mark.parametrize("is_full", [False, True], ids=["the reader leaves", "the disk is full"])
def test_an_output_that_cannot_be_written(is_full, model_folder):
    """Guards against tracebacks, of Python at the end, too. As `generate.py | true`, which is no error."""
    reader, writer = (None, "/dev/full") if is_full else os.pipe()
    with tempfile.TemporaryFile() as errors, open(writer, "wb") as output:
        if reader is not None:
            os.close(reader)
        args = ["--model", model_folder, "--prompt", "def", *GREEDY]
        script = forks.Fork(ROOT / "generate.py", *args, stdout=output.fileno(), stderr=errors.fileno())
        assert script.wait() == (1 if is_full else 128 + signal.SIGPIPE)
        printed = forks.read(errors)
    assert not re.search("Traceback|BrokenPipe", printed)
    assert ("error: the output cannot be written (No space left on device)\n" in printed) == is_full


def test_a_conversation_goes_on_until_exit(talk, byte_tokenizer):
    """Guards against errors that end it, a slash that is always a command, and keys that are lost."""
    child = talk("--chat", "True", *GREEDY, *SPECULATION, "--streamer", "speculative")
    child.send("hi\rsame breath\r")  # while it loads
    child.expect("Enter sends a prompt")
    sizes = []
    for _ in range(2):
        child.expect(r"for (\d+) tokens")
        sizes.append(int(child.match[1]))
        child.expect("acceptance rate")
    assert sizes[0] == len(byte_tokenizer.encode("user: hi\nassistant:", add_special_tokens=False))
    assert sizes[1] > 2 * sizes[0]  # the first answer is in the second prompt
    for keys, answer in (
        ("\x03", "/exit or Ctrl-D leaves"),
        ("x " * 300 + "\r", "error: the prompt has .* leaves no room"),
        ("/leave\r", "/leave: no such command; did you mean /clear"),
        ("/exit of this function:\r", "/exit: takes no text"),
        ("/etc/hosts has:\r", "20 tokens in"),
    ):
        child.sends(keys)
        child.expect(answer)
    assert child.ends_well("/exit\r")
    assert "tokens in" not in child.before


def test_keys_of_a_prompt(talk, byte_tokenizer):
    """Guards against a pasted prompt that is sent after the first line, and an answer to nothing."""
    child = talk(*GREEDY)
    for keys, prompt in (
        ("abcdef\r", "abcdef"),
        ("\x1b[200~ab\rcd\ref\x1b[201~\r", "ab\ncd\nef"),  # pasted, as terminals tell it
        ("\r \r\x7fabcdef\r", "abcdef"),  # Enter where there is nothing to send
    ):
        child.sends(keys)
        child.expect(r"for (\d+) tokens")
        assert int(child.match[1]) == len(byte_tokenizer.encode(prompt))
    assert child.ends_well()


def test_ctrl_c_stops_the_answer_and_keeps_its_statistics(talk, endless_folder):
    """Guards against a Ctrl-C that ends the conversation, and keys that are echoed into the answer."""
    child = talk("--model", endless_folder, "--max_steps", "90000", "--sample", "False")
    child.sends("def add\r")
    child.expect("(?s).{1000}")  # well after the answer began, long before it could end
    child.send("\N{SNOWMAN}" * 9 + "\x03")
    child.expect(r"\d+ tokens in .* s, interrupted")
    assert "\N{SNOWMAN}" not in child.before
    assert "^C" not in child.before
    child.expect(r"decode .* tokens/s")
    assert child.ends_well()


def test_make_chat_outlives_a_ctrl_c_that_stops_an_answer(tmp_path):
    """Guards against an error of make, which gets the Ctrl-C too, and a terminal that it keeps."""
    answers = tmp_path / "answers"
    wait = "while [ -z $stopped ]; do sleep 0.1; done"
    answers.write_text(f"#!/bin/sh\ntrap stopped=1 INT\necho answering\n{wait}\nexit 0\n")
    answers.chmod(0o755)
    (tmp_path / "chat").touch()  # the environment is there
    shell = ["-c", f"make chat VENV={tmp_path} RUN={answers}; echo status $?; read line; echo read $line"]
    with pexpect.spawn("sh", shell, cwd=str(ROOT), timeout=forks.HANGS) as child:
        child.expect("answering")
        child.sendintr()
        child.expect("status 0")
        child.sendline("on")
        child.expect("read on")
