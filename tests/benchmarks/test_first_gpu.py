"""The program for cards that nobody has tried yet, against stand-ins for a card that fails."""

import json
import os
import signal

import pytest
import torch
from conftest import card_llama, needs_operators

from benchmarks import card_steps, first_gpu, kernel_steps
from benchmarks.card_steps import STEPS, Tried

ILLEGAL = "CUDA error: an illegal memory access was encountered"
NAMES = ["first", "second", "third"]


@pytest.fixture
def card(byte_tokenizer, monkeypatch):
    """A machine whose card is a CPU; processes are forked from this one."""
    model = card_llama(vocab_size=len(byte_tokenizer), max_position_embeddings=1024)
    monkeypatch.setattr(first_gpu, "make_tried", lambda args: Tried(model, byte_tokenizer, args))
    monkeypatch.setattr(first_gpu, "_START", "fork")
    monkeypatch.setattr(card_steps, "_PROMPT", 25)
    for name in ("_COPIED", "_ROTATED"):
        monkeypatch.setattr(kernel_steps, name, 64)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)


@pytest.fixture
def outcome(card, capsys):  # noqa: ARG001
    """What the program returns, and the lines that it writes."""

    def run():
        flags = ["--exit_layer", "1", "--num_speculations", "2", "--max_steps", "4"]
        status = first_gpu.main(flags)
        lines = capsys.readouterr().out.splitlines()
        found = json.loads(lines[-1])
        table = [line for line in lines if line.startswith("|")]
        assert [line.split(" | ")[0].strip("| ") for line in table[2:]] == [*found]
        return status, found, "\n".join(table)

    return run


@needs_operators
@pytest.mark.usefixtures("graphs")
def test_every_step_works(outcome):
    """Guards against a step that fails for want of a card to try it on, and against numbers of none."""
    status, found, table = outcome()
    errors = {name: result for name, result in found.items() if "error" in result}
    assert errors == {}, next(iter(errors.values()))["traceback"]
    assert status == 0
    assert [*found] == ["card", "model", *STEPS]
    assert not [name for name, result in found.items() if result.get("why_not_plain") or result.get("rows")]
    assert found["guided"]["conforms"]
    assert found["capture"]["captures"] > 0
    assert found["captured self-speculative"].keys() > {"tokens/s", "ms a round", "accepted", "drafted"}
    assert found["kernels, numbers"]["roundings"] < 2
    assert "| captured passes | plain step " in table


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("way", ["sticky", "out of memory", "crash"])
def test_a_card_that_fails_at_a_step(way, number, outcome, monkeypatch):
    """Guards against an hour on a card that ends at the first fault, against steps that repeat the error of
    an earlier one, and against a reason whose end is cut off: Triton's stands there.
    """
    is_lost = []

    def failing(_):
        if way == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        if way == "out of memory":
            raise torch.OutOfMemoryError(f"{'.' * 5000}\nout of memory")
        is_lost.append(True)
        blocking = os.environ.get("CUDA_LAUNCH_BLOCKING") == "1"
        raise RuntimeError(f"{ILLEGAL} in {'merge' if blocking else 'a later call'}")

    def synchronize(_):
        if is_lost:
            raise torch.AcceleratorError(ILLEGAL)

    steps = {name: failing if i == number else lambda _: {"speed": 5} for i, name in enumerate(NAMES)}
    monkeypatch.setattr(first_gpu, "STEPS", steps)
    monkeypatch.setattr(Tried, "synchronize", synchronize)
    status, found, table = outcome()
    failed = found.pop(NAMES[number])
    assert status == 1
    assert found.pop("card").keys() >= {"torch", "CUDA"}
    assert found == {"model": {}, **{name: {"speed": 5} for name in NAMES if name != NAMES[number]}}
    again = failed.get("again, CUDA_LAUNCH_BLOCKING=1")
    why = {
        "sticky": f"{ILLEGAL} in a later call",
        "out of memory": "out of memory",
        "crash": "the process ended with status -9",
    }[way]
    assert failed["error"].endswith(why)
    assert f"| {NAMES[number]} | " in table
    assert why in table
    assert (again is None) == (way == "out of memory")
    if way == "sticky":
        assert again["error"].endswith(f"{ILLEGAL} in merge")
        assert "in failing" in again["traceback"]


@pytest.mark.parametrize("why", ["the package triton is not installed", "triton cannot launch kernels here"])
def test_a_card_without_kernels(why, outcome, monkeypatch):
    """Guards against steps that fail one by one where Triton or a compiler lacks: eager ones have figures."""
    monkeypatch.setattr("self_speculation.backends.card_runner.why_no_kernels", lambda *_: why)
    kept = ("kernels, numbers", "eager plain", "capture", "captured plain")
    monkeypatch.setattr(first_gpu, "STEPS", {name: STEPS[name] for name in kept})
    status, found, table = outcome()
    assert status == 0
    assert found["eager plain"]["tokens/s"] > 0
    for name in ("kernels, numbers", "capture", "captured plain"):
        assert why in found[name]["none"]
    assert table.count(why) == 3


def test_a_driver_that_is_too_old(outcome, monkeypatch):
    """Guards against "torch sees no GPU" and nothing that would help."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    status, found, table = outcome()
    assert status == 2
    why = f"torch {torch.__version__} is built for CUDA 13.0, which needs driver 580 or newer"
    assert found["card"]["error"] == why
    assert why in table


def test_a_model_that_cannot_be_made(outcome, monkeypatch):
    """Guards against a process that ends before the first step, and a program that waits for it."""
    monkeypatch.setattr(first_gpu, "make_tried", lambda args: 1 / 0)
    monkeypatch.setattr(first_gpu, "STEPS", dict.fromkeys(NAMES))
    status, found, table = outcome()
    assert status == 1
    assert found["model"]["error"] == "ZeroDivisionError: division by zero"
    assert table.count("not tried: there is no model") == 3
