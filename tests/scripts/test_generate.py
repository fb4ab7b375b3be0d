"""generate.py: pipes, terminals, ranks, and wrong usage."""

import io
import os
import pty
import re
import signal
import tempfile
import termios
from types import SimpleNamespace
from typing import NamedTuple

import forks
import pexpect
import pexpect.fdpexpect
import pytest
from conftest import ROOT

import generate
from runs.conversation import Conversation
from self_speculation import GenerationConfig

SPECULATIVE = ["--generation_strategy", "self_speculative", "--exit_layer", "2", "--num_speculations", "3"]
GREEDY = ["--sample", "False", "--max_steps", "20"]


class Said(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def said(model_folder, capsys, monkeypatch):
    """Status and output of the script for a pipe; `piped` None: standard input is closed."""

    def call(*args, piped=b"def"):
        stream = None if piped is None else io.TextIOWrapper(io.BytesIO(piped), encoding="utf-8")
        monkeypatch.setattr("sys.stdin", stream)
        try:
            status = generate.main(["--model", str(model_folder), *args])
        except SystemExit as end:
            status = end.code
        return Said(status, *capsys.readouterr())

    return call


class Terminal(pexpect.fdpexpect.fdspawn):
    """A terminal of 24 lines and 80 columns, and the script in it."""

    def __init__(self, *args):
        mine, its = pty.openpty()
        termios.tcsetwinsize(its, (24, 80))
        env = {"PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"}
        self.script = forks.Fork(
            ROOT / "generate.py", *args, stdin=its, stdout=its, stderr=its, env=env, terminal=True
        )
        os.close(its)
        super().__init__(mine, timeout=forks.HANGS, encoding="utf-8", codec_errors="replace")

    def control(self, letter):
        self.send(chr(ord(letter) - ord("a") + 1))

    def is_asked(self):
        """Wait until keys are read. The prompt alone says nothing: it is drawn again at every change."""
        self.expect(r"\x1b\[\?2004h")  # pasted text is told from typed one
        self.expect(">>>")

    def ends_well(self):
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
def test_every_strategy_and_streamer_prints_the_same_answer(said, streamer):
    """The answer alone on standard output, without escape codes; the statistics elsewhere."""
    plain = said("--prompt", "def add", *GREEDY)
    assert plain.returncode == 0
    assert len(plain.stdout) > 20
    assert "20 tokens in" in plain.stderr
    assert "acceptance" not in plain.stderr
    other = said("--prompt", "def add", *GREEDY, *SPECULATIVE, "--streamer", streamer)
    assert other.stdout == plain.stdout
    assert "acceptance rate" in other.stderr
    assert "mean accepted length" in other.stderr
    assert "prefill" in other.stderr


def test_compare_ends_with_both_speeds(said):
    """Guards against an answer whose comparison is not shown; the verdict is the machine's."""
    result = said("--prompt", "def add", *GREEDY, *SPECULATIVE, "--compare", "True")
    assert result.returncode == 0, result.stderr
    last = result.stderr.splitlines()[-1]
    assert re.match(r"  without streaming: [\d.]+ tokens/s, autoregressive [\d.]+: .* times as fast", last)


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        ([99.0, 19.0, 21.0, 22.0], "21.0 tokens/s, autoregressive 10.0: 2.10 times as fast (2.00-2.15)"),
        (
            [99.0, 1.9, 2.2, 36.0],
            "2.2 tokens/s, autoregressive 10.0: nothing can be said (0.21-1.91 times as",
        ),
        ([99.0, 9.0, 10.0, 11.0], "10.0 tokens/s, autoregressive 10.0: nothing can be said (0.95-1.05 times"),
    ],
)
def test_what_turns_that_contradict_each_other_tell(ours, said, monkeypatch):
    """Guards against the verdict of a single turn, or of the first one, which warms up, and against one that
    the middle half of the turns does not bear out.
    """

    class Side:
        def __init__(self, speeds):
            self.speeds = iter(speeds)

        def generate(self, *_):
            took = SimpleNamespace(decode_tokens_per_second=next(self.speeds))
            return SimpleNamespace(generation_strategy_result=took)

    monkeypatch.setattr("runs.conversation.autoregressive", lambda *_: (Side([10.0] * 4), None))
    comparison = Conversation(Side(ours), GenerationConfig())._comparison([])
    assert comparison.startswith(f"without streaming: {said}")


