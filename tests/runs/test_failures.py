"""Too little memory and NaN logits end the work in one line of error, and nothing is lost."""

import json
import sys
from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch
from helpers import PYTHON_FUNCTIONS, about, only_run, small_run, watch

import benchmark
import eval as eval_script
import generate
import sweep
from runs import program
from runs.conversation import Conversation
from runs.failures import reason
from self_speculation import scheduler
from self_speculation.decoding.batch import Batch
from self_speculation.passes.model_runner import ModelRunner
from self_speculation.scheduler import Scheduler

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you")
NAN = FloatingPointError("the model's logits are not numbers (NaN)")
OUT_OF_MEMORY = (
    "out of memory; less takes a shorter prompt, a lower --max_steps, --dtype half, --quantization"
)
SAID = [(CUDA, OUT_OF_MEMORY), (NAN, str(NAN))]


@pytest.fixture
def dataset(model_folder, tmp_path):
    return [*small_run(model_folder, tmp_path, 4, 6), "--sample", "False"]


@pytest.fixture
def common(model_folder):
    return ["--model", str(model_folder), "--max_steps", "6", "--sample", "False"]


@pytest.fixture
def fails_at(monkeypatch):
    """Passes of the answers numbered first to last raise an error; 0 is the first one, a warm-up too."""

    def arrange(error, first, last=100):
        run, make_slots, answers = ModelRunner.run, Scheduler._make_slots, []

        def maybe(self, *args, **kwargs):
            if first < len(answers) <= last + 1:
                raise error
            return run(self, *args, **kwargs)

        def counted(self, runner):
            answers.extend([] if self._strategy.has_drafts else [1])
            return make_slots(self, runner)

        monkeypatch.setattr(Scheduler, "_make_slots", counted)
        monkeypatch.setattr(ModelRunner, "run", maybe)

    return arrange


def last_line(capsys):
    return capsys.readouterr().err.splitlines()[-1]


def test_an_output_that_is_closed(monkeypatch):
    """As `generate.py >&-`. Guards against a traceback of what asks whether it is a terminal."""
    monkeypatch.setattr("sys.stdout", None)
    with pytest.raises(SystemExit) as ended:
        program.run(lambda: print("an answer", file=sys.stdout) or 0)
    assert ended.value.code == 0


def by_eval(common):
    return eval_script.main([*common[:4], *PYTHON_FUNCTIONS, "--limit", "3", *common[6:8], *common[-2:]])


def by_sweep(common):
    return sweep.main([*common, "--exit_layer_last", "1", "--num_speculations_last", "1"])


@pytest.mark.parametrize(
    ("main", "error", "first", "says", "kept"),
    [
        (benchmark.main, CUDA, 3, f"example 2: {OUT_OF_MEMORY}", "; 2 of 4 examples are kept"),
        (by_sweep, NAN, 6, f"exit layer 1, 1 drafted: {NAN}", "; 4 of 4 examples are kept"),
        (by_eval, CUDA, 1, "out of memory; less takes a smaller --batch_size", "; --use_cache PATH would"),
    ],
)
@pytest.mark.usefixtures("few_files_are_read")
def test_a_run_names_the_example_and_keeps_the_others(
    main, error, first, says, kept, dataset, fails_at, capsys
):
    """Guards against a traceback, and examples that are lost with the one that failed."""
    fails_at(error, first)
    assert main(dataset) == 1
    line = last_line(capsys)
    assert line.startswith(says)
    assert kept in line


@pytest.mark.parametrize("loading", [True, False])
def test_one_prompt_ends_in_one_line(loading, common, fails_at, monkeypatch, capsys):
    """Guards against a traceback, and status 2, which says that flags are wrong."""
    if loading:
        load = "self_speculation.loading.loading.AutoModelForCausalLM.from_pretrained"
        monkeypatch.setattr(load, Mock(side_effect=CUDA))
    fails_at(CUDA, 0)
    with pytest.raises(SystemExit) as end:
        program.run(lambda: generate.main([*common, "--prompt", "Once"]))
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert OUT_OF_MEMORY in said
    assert said.count("\n") == 1


