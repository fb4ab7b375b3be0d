"""The programs under benchmarks/: what they compare is the same work, and what they print parses."""

import importlib.util
import json
import math
import sys

import forks
import pytest
import torch
from conftest import ROOT, generate, tiny_llama
from helpers import only_run
from transformers import LlamaConfig

from measures.comparison import Judged, judge_greedy
from measures.sides import ours_batched, theirs_batched
from measures.synthetic import random_llama
from self_speculation import GenerationConfig

ADAPTER = """
def load(model, tokenizer):
    def generate(ids, max_new_tokens):
        return model.generate(model.base_model.embed_tokens.weight.new_tensor([ids]).long(), do_sample=False,
                              max_new_tokens=max_new_tokens)[0, len(ids):].tolist()
    return generate
"""


@pytest.fixture
def measured(endless_folder):
    """The last line of a program's output, on a tiny model."""

    def run(name, *args):
        done = forks.run(ROOT / f"benchmarks/{name}.py", "--model", endless_folder, *args)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def test_side_by_side(measured, tmp_path):
    """Guards against a comparison of different outputs, or of drafts of different lengths: transformers reads
    its draft length from another place than `generate`'s arguments.
    """
    (tmp_path / "other.py").write_text(ADAPTER)
    record = measured(
        "side_by_side", "--exit_layer", "2", "--num_speculations", "3", "--max_steps", "9", "--rounds", "1",
        "--num_prompts", "2", "--adapter", tmp_path / "other.py", "--picture", tmp_path / "bars",
    )  # fmt: skip
    sides = {row["side"]: row for row in record["sides"]}
    assert len(sides) == 7
    assert all(row["same ids"] == 2 and row["tokens/s"] > 0 for row in sides.values())
    assert sides["transformers, early exit"]["tokens/pass"] == pytest.approx(
        sides["ours, self-speculative"]["tokens/pass"], rel=0.35
    )
    assert 0 < record["outside_layers_and_head"] < 1
    assert (tmp_path / "bars.png").stat().st_size > 10_000


def test_side_by_side_in_batches(measured, tmp_path):
    """Guards against padding that counts as tokens, and a side whose rows are those of other prompts."""
    record = measured(
        "side_by_side", "--exit_layer", "2", "--num_speculations", "3", "--max_steps", "9", "--rounds", "2",
        "--num_prompts", "5", "--batch_size", "1", "3", "--picture", tmp_path / "lines",
    )  # fmt: skip
    assert [(row["batch size"], row["side"].split(", ")[-1]) for row in record["rows"]] == [
        (size, side)
        for size in (1, 3)
        for side in ("transformers", "autoregressive", "self-speculative", "adaptive")
    ]
    assert all(row["same ids"] == 5 and row["tokens/s"] > 0 for row in record["rows"])
    assert all(row["ratio"] == 1 for row in record["rows"] if row["side"] == "transformers")
    assert (tmp_path / "lines.png").stat().st_size > 10_000


def test_what_follows_the_end_of_a_padded_row_does_not_count():
    """Guards against a throughput of transformers that counts the padding of rows that have ended."""
    model, prompts = tiny_llama(), [[5, 9, 4, 7], [7]]
    settings = GenerationConfig(max_steps=12, sample=False)
    ends = [generate(model, prompts[0], max_steps=12, eos=[]).predicted_tokens[4]]
    padded = theirs_batched(model, ends, settings, 2)(prompts)
    assert padded == ours_batched(model, ends, settings, 2)(prompts)
    assert len(padded[0]) <= 5


def test_adaptive(measured):
    """Guards against a workload, a way of picking or a fixed setting that is missing."""
    record = measured(
        "adaptive", "--max_steps", "6", "--num_prompts", "1", "--searched", "1", "--lengths", "2",
        "--finalists", "1", "--draft_weights", "int8", "--workloads", "code", "repeat",
    )  # fmt: skip
    rows = record["rows"]
    assert [(row["picking"], row["workload"]) for row in rows if row["side"] == "adaptive"] == [
        (picking, workload) for picking in ("greedy", "sampled") for workload in ("code", "repeat")
    ]
    assert len(rows) == 8
    assert all(row["x plain"] > 0 for row in rows)


def test_host_time():
    """Guards against drafts that are not all accepted: then it is not the host's time for accepted ones."""
    arguments = ("--num_layers", "4", "--exit_layer", "1", "--new_tokens", "9", "--rounds", "1")
    done = forks.run(ROOT / "benchmarks/host_time.py", *arguments)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["acceptance_rate"] == 1


def test_long_context(measured):
    """Guards against a cache of another size than computed."""
    record = measured("long_context", "--contexts", "20", "3000", "--new_tokens", "3", "--rounds", "1")
    short, long = record["contexts"]
    # 2 (keys and values) x 4 layers x 2 heads x 8 wide x 4 bytes, for the prompt and 3 tokens
    assert long["cache MiB"] == pytest.approx(3003 * 512 / 2**20)
    assert long["peak MiB"] > long["cache MiB"] > short["cache MiB"]
    assert math.isfinite(long["attention ms grown"])  # which way it grew is for a quiet machine to say


@pytest.fixture
def program(monkeypatch):
    """A program of benchmarks/ as a module, in this process."""

    def load(name):
        spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.mark.parametrize("right", [True, False])