def test_compare_of_answers_of_one_token(said):
    """Guards against a division by the speed of decoding nothing."""
    result = said("--prompt", "def add", *GREEDY, *SPECULATIVE, "--compare", "True", "--max_steps", "1")
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines()[-1] == "  without streaming: answers of one token, nothing to compare"


def test_compare_can_be_interrupted(said, monkeypatch):
    """Guards against a Ctrl-C that is meant for the comparison and ends the conversation."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Conversation, "_comparison", interrupted)
    result = said("--prompt", "def add", *GREEDY, *SPECULATIVE, "--compare", "True")
    assert result.returncode == 130
    assert result.stderr.splitlines()[-1] == "  without streaming: interrupted"


@pytest.mark.parametrize("prompt", ["a\nb", "/exit"])
def test_a_pipe_is_one_prompt(prompt, said):
    """Guards against a prompt for each line, and a command where there is no conversation."""
    by_flag = said("--prompt", prompt, *GREEDY)
    by_pipe = said(*GREEDY, piped=f"{prompt}\n".encode())
    assert by_flag.stdout.strip()
    assert (by_pipe.returncode, by_pipe.stdout) == (0, by_flag.stdout)


@pytest.mark.parametrize("piped", [b"", b"\n", None])
def test_no_prompt_is_refused(piped, said):
    """Guards against an answer to nothing, and an AttributeError if standard input is closed."""
    result = said(piped=piped)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert 'the prompt is empty: standard input has no text; --prompt "" stands for' in result.stderr


def test_a_flag_without_its_value_is_refused(said):
    """Guards against `--prompt` and `--stop_words` that count as left out."""
    assert "argument --prompt: expected one argument" in said("--prompt").stderr
    assert "argument --stop_words: expected at least one argument" in said("--stop_words").stderr


def test_an_empty_prompt_that_is_meant_is_the_bos_token(said, byte_tokenizer):
    result = said("--prompt", "", *GREEDY)
    assert result.returncode == 0
    assert "for 1 tokens" in result.stderr
    assert said("--prompt", byte_tokenizer.bos_token, *GREEDY).stdout == result.stdout


def test_line_ends_of_windows(said):
    """Guards against carriage returns that the model has hardly ever seen."""
    ours, theirs = (said("--prompt", f"def f():{end}    pass{end}", *GREEDY) for end in ("\n", "\r\n"))
    assert theirs.stdout == ours.stdout
    tokens = [re.search(r"for (\d+) tokens", result.stderr)[1] for result in (ours, theirs)]
    assert tokens[0] == tokens[1]


def test_an_early_exit_is_not_taken_for_the_model(said):
    """Guards against an answer of the first layers that looks like the model's."""
    early = said("--prompt", "def", *GREEDY, "--exit_layer", "2").stderr
    assert "by the early exit at layer 2 alone, not by the full model" in early
    for flags in ([], SPECULATIVE):
        assert "early exit" not in said("--prompt", "def", *GREEDY, *flags).stderr


def test_stop_words_do_not_show(said):
    text = said("--prompt", "def add", *GREEDY).stdout
    word = text[5:8]
    for streamer in ("standard", "none", "speculative"):
        result = said("--prompt", "def add", *GREEDY, "--stop_words", word, "--streamer", streamer)
        assert result.stdout == text[: text.index(word)] + "\n"