def test_other_errors_are_not_explained_away(common, fails_at):
    """Guards against a mistake of the program without its traceback."""
    fails_at(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 0)
    with pytest.raises(RuntimeError, match="mat1"):
        program.run(lambda: generate.main([*common, "--prompt", "Once"]))


@pytest.mark.parametrize(("error", "says"), SAID)
def test_a_conversation_goes_on(error, says, common, fails_at, monkeypatch, capsys):
    """Guards against a conversation that ends, or that has the failed prompt in its history."""
    session = Mock(prompt=Mock(side_effect=["one", "two", "three", EOFError]))
    monkeypatch.setattr("runs.terminal._session", lambda: session)
    monkeypatch.setattr("runs.terminal._unechoed", nullcontext)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    encoded = watch(monkeypatch, Conversation, "_encoded")
    fails_at(error, 1, 1)
    assert generate.main([*common, "--chat", "True"]) == 0
    (talk, _), _ = encoded[-1]
    assert [m["content"] for m in talk._messages if m["role"] == "user"] == ["one", "three"]
    said = capsys.readouterr().err
    assert said.count(f"error: {says}") == 1
    assert said.count("tokens in") == 2


def test_out_of_memory_is_told_from_other_errors():
    """Guards against a mistake that is explained away, and a traceback where the error comes wrapped."""
    wrapped = ValueError("cannot load")
    wrapped.__cause__ = CPU
    for error in (CUDA, CPU, MemoryError(), wrapped):
        assert reason(error).startswith(OUT_OF_MEMORY)
    assert reason(MemoryError("cache of 9 GiB")).startswith("out of memory: cache of 9 GiB; less")
    assert reason(RuntimeError("size mismatch")) is None


def test_an_example_without_numbers_is_named_and_its_neighbours_are_kept(
    dataset, tmp_path, monkeypatch, capsys
):
    """Guards against a NaN that ends the batch, or that is blamed on the example at its place in there."""
    forward, prompts = scheduler.forward_pieces, []

    def damaged(*args):
        for logits in (of_prompts := forward(*args)):
            prompts.append(1)
            if len(prompts) == 2 + 3:  # two warm up
                logits.fill_(torch.nan)
        return of_prompts

    monkeypatch.setattr(scheduler, "forward_pieces", damaged)
    assert benchmark.main([*dataset, "--batch_size", "2"]) == 1
    line = last_line(capsys)
    said = "the model's logits are not numbers (NaN): its weights are damaged, or need --dtype float32"
    assert line.startswith(f"example 2: {said}; 3 of 4")
    assert "examples are kept, go on with --resume" in line
    records = (only_run(tmp_path) / "records.jsonl").read_text().splitlines()
    assert {json.loads(record)["index"] for record in records} == {0, 1, 3}


def test_out_of_memory_in_a_batch_asks_for_a_smaller_one(dataset, monkeypatch, capsys):
    """Guards against a traceback, and advice that leaves out the flag that helps."""
    sample_and_commit, rounds = Batch.sample_and_commit, []

    def fails(self, *args):
        rounds.append(len(self))
        if rounds.count(2) > 12:
            raise CUDA
        return sample_and_commit(self, *args)

    monkeypatch.setattr(Batch, "sample_and_commit", fails)
    assert benchmark.main([*dataset, "--batch_size", "2"]) == 1
    line = last_line(capsys)
    assert line.startswith("out of memory; less takes a --batch_size below 2, a shorter prompt")
    assert "of 4 examples are kept, go on with --resume" in line


def test_a_measured_sweep_of_empty_answers(dataset, tmp_path, capsys):
    """Guards against statistics of nothing: every id ends an answer."""
    ends = ["--stop_token_ids", *map(str, range(400))]
    flags = [*dataset, *ends, "--exit_layer_last", "2", "--num_speculations_last", "1"]
    assert sweep.main([*flags, "--mode", "measured"]) == 0
    assert "no answers to compare: all are empty" in capsys.readouterr().out
    assert about(only_run(tmp_path))["metrics"]["best"] is None
