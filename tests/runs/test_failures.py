"""Too little memory and NaN logits end the work in one line of error, and nothing is lost."""

import errno
from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch
from conftest import WITHOUT_OPERATORS
from helpers import PYTHON_FUNCTIONS, small_run, watch

import benchmark
import eval as eval_script
import generate
import sweep
from runs import program
from runs.conversation import Conversation
from runs.failures import reason
from self_speculation.engine import scheduler

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you")
NAN = "the model's logits are not numbers (NaN)"
OUT_OF_MEMORY = (
    "out of memory; less takes a shorter prompt, a lower --max_steps, --dtype half, --quantization"
)


@pytest.fixture
def common(model_folder):
    return ["--model", str(model_folder), "--max_steps", "6", "--sample", "False"]


@pytest.fixture
def fails_at(monkeypatch):
    """Passes over the prompts numbered first to last raise an error, or have NaN logits. A warm-up counts."""

    def arrange(error, first, last=99):
        forward = scheduler.prefill
        seen = []

        def failing(*args):
            for logits in (of_prompts := forward(*args)):
                seen.append(1)
                is_wrong = first < len(seen) <= last + 1
                if is_wrong and error is not NAN:
                    raise error
                if is_wrong:
                    logits.fill_(torch.nan)
            return of_prompts

        monkeypatch.setattr(scheduler, "prefill", failing)

    return arrange


def by_batch(common):
    return benchmark.main([*common, "--batch_size", "2"])


def by_eval(common):
    return eval_script.main([*common[:4], *PYTHON_FUNCTIONS, "--limit", "3", *common[6:8], *common[-2:]])


def by_sweep(common):
    return sweep.main([*common, "--exit_layer_last", "1", "--num_speculations_last", "1"])


@pytest.mark.parametrize(
    ("main", "error", "where", "says", "kept"),
    [
        (benchmark.main, CUDA, [3], f"example 2: {OUT_OF_MEMORY}", "; 2 of 4 examples are kept, go on with"),
        (by_batch, NAN, [4, 4], f"example 2: {NAN}: its weights", "; 3 of 4 examples are kept, go on with"),
        (by_batch, CUDA, [4], "example 2: out of memory; less takes a --batch_size below 2", "; 2 of 4"),
        (by_sweep, NAN, [4], str(NAN), "; 4 of 4 examples are kept"),
        (by_eval, CUDA, [1], OUT_OF_MEMORY, "--quantization int8"),
    ],
)
@pytest.mark.usefixtures("few_files_are_read")
def test_a_run_names_the_example_and_keeps_the_others(
    main, error, where, says, kept, model_folder, tmp_path, fails_at, capsys
):
    """Guards against a traceback, and examples that are lost with the one that failed, or blamed for it."""
    fails_at(error, *where)
    assert main([*small_run(model_folder, tmp_path, 4, 6), "--sample", "False"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(says)
    assert kept in line


@pytest.mark.parametrize("loading", [True, False])
def test_one_prompt_ends_in_one_line(loading, common, fails_at, monkeypatch, capsys):
    """Guards against a traceback, and status 2, which says that flags are wrong."""
    if loading:
        load = "self_speculation.loading.loading.AutoModelForCausalLM.from_pretrained"
        monkeypatch.setattr(load, Mock(side_effect=CUDA))
    fails_at(CUDA, 0)
    with pytest.raises(SystemExit, match="1"):
        program.run(lambda: generate.main([*common, "--prompt", "Once"]))
    errors = capsys.readouterr().err
    assert (OUT_OF_MEMORY in errors, errors.count("\n") - WITHOUT_OPERATORS) == (True, 1)


def test_a_conversation_goes_on(common, fails_at, monkeypatch, capsys):
    """Guards against a conversation that ends, or that has the failed prompt in the history."""
    session = Mock(prompt=Mock(side_effect=["one", "two", "three", EOFError]))
    monkeypatch.setattr("runs.terminal.PromptSession", lambda **_: session)
    monkeypatch.setattr("runs.terminal._unechoed", nullcontext)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    encoded = watch(monkeypatch, Conversation, "_encoded")
    fails_at(CUDA, 1, 1)
    assert generate.main([*common, "--chat", "True"]) == 0
    (talk, _), _ = encoded[-1]
    assert [m["content"] for m in talk.messages if m["role"] == "user"] == ["one", "three"]
    errors = capsys.readouterr().err
    assert (errors.count(f"error: {OUT_OF_MEMORY}"), errors.count("tokens in")) == (1, 2)


def test_out_of_memory_is_told_from_other_errors(capsys):
    """Guards against a mistake that is explained away, and a traceback where the error comes wrapped."""
    wrapped = ValueError("cannot load")
    wrapped.__cause__ = CPU
    unmapped = OSError(errno.ENOMEM, "Cannot allocate memory")
    operator = RuntimeError(
        "aoti_torch_empty_strided(n, shape.begin()) API call failed at few_bits.h, line 457"
    )
    for error in (CUDA, CPU, MemoryError(), wrapped, unmapped, operator):
        assert reason(error).startswith(OUT_OF_MEMORY)
    assert reason(MemoryError("cache of 9 GiB")).startswith("out of memory: cache of 9 GiB; less")
    with pytest.raises(RuntimeError, match="mat1"):
        program.run(Mock(side_effect=RuntimeError("mat1 and mat2 shapes cannot be multiplied")))
    assert capsys.readouterr().err == ""