def test_chat_applies_the_template(said):
    by_template = said("--prompt", "user: hi\nassistant:", *GREEDY)
    assert said("--prompt", "hi", "--chat", "True", *GREEDY).stdout == by_template.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--exit_layer", "4"],
            "--exit_layer 4: must be between 1 and 3, the model has 4 layers; -1 is full",
        ),
        (
            [*SPECULATIVE, "--exit_layer", "4"],
            "between 1 and 3, the model has 4 layers; with draft_weights int4 it may be 4",
        ),
        (
            ["--generation_strategy", "self_speculative"],
            "--exit_layer: self_speculative needs one between 1 and 3",
        ),
        (SPECULATIVE[:4], "--num_speculations: self_speculative needs at least 1"),
        (
            ["--exit_layer", "2", "--num_speculations", "3"],
            "--num_speculations 3: autoregressive decoding drafts nothing, add --generation_strategy self_",
        ),
        (["--prompt_lookup", "3"], "--prompt_lookup 3: autoregressive decoding drafts nothing, add"),
        (["--shared_lookup", "9"], "--shared_lookup 9: autoregressive decoding drafts nothing, add"),
        (
            [*SPECULATIVE, "--draft_weights", "int4", "--fuse", "False"],
            "--draft_weights int4: not with --fuse False",
        ),
        (["--compare", "True"], "--compare True: needs a --generation_strategy to compare"),
        (["--model", "/nowhere"], "--model '/nowhere': no such folder"),
        (["--device", "tpu"], "--device 'tpu': not on this machine"),
        (["--model_args", "attn_implementation=flex_attention"], "supported are sdpa, eager"),
        (["--prompt", "x " * 400], "leaves no room in the model's context of 256"),
        (["--prompt", b"\xff".decode(errors="surrogateescape")], "the prompt is not valid UTF-8"),
    ],
)
def test_mistakes_end_in_one_line_and_status_2(said, args, message):
    result = said(*args)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_input_that_is_no_text(said):
    result = said(piped=b"\xff\xfe")
    assert result.returncode == 2
    assert "not valid UTF-8" in result.stderr


