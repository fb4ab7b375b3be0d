"""The folder of a run: records survive, and a resumed run is the same run."""

import dataclasses
import errno
import subprocess
from unittest.mock import Mock

import pytest
from conftest import ROOT
from helpers import about, only_run, refused

import benchmark
from arguments import MAY_DIFFER
from runs.records import RecordError, Run, check_same_run, describe
from training.flags import MAY_GROW

DESCRIPTION = {"script": "test", "arguments": {"seed": 1}, "dataset_fingerprint": "x"}


@pytest.fixture
def run(tmp_path):
    return Run.create(str(tmp_path), "test", DESCRIPTION)


def test_two_runs_that_begin_together_have_folders_of_their_own(tmp_path):
    """Guards against a run that writes into the folder of another one."""
    folders = {Run.create(str(tmp_path), "test", DESCRIPTION).folder for _ in range(3)}
    assert len(folders) == 3


def test_a_full_disk_keeps_what_is_written(run, monkeypatch):
    """Guards against records that a power cut loses, a run.json that is cut short, and partial files."""
    run.append({"index": 0})
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr("runs.records.os.fsync", full)
    with pytest.raises(RecordError, match=r"records.rank0.jsonl: No space left on device"):
        run.append({"index": 1})
    with pytest.raises(RecordError, match="No space left"):
        run.say("finished")
    assert about(run.folder)["status"] == "running"
    assert sorted(path.name for path in run.folder.iterdir()) == ["records.rank0.jsonl", "run.json"]


def test_resuming_with_other_arguments_names_the_difference(tmp_path):
    """Guards against records of two runs in one file, and a --resume that refuses harmless changes."""

    @dataclasses.dataclass
    class Flags:
        seed: int = 1
        steps: int = dataclasses.field(default=5, metadata=MAY_GROW)
        verbose: bool = dataclasses.field(default=False, metadata=MAY_DIFFER)
        resume: str | None = None

    def described(flags, **facts):
        return {**describe("test", [flags], "x"), "model": "m", "device": "d", "dtype": "t", **facts}

    def resumed(flags, **facts):
        check_same_run(folder, described(flags, **facts), [flags])

    older = described(Flags())
    del older["arguments"]["verbose"], older["arguments"]["steps"]  # of a version without these flags
    folder = str(Run.create(str(tmp_path), "test", older).folder)
    resumed(Flags(verbose=True, steps=6, resume=folder), num_ranks=2)
    for flags, message in (
        (Flags(seed=2), "--seed 1, this"),
        (Flags(steps=4), "--steps 5, this"),
    ):
        with pytest.raises(RecordError, match=f"that run had {message}"):
            resumed(flags)
    for key in ("dataset_fingerprint", "device", "model", "dtype"):
        with pytest.raises(RecordError, match=f"that run had {key} .*, this one has 'y'"):
            resumed(Flags(), **{key: "y"})


def test_a_run_names_its_commit_where_there_is_one(tmp_path, monkeypatch):
    """Guards against figures of unknown code, and a copy without git that cannot run."""
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    commit = describe("test", [], "x")["commit"]
    assert (commit or "").removesuffix("-dirty") == head
    monkeypatch.setattr("runs.records.__file__", str(tmp_path / "runs" / "records.py"))
    assert describe("test", [], "x")["commit"] is None


@pytest.mark.parametrize("content", ["{}", "[]", "{", None])
def test_a_folder_without_a_run_cannot_be_resumed(content, tmp_path):
    """Guards against a traceback of json."""
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with pytest.raises(RecordError, match=r"no run.json"):
        Run.resume(str(tmp_path), DESCRIPTION)


def test_a_full_disk_is_refused_before_anything_is_loaded(common, tmp_path, capsys, monkeypatch):
    """Guards against minutes of loading before the error."""
    assert benchmark.main(common) == 0
    folder = only_run(tmp_path)
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("runs.failures.os.fsync", Mock(side_effect=full))
    monkeypatch.setattr("runs.examples.load_examples", lambda *_: pytest.fail("data are read"))
    for flag, path in (("--output_dir", folder.parent), ("--resume", folder)):
        line = refused(benchmark.main, [*common, flag, str(path)], capsys)
        assert line.endswith(f"{flag} {path}: cannot be written (No space left on device)")