def test_soak(right, program, monkeypatch, capsys):
    """Guards against a soak that compares nothing."""
    soak = program("soak")
    if not right:
        monkeypatch.setattr(soak, "by_transformers", lambda generator, prompt: [0] * 64)
    generations = 7 if right else 1  # one of each kind; the first is compared with transformers
    arguments = ["--generations", str(generations), "--prompts", "1", "--allowed_growth", "500"]
    monkeypatch.setattr(sys, "argv", ["soak.py", *arguments])
    assert soak.main() == (0 if right else 1)
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["generations"] == generations
    assert (record["wrong"] == 0) == right


DRY = ["--dry", "True", "--models", "Llama-3.2-1B", "--prompts", "128", "--rounds", "1"]
EAGER = ["transformers", "hf, early exit", "autoregressive", "self-speculative", "adaptive"]


def test_gpu_runs_dry(program, tmp_path, capsys):
    """Guards against a side, a column or a check that is missing when a GPU is there at last."""
    assert program("gpu").main([*DRY, "--output_dir", str(tmp_path / "logs")]) == 0
    said = capsys.readouterr().out.splitlines()
    record = json.loads(said[-1])
    assert all(len(line) <= 80 for line in said[:-1] if "run.json" not in line)
    sides = [(row["sampled"], row["compiled"], row["side"]) for row in record["rows"]]
    assert sides == [
        (sampled, compiled, side)
        for compiled in (False, True)
        for sampled in (False, True)
        for side in (EAGER[2:4] if compiled else EAGER)
    ]
    assert (record["wrong"], record["failed"], record["checks"]["wrong"]) == (0, 0, 0)
    assert record["checks"]["answers"] == 2 * 2 * 4 + 2
    for row in record["rows"]:
        assert row["tokens/s"] > 0
        assert row["x transformers"] > 0
        assert row["limit"] > 0
        assert row["ids"] is None if row["sampled"] else row["ids"]["equal"] > 0
        assert (row["kernels"] is None) == row["compiled"]
        if row["side"] != "adaptive":  # whether that drafts, depends on times
            assert (row["acceptance"] is None) == (row["side"] in ("transformers", "autoregressive"))
    by_side = {row["side"]: row for row in record["rows"][:5]}
    # A plain token takes all weights; of two sides that draft alike, the acceptance is alike.
    assert by_side["self-speculative"]["gb_per_token"] < 2 * by_side["autoregressive"]["gb_per_token"]
    assert by_side["self-speculative"]["acceptance"] == pytest.approx(
        by_side["hf, early exit"]["acceptance"], abs=0.35
    )
    assert by_side["autoregressive"]["reads"] == 1
    assert (only_run(tmp_path) / "gpu.png").stat().st_size > 10_000
    rows = (only_run(tmp_path) / "records.jsonl").read_text().splitlines()
    assert [json.loads(row) for row in rows] == record["rows"]


def test_gpu_stops_at_its_limit_and_keeps_what_it_has(program, tmp_path, capsys):
    """No minutes: nothing is measured. A limit that is reached in the middle: whole turns are kept."""
    gpu = program("gpu")
    where = ["--output_dir", str(tmp_path / "logs")]
    assert gpu.main([*DRY, *where, "--minutes", "0"]) == 0
    said = capsys.readouterr().out
    record = json.loads(said.splitlines()[-1])
    assert (record["rows"], record["stopped_by_limit"]) == ([], True)
    assert "stopped after 0 minutes" in said
    sides = {"a": gpu.Measured(answers=[1, 2]), "b": gpu.Measured(answers=[3]), "c": gpu.Measured(error="x")}
    assert [len(side.answers) for side in gpu._complete(sides).values()] == [1, 1, 0]
    assert gpu._complete({"a": gpu.Measured(answers=[1]), "b": gpu.Measured()}) == {}


def test_gpu_goes_on_when_a_side_fails(program, tmp_path, monkeypatch, capsys):
    """A kernel that refuses its input costs one row, and the exit status."""
    gpu = program("gpu")

    def fails(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmuch")

    monkeypatch.setattr(gpu, "early_exit", lambda *_: fails)
    monkeypatch.setattr(gpu, "check", lambda *_: {"answers": 0, "near_ties": 0, "wrong": 0, "failed": []})
    measure = gpu.measure
    monkeypatch.setattr(
        gpu, "measure", lambda task, compiled, *_: {} if compiled else measure(task, False, *_)
    )
    assert gpu.main([*DRY, "--output_dir", str(tmp_path / "logs")]) == 1
    said = capsys.readouterr().out.splitlines()
    failed = [row for row in json.loads(said[-1])["rows"] if row["error"]]
    assert [row["side"] for row in failed] == ["hf, early exit"] * 2
    assert failed[0]["error"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate"


def test_gpu_without_one(program, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as end:
        program("gpu").main(["--output_dir", str(tmp_path / "logs")])
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert "no GPU on this machine; --dry True runs all of it" in said
    assert said.count("\n") == 1


def test_greedy_ids_are_judged_token_by_token():
    """Decoding and judging both in fp32: a token that is not the model's choice is found wherever it is."""
    model, prompt = tiny_llama(), [5, 9, 4, 7]
    ids = generate(model, prompt, max_steps=12, eos=[]).predicted_tokens
    assert judge_greedy(model, prompt, ids) == Judged(equal=12)
    logits = model(torch.tensor([[*prompt, *ids[:5]]])).logits[0, -1]
    other = [*ids[:5], int(logits.argmin())]
    assert judge_greedy(model, prompt, other) == Judged(equal=5, wrong=1)


def test_a_random_llama_agrees_as_often_as_wanted():
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    for wanted in (0.5, 0.9):
        _, agreement = random_llama(config, 2, wanted, torch.device("cpu"))
        assert agreement == pytest.approx(wanted, abs=0.05)
