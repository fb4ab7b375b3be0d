"""generate.py as its users run it: pipes, terminals, torchrun, and wrong usage."""

import io
import os
import re
import subprocess
import sys
import time
from typing import NamedTuple

import pexpect
import pytest

import generate

SPECULATIVE = ["--generation_strategy", "self_speculative", "--exit_layer", "2", "--num_speculations", "3"]
GREEDY = ["--sample", "False", "--max_steps", "20"]


@pytest.fixture
def run(script, model_folder):
    def run_script(*args, model=model_folder, **kwargs):
        model = ["--model", str(model)] if model else []
        return subprocess.run(
            script("generate.py", *model, *args), capture_output=True, timeout=120,
            **({"text": True} | ({} if "input" in kwargs else {"stdin": subprocess.DEVNULL}) | kwargs),
        )  # fmt: skip

    return run_script


class Said(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def said(model_folder, capsys, monkeypatch):
    """What `run` gives, without the seconds that a new process takes to import everything."""
    monkeypatch.setattr("sys.stdin", io.StringIO())

    def call(*args):
        try:
            status = generate.main(["--model", str(model_folder), *args])
        except SystemExit as end:
            status = end.code
        return Said(status, *capsys.readouterr())

    return call


@pytest.fixture
def talk(script, model_folder):
    """The script at a terminal of 80 columns."""
    children = []

    def spawn(*args):
        command, *rest = script("generate.py", "--model", model_folder, *args)
        environment = {**os.environ, "PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm"}
        child = pexpect.spawn(
            command,
            rest,
            env=environment,
            encoding="utf-8",
            codec_errors="replace",
            timeout=60,
            dimensions=(24, 80),
        )
        children.append(child)
        return child

    yield spawn
    for child in children:
        child.close(force=True)


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
    result = said("--prompt", "def add", *GREEDY, *SPECULATIVE, "--compare", "True")
    assert result.returncode == 0, result.stderr
    last = result.stderr.splitlines()[-1]
    assert re.fullmatch(
        r"  unwatched: [\d.]+ tokens/s, [\d.]+ by autoregressive .*: [\d.]+ times as fast", last
    )


def test_a_pipe_is_one_prompt(run):
    by_flag = run("--prompt", "a\nb", *GREEDY)
    by_pipe = run(*GREEDY, input="a\nb\n")
    assert (by_pipe.returncode, by_pipe.stdout) == (0, by_flag.stdout)


def test_an_empty_pipe_is_an_empty_prompt(run):
    result = run(*GREEDY)
    assert result.returncode == 0
    assert "for 1 tokens" in result.stderr


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
        (["--exit_layer", "4"], "--exit_layer 4: must be between 1 and 3, the model has 4 layers"),
        (
            ["--generation_strategy", "self_speculative"],
            "--exit_layer -1: self_speculative needs one between 1 and 3",
        ),
        (SPECULATIVE[:4], "--num_speculations -1: self_speculative needs at least 1"),
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


def test_input_that_is_no_text(run):
    result = run(input=b"\xff\xfe", text=False)
    assert result.returncode == 2
    assert b"not valid UTF-8" in result.stderr


def test_a_reader_that_leaves_is_not_an_error(script, model_folder):
    command = " ".join(script("generate.py", "--model", model_folder, "--prompt", "def", *GREEDY))
    result = subprocess.run(f"{command} | true", shell=True, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in result.stderr
    assert "BrokenPipe" not in result.stderr


def test_under_torchrun_only_one_rank_talks(model_folder, script):
    _, path, *_ = script("generate.py")
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", path,
         "--model", model_folder, "--prompt", "def add", *GREEDY],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("20 tokens in") == 1
    alone = subprocess.run(
        script("generate.py", "--model", model_folder, "--prompt", "def add", *GREEDY),
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.stdout == alone.stdout


def test_the_loop_answers_until_ctrl_d(talk):
    child = talk(*GREEDY, *SPECULATIVE, "--streamer", "speculative")
    child.expect("Ctrl-D sends it")
    child.expect(">>>")
    child.send("first line\rsecond line")
    child.expect("second line")
    child.sendcontrol("d")
    child.expect("20 tokens in")
    child.expect("acceptance rate")
    child.expect(">>>")
    child.sendcontrol("c")  # nothing to stop
    child.expect(">>>")
    child.send("x " * 300)
    child.sendcontrol("d")
    child.expect("error: the prompt has .* leaves no room")  # and the loop goes on
    child.expect(">>>")
    child.sendcontrol("d")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_the_loop_ends_at_exit(talk):
    child = talk()
    child.expect(">>>")
    child.send("/exit")
    child.sendcontrol("d")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_chat_keeps_the_conversation(talk):
    child = talk("--chat", "True", *GREEDY)
    sizes = []
    for _ in range(2):
        child.expect(">>>")
        child.send("hi")
        child.sendcontrol("d")
        child.expect(r"for (\d+) tokens")
        sizes.append(int(child.match[1]))
    assert sizes[1] > 2 * sizes[0]


def test_ctrl_c_stops_the_answer_and_keeps_its_statistics(talk, endless_folder):
    endless = ["--model", endless_folder, "--max_steps", "90000", "--sample", "False"]
    child = talk(*endless)
    child.expect(">>>")
    child.send("def add")
    child.sendcontrol("d")
    time.sleep(3)  # well after the answer began, long before it could end
    child.sendcontrol("c")
    child.expect(r"\d+ tokens in .* s, interrupted")
    child.expect(r"decode .* tokens/s")
    child.expect(">>>")
    child.sendcontrol("d")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
