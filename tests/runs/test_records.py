"""The folder of a run: records survive, and a resumed run is the same run."""

import errno
import subprocess
from unittest.mock import Mock

import pytest
from conftest import ROOT
from helpers import about, only_run, refused

import benchmark
from runs.records import RecordError, Run, describe

DESCRIPTION = {"script": "test", "arguments": {"seed": 1}}


@pytest.fixture
def run(tmp_path):
    return Run.open(str(tmp_path), None, DESCRIPTION)


def test_two_runs_that_begin_together_have_folders_of_their_own(tmp_path):
    """Guards against a run that writes into the folder of another one."""
    folders = {Run.open(str(tmp_path), None, DESCRIPTION).folder for _ in range(3)}
    assert len(folders) == 3


def test_a_full_disk_keeps_what_is_written(run, monkeypatch):
    """Guards against records that a power cut loses, a run.json that is cut short, and partial files."""
    run.append({"index": 0})
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr("runs.records.os.fsync", full)
    with pytest.raises(RecordError, match=r"records.jsonl: No space left on device"):
        run.append({"index": 1})
    with pytest.raises(RecordError, match="No space left"):
        run.write_status("finished")
    assert about(run.folder)["status"] == "running"
    assert sorted(path.name for path in run.folder.iterdir()) == ["records.jsonl", "run.json"]


def test_a_run_names_its_commit_where_there_is_one(tmp_path, monkeypatch):
    """Guards against figures of unknown code, and a copy without git that cannot run."""
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    commit = describe("test", [])["commit"]
    assert (commit or "").removesuffix("-dirty") == head
    monkeypatch.setattr("runs.records.__file__", str(tmp_path / "runs" / "records.py"))
    assert describe("test", [])["commit"] is None


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