def test_a_reader_that_leaves_is_not_an_error(model_folder):
    """As `generate.py | true`. Guards against a traceback for each line that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    with tempfile.TemporaryFile() as errors:
        args = ["--model", model_folder, "--prompt", "def", *GREEDY]
        script = forks.Fork(ROOT / "generate.py", *args, stdout=writer, stderr=errors.fileno())
        os.close(writer)
        assert script.wait() == 128 + signal.SIGPIPE
        said = forks.read(errors)
    assert "Traceback" not in said
    assert "BrokenPipe" not in said


def test_of_several_ranks_only_one_talks(model_folder, said):
    """Guards against an answer from each rank."""
    args = ["--prompt", "def add", *GREEDY]
    result = forks.run_ranks(2, ROOT / "generate.py", "--model", model_folder, *args)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("20 tokens in") == 1
    assert result.stdout == said(*args).stdout


def test_the_conversation_goes_on_until_ctrl_d(talk):
    child = talk(*GREEDY, *SPECULATIVE, "--streamer", "speculative")
    child.expect("Enter sends it")
    child.is_asked()
    child.send("def add\r")
    child.expect("20 tokens in")
    child.expect("acceptance rate")
    child.is_asked()
    child.control("c")  # nothing to stop
    child.expect("/exit or Ctrl-D leaves")
    child.is_asked()
    child.send("x " * 300 + "\r")
    child.expect("error: the prompt has .* leaves no room")  # and the conversation goes on
    child.is_asked()
    child.control("d")
    assert child.ends_well()


@pytest.mark.parametrize(
    ("keys", "num_lines"),
    [
        ("abcdef\r", 1),
        ("ab\x1b\rcd\x1b\ref\r", 3),  # Alt-Enter
        ("ab\\\rcd\\\ref\r", 3),  # a backslash at the end
        ("\x1b[200~ab\rcd\ref\x1b[201~\r", 3),  # pasted, as terminals tell it
        ("\r \r\x7fabcdef\r", 1),  # Enter where there is nothing to send
    ],
)
def test_keys_of_a_prompt(keys, num_lines, talk, byte_tokenizer):
    """Guards against a prompt of several lines that is sent after the first, and a backslash that stays."""
    prompt = "\n".join(["abcdef"] if num_lines == 1 else ["ab", "cd", "ef"])
    child = talk(*GREEDY)
    child.is_asked()
    child.send(keys)
    child.expect(r"for (\d+) tokens")
    assert int(child.match[1]) == len(byte_tokenizer.encode(prompt))
    child.is_asked()
    child.control("d")
    assert child.ends_well()


def test_commands(talk):
    """Guards against a prompt that begins with a slash and is taken for a command, or the reverse."""
    child = talk(*GREEDY)
    child.is_asked()
    child.send("/help\r")
    child.expect("/exit +leaves")
    child.expect("Enter +sends the prompt")
    child.is_asked()
    child.send("/leave\r")
    child.expect("/leave: no such command, there are /help, /exit")
    child.is_asked()
    child.send("/exit of this function:\r")
    child.expect("20 tokens in")
    child.is_asked()
    child.send("def\\\r/exit\r")  # even after another line
    assert child.ends_well()
    assert "tokens in" not in child.before


def test_make_chat_outlives_a_ctrl_c_that_stops_an_answer(tmp_path):
    """The terminal sends Ctrl-C to all that runs in the foreground, and make ends by it. Guards against an
    error of make after a conversation that ended well, and a terminal that nobody gives back.
    """
    answers = tmp_path / "answers"
    answers.write_text("#!/bin/sh\ntrap 'echo stopped' INT\necho answering\nread line\necho left\n")
    answers.chmod(0o755)
    (tmp_path / "chat").touch()  # the environment is there
    shell = ["-c", f"make chat VENV={tmp_path} RUN={answers}; echo status $?; read line; echo read $line"]
    with pexpect.spawn("sh", shell, cwd=str(ROOT), encoding="utf-8", timeout=forks.HANGS) as child:
        child.expect("answering")
        child.sendintr()
        child.expect("stopped")
        child.expect("left|answering")
        child.expect("status 0")
        child.sendline("on")
        child.expect("read on")


def test_keys_typed_meanwhile_are_not_replayed(talk):
    """While the model is loaded, while it answers, and in the same breath as the end of a prompt."""
    child = talk(*GREEDY)
    child.send("while it loads\r")
    child.is_asked()
    for _ in range(2):
        child.send("hi\rsame breath\r")
        child.expect(r"for (\d+) tokens")
        assert int(child.match[1]) <= 3
        child.is_asked()
    child.send("/exit\r")  # would not act after other keys
    assert child.ends_well()


def test_work_before_the_first_token_says_so(said, monkeypatch):
    """Guards against seconds in which nothing seems to happen."""
    monkeypatch.setattr("runs.status._SILENCE", 0.0)
    copies = [*GREEDY, *SPECULATIVE, "--draft_weights", "int4"]
    stderr = said("--prompt", "def", *copies).stderr
    assert "preparing the layers that draft" in stderr
    assert re.search(r"^copies for drafts take \d\.\d\d GiB$", stderr, re.MULTILINE)


def test_chat_keeps_the_conversation(talk):
    child = talk("--chat", "True", *GREEDY)
    sizes = []
    for _ in range(2):
        child.is_asked()
        child.send("hi\r")
        child.expect(r"for (\d+) tokens")
        sizes.append(int(child.match[1]))
    assert sizes[1] > 2 * sizes[0]


def test_ctrl_c_stops_the_answer_and_keeps_its_statistics(talk, endless_folder):
    """And what was typed meanwhile is not among the answer, which has no such characters."""
    child = talk("--model", endless_folder, "--max_steps", "90000", "--sample", "False")
    child.is_asked()
    child.send("def add\r")
    child.expect("(?s).{1000}")  # well after the answer began, long before it could end
    child.send("\N{SNOWMAN}" * 9)
    child.control("c")
    child.expect(r"\d+ tokens in .* s, interrupted")
    assert "\N{SNOWMAN}" not in child.before
    assert "^C" not in child.before
    child.expect(r"decode .* tokens/s")
    child.is_asked()
    child.control("d")
    assert child.ends_well()


def test_a_refusal_shows_model_args(said):
    """Guards against an error that names the model, and not the flag whose value is wrong."""
    given = "x=false,attn_implementation=no such"
    result = said("--model_args", given, "--prompt", "a")
    assert result.returncode == 2
    assert f"(with --model_args '{given}')" in result.stderr
