"""The programs under benchmarks/: what they compare is the same work, and what they print parses."""

import importlib.util
import json
import math
import sys

import forks
import pytest
from conftest import ROOT

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


def test_long_context(measured):
    """Guards against a cache of another size than computed."""
    record = measured("long_context", "--contexts", "20", "3000", "--new_tokens", "3", "--rounds", "1")
    short, long = record["contexts"]
    # 2 (keys and values) x 4 layers x 2 heads x 8 wide x 4 bytes, for the prompt and 3 tokens
    assert long["cache MiB"] == pytest.approx(3003 * 512 / 2**20)
    assert long["peak MiB"] > long["cache MiB"] > short["cache MiB"]
    assert math.isfinite(long["attention ms grown"])  # which way it grew is for a quiet machine to say


@pytest.mark.parametrize("right", [True, False])
def test_soak(right, monkeypatch, capsys):
    """Guards against a soak that compares nothing."""
    path = ROOT / "benchmarks" / "soak.py"
    spec = importlib.util.spec_from_file_location("soak", path)
    soak = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "soak", soak)
    spec.loader.exec_module(soak)
    if not right:
        monkeypatch.setattr(soak, "by_transformers", lambda generator, prompt: [0] * 64)
    generations = 7 if right else 1  # one of each kind; the first is compared with transformers
    arguments = ["--generations", str(generations), "--prompts", "1", "--allowed_growth", "500"]
    monkeypatch.setattr(sys, "argv", ["soak.py", *arguments])
    assert soak.main() == (0 if right else 1)
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["generations"] == generations
    assert (record["wrong"] == 0) == right
