"""The folder of a run survives an end of the run. The heading names model, data, settings and machine."""

import dataclasses
import errno
import os
import subprocess
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, needs_operators, own_llama
from helpers import about, refused

import benchmark
from arguments import BatchArguments, GenerationConfig, ModelArguments
from data import DataArguments
from runs.description import describe, describe_model, heading, machine
from runs.failures import Failed
from runs.records import Run
from self_speculation import fuse

DESCRIPTION = {"script": "test", "arguments": {"seed": 1}}


def test_two_runs_that_begin_together_have_folders_of_their_own(tmp_path):
    """Guards against a run that writes into the folder of another one."""
    assert len({Run.open(str(tmp_path), None, DESCRIPTION).folder for _ in range(3)}) == 3


def test_a_full_disk_keeps_what_is_written(tmp_path, monkeypatch):
    """Guards against records that a power cut loses, a run.json that is cut short, and partial files."""
    run = Run.open(str(tmp_path), None, DESCRIPTION)
    run.append({"index": 0})
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr("runs.records.os.fsync", full)
    with pytest.raises(Failed, match=r"records.jsonl: No space left on device"):
        run.append({"index": 1})
    with pytest.raises(Failed, match="No space left"):
        run.write_status("finished")
    assert about(run.folder)["status"] == "running"
    assert sorted(path.name for path in run.folder.iterdir()) == ["records.jsonl", "run.json"]


def test_a_run_names_its_commit_where_there_is_one(tmp_path, monkeypatch):
    """Guards against figures of unknown code, and a copy without git that cannot run."""
    git = ["git", "-C", ROOT, "rev-parse", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    assert (describe("test", [])["commit"] or "").removesuffix("-dirty") == head
    monkeypatch.setattr("runs.description.__file__", str(tmp_path / "runs" / "records.py"))
    assert describe("test", [])["commit"] is None


def test_a_run_leaves_the_index_of_git_alone(tmp_path, monkeypatch):
    """Guards against a lock in the checkout, which a commit meets, and which stays if the run is killed."""

    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        found = subprocess.run(
            ["git", "-C", tmp_path, *who, *words], capture_output=True, text=True, check=True
        )
        return found.stdout.strip()

    tracked = tmp_path / "file"
    tracked.write_text("1")
    git("init")
    git("add", "file")
    git("commit", "-m", "first")
    os.utime(tracked, (1, 1))  # git would note that it is unchanged
    before = (tmp_path / ".git" / "index").read_bytes()
    monkeypatch.setattr("runs.description.__file__", str(tmp_path / "runs" / "description.py"))
    head = git("rev-parse", "HEAD")
    (tmp_path / "other").touch()
    assert describe("test", [])["commit"] == head
    tracked.write_text("2")
    assert describe("test", [])["commit"] == f"{head}-dirty"
    assert (tmp_path / ".git" / "index").read_bytes() == before


def test_a_full_disk_is_refused_before_anything_is_loaded(common, tmp_path, capsys, monkeypatch):
    """Guards against minutes of loading before the error."""
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("runs.failures.tempfile.TemporaryFile", Mock(side_effect=full))
    monkeypatch.setattr("runs.flags.load_examples", lambda *_: pytest.fail("data are read"))
    line = refused(benchmark.main, common, capsys)
    assert line.endswith(f"--output_dir {tmp_path}/logs: cannot be written (No space left on device)")


MACHINE = {
    "model": "a/b", "dtype": "bfloat16", "computed_in": "float32", "device": "cpu",
    "prompts_computed_in": "float32",
    "processor": "a processor", "threads": 2, "num_ranks": 1,
}  # fmt: skip


def run_of(*groups, **facts):
    arguments = {key: value for group in groups for key, value in dataclasses.asdict(group).items()}
    return {**MACHINE, **facts, "arguments": arguments}


def test_a_heading_names_settings_and_machine(tmp_path):
    """Guards against figures of unknown settings, a GPU with the host's threads, and a line that is cut."""
    config = GenerationConfig(exit_layer=3, temperature=0)
    groups = (ModelArguments(fuse=False), config, DataArguments(n_shot=2, num_samples=5), BatchArguments(8))
    named, by = heading(run_of(*groups), left_out=("exit_layer",)).splitlines()
    assert named == "a/b, fuse False, human_eval, n_shot 2, autoregressive, temperature 0"
    assert by == "weights in bfloat16, products in float32, a processor, 2 threads, 1 rank, batch size 8"
    (tmp_path / "tiny").mkdir()
    rounded = run_of(prompts_computed_in="bfloat16", batch_size=1)
    formats = "weights in bfloat16, products in float32, those of prompts in bfloat16"
    assert machine(rounded) == f"{formats}, a processor, 2 threads, 1 rank"
    facts = {"device": "a GPU", "model": str(tmp_path / "tiny"), "num_ranks": 2}
    facts |= dict.fromkeys(("computed_in", "prompts_computed_in"), "bfloat16")
    assert heading(run_of(DataArguments(), **facts)) == "tiny, human_eval\nbfloat16, a GPU, 2 ranks"
    long = (ModelArguments(model_args="a=" + "x/" * 99), DataArguments(template="{message} " * 30), config)
    assert max(map(len, heading(run_of(*long)).splitlines())) <= 100


@needs_operators
@pytest.mark.parametrize("is_rounded", [False, True])
def test_a_run_says_in_which_format_prompts_are_read(is_rounded, monkeypatch):
    """Guards against "products in float32" alone where a processor rounds tokens of prompts to bfloat16, and
    against that remark where transformers' layers decode.
    """
    monkeypatch.setattr("runs.description.rounds_prompts", lambda _: is_rounded)
    model = own_llama().to(torch.bfloat16)
    of_torch = describe_model("a/b", model)
    assert (of_torch["computed_in"], of_torch["prompts_computed_in"]) == ("bfloat16", "bfloat16")
    fuse(model)
    by_operators = describe_model("a/b", model)
    prompts = "bfloat16" if is_rounded else "float32"
    assert (by_operators["computed_in"], by_operators["prompts_computed_in"]) == ("float32", prompts)
