"""Out of memory, and logits that are no numbers, in the middle of the work: one line, and nothing is lost."""

import json
import signal
from contextlib import nullcontext

import pytest
import torch
from conftest import ROOT
from helpers import custom_data, no_calibration, only_run

import benchmark
import eval as eval_script
import generate
import sweep
from runs import program
from runs.conversation import Conversation
from runs.failures import reason
from self_speculation.autoregressive_generator import AutoRegressiveGenerationStrategy
from self_speculation.model.model_runner import ModelRunner

ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
    "cpu": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you"
    ),
    "python": MemoryError(),
    "nan": FloatingPointError("the model's logits are not numbers (NaN)"),
}
SAID = {"nan": "the model's logits are not numbers"}
OUT_OF_MEMORY = (
    "out of memory; less takes a shorter prompt, a lower --max_steps, --dtype half, --quantization"
)
SPECULATION = ["--generation_strategy", "self_speculative", "--exit_layer", "2", "--num_speculations", "3"]


@pytest.fixture
def common(model_folder, tmp_path):
    return [
        "--model", str(model_folder), "--output_dir", str(tmp_path / "logs"), "--max_steps", "6",
        "--sample", "False",
    ]  # fmt: skip


@pytest.fixture
def dataset(common, tmp_path):
    return [*common, "--num_samples", "4", "--dataset", "custom_jsonl", "--data_path", custom_data(tmp_path)]


@pytest.fixture
def fails_at(monkeypatch):
    """Passes of the answers numbered first to last raise an error; 0 is the first one, a warm-up too."""

    def arrange(error, first, last=100):
        begin, run, answers = AutoRegressiveGenerationStrategy.begin, ModelRunner.run, []

        def counted(self, *args):
            answers.append(1)
            return begin(self, *args)

        def maybe(self, *args):
            if first < len(answers) <= last + 1:
                raise error
            return run(self, *args)

        monkeypatch.setattr(AutoRegressiveGenerationStrategy, "begin", counted)
        monkeypatch.setattr(ModelRunner, "run", maybe)

    return arrange


@pytest.mark.parametrize("kind", ERRORS)
def test_a_dataset_run_names_the_example_and_keeps_the_others(kind, dataset, fails_at, tmp_path, capsys):
    fails_at(ERRORS[kind], 1 + 2)  # the warm-up, and two examples
    assert benchmark.main(dataset) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"example 2: {SAID.get(kind, OUT_OF_MEMORY)}")
    assert line.endswith(f"; 2 of 4 examples are kept, go on with --resume {only_run(tmp_path)}")


def test_a_sweep_names_the_cell(dataset, fails_at, capsys):
    fails_at(ERRORS["cuda"], 1 + (1 + 4) + 1)
    assert sweep.main([*dataset, "--mode", "measured", "--exit_layer_last", "2"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"exit layer 1, 2 drafted: {OUT_OF_MEMORY}")
    assert "; 1 of 12 cells are kept, go on with --resume" in said


def test_a_cell_that_is_verified_is_named_too(dataset, monkeypatch, capsys):
    """Guards against a traceback out of the cells that a predicted sweep measures in the end."""
    no_calibration(monkeypatch)

    def fails(*_, **__):
        yield 1, MemoryError()

    monkeypatch.setattr("measures.sweeping.measure_examples", fails)
    grid = ["--exit_layer_last", "1", "--num_speculations_last", "1", "--verify_top", "1"]
    assert sweep.main([*dataset, *grid]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"exit layer 1, 1 drafted: {OUT_OF_MEMORY}")


@pytest.mark.usefixtures("few_files_are_read")
@pytest.mark.parametrize("kind", ["cuda", "nan"])
def test_an_evaluation_names_the_document(kind, common, fails_at, capsys):
    tasks = ["--include_path", str(ROOT / "eval_tasks"), "--tasks", "python_functions", "--limit", "3"]
    fails_at(ERRORS[kind], 1 + 1)
    assert eval_script.main([*common, *tasks]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"python_functions, document 1: {SAID.get(kind, OUT_OF_MEMORY)}")
    assert line.endswith("--use_cache PATH would have kept answers to go on from")


@pytest.mark.parametrize("kind", ERRORS)
def test_one_prompt_ends_in_one_line(kind, common, fails_at, monkeypatch, capsys):
    fails_at(ERRORS[kind], 0)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        program.run(lambda: generate.main([*common, "--prompt", "Once"]))
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert f"error: {SAID.get(kind, OUT_OF_MEMORY)}" in said
    assert said.count("\n") == 1


def test_other_errors_are_not_explained_away(common, fails_at):
    """A mistake of the program must show its traceback."""
    fails_at(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 0)
    with pytest.raises(RuntimeError, match="mat1"):
        program.run(lambda: generate.main([*common, "--prompt", "Once"]))


def test_while_loading(common, monkeypatch, capsys):
    def fails(*_, **__):
        raise ERRORS["cuda"]

    monkeypatch.setattr("self_speculation.model.loading.AutoModelForCausalLM.from_pretrained", fails)
    with pytest.raises(SystemExit) as end:
        generate.main([*common, "--prompt", "Once"])
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert OUT_OF_MEMORY in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("kind", ERRORS)
def test_a_conversation_goes_on(kind, common, fails_at, monkeypatch, capsys):
    """What failed is not part of it, what came before is."""
    prompts = iter(["one", "two", "three"])

    def ask(_):
        try:
            return next(prompts)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("runs.conversation._session", lambda: None)
    monkeypatch.setattr("runs.conversation._ask", ask)
    monkeypatch.setattr("runs.conversation._unechoed", nullcontext)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    answer, asked = Conversation._ids, []

    def ids(self, prompt):
        asked.append([message["content"] for message in self._messages if message["role"] == "user"])
        return answer(self, prompt)

    monkeypatch.setattr(Conversation, "_ids", ids)
    fails_at(ERRORS[kind], 1, 1)
    assert generate.main([*common, "--chat", "True"]) == 0
    assert asked == [[], ["one"], ["one"]]
    said = capsys.readouterr().err
    assert said.count(f"error: {SAID.get(kind, OUT_OF_MEMORY)}") == 1
    assert said.count("tokens in") == 2


def test_out_of_memory_is_told_from_other_errors():
    """Guards against a mistake of the program that is explained away, and against a traceback where an error
    of the memory comes wrapped.
    """
    assert all(reason(error).startswith("out of memory") == (kind != "nan") for kind, error in ERRORS.items())
    assert reason(MemoryError("the cache takes 9 GiB")).startswith(
        "out of memory: the cache takes 9 GiB; less"
    )
    wrapped = ValueError("cannot load")
    wrapped.__cause__ = ERRORS["cpu"]
    assert reason(wrapped).startswith("out of memory")
    assert reason(RuntimeError("size mismatch")) is None


def test_a_measured_sweep_of_empty_answers(dataset, tmp_path, capsys):
    """Every id ends an answer. Guards against quartiles of nothing."""
    ends = ["--stop_token_ids", *map(str, range(400))]
    flags = [*dataset, *ends, "--exit_layer_last", "2", "--num_speculations_last", "1"]
    assert sweep.main([*flags, "--mode", "measured"]) == 0
    assert "no answers to compare: all are empty" in capsys.readouterr().out
    folder = only_run(tmp_path)
    assert json.loads((folder / "run.json").read_text())["metrics"]["best"] is None
    with pytest.raises(SystemExit):
        benchmark.main([*dataset, "--tuned", str(folder)])
    assert "no answers to compare in there" in capsys.readouterr().err
