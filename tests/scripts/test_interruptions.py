"""Ctrl-C, a full disk and a kill cost no record: --resume then gives the records of an unbroken run. So do
several ranks. One contract for all scripts that work through examples.
"""

import errno
import json
import signal
from typing import NamedTuple

import forks
import pytest
from conftest import ROOT
from helpers import custom_data, no_calibration, no_pictures, only_run, untimed

import benchmark
import correctness
import sweep

DRAFTS = ["--exit_layer", "2", "--num_speculations", "3"]
SPECULATION = ["--generation_strategy", "self_speculative", *DRAFTS]
GRID = ["--sample", "False", "--exit_layer_last", "2", "--num_speculations_last", "3"]


class Case(NamedTuple):
    script: object
    flags: list[str]
    unit: str = "examples"
    resumed: tuple[str, ...] = ()  # flags that --resume may change

    @property
    def path(self):
        return ROOT / f"{self.script.__name__}.py"


CASES = {
    # Sampled, with a vocabulary that learns ids: an example must not depend on earlier ones of its process.
    "benchmark": Case(benchmark, [*SPECULATION, "--draft_vocabulary", "16", "--no_repeat_ngram_size", "3"]),
    "batches": Case(benchmark, [*SPECULATION, "--batch_size", "3"], resumed=("--batch_size", "2")),
    "correctness": Case(correctness, ["--sample", "False", *DRAFTS]),
    "sweep": Case(sweep, GRID),
    "measured sweep": Case(sweep, [*GRID, "--mode", "measured"], "cells"),
}
every_case = pytest.mark.parametrize("name", CASES)


def only_by_default(which):
    """Every case, all but one of them slow: each takes processes."""
    names = [name if name == which else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
    return pytest.mark.parametrize("name", names)


@pytest.fixture
def common(model_folder, tmp_path, monkeypatch):
    no_calibration(monkeypatch)
    no_pictures(monkeypatch)
    return [
        "--model", str(model_folder), "--output_dir", str(tmp_path / "logs"), "--num_samples", "6",
        "--max_steps", "12", "--dataset", "custom_jsonl", "--data_path", custom_data(tmp_path),
    ]  # fmt: skip


@pytest.fixture
def unbroken(common, tmp_path):
    """The records of a case in a single run."""

    def records(case):
        flags = [*common, *case.flags, "--output_dir", str(tmp_path / "one" / "logs")]
        assert case.script.main(flags) == 0
        return outcome(only_run(tmp_path / "one"))

    return records


# Fields of a measured cell that come from a clock.
TIMED = ("time", "speedup", "speed", "per_second")


def outcome(folder):
    """Records without times, in the order of their indices."""
    rows = sorted(untimed(folder), key=lambda record: record["index"])
    return [{k: v for k, v in row.items() if not any(word in k for word in TIMED)} for row in rows]


def about(folder):
    return json.loads((folder / "run.json").read_text())


ENDINGS = {
    "Ctrl-C": (KeyboardInterrupt(), 130, "interrupted", "interrupted"),
    "full disk": (OSError(errno.ENOSPC, "No space left on device"), 1, "running", "No space left on device"),
}


@every_case
@pytest.mark.parametrize("ending", ENDINGS)
def test_an_early_end_keeps_the_records_and_says_how_to_continue(
    name, ending, common, unbroken, tmp_path, monkeypatch, capsys
):
    """Guards against records that are lost, made twice or differ, and a --resume that needs all flags."""
    case, (error, status, state, why) = CASES[name], ENDINGS[ending]
    expected = unbroken(case)
    capsys.readouterr()

    def write(path, mode, text):
        if path.name == "records.rank0.jsonl" and path.exists() and path.read_text().count("\n") == 2:
            with open(path, mode) as file:
                file.write(text[:9])  # a half-written line
            raise error
        original(path, mode, text)

    from runs.records import _write as original

    monkeypatch.setattr("runs.records._write", write)
    assert case.script.main([*common, *case.flags]) == status
    folder = only_run(tmp_path)
    said = capsys.readouterr().err.splitlines()[-1]
    assert why in said
    assert said.endswith(f"; 2 of 6 {case.unit} are kept, go on with --resume {folder}")
    assert about(folder)["status"] == state
    began = "2020-02-02T02:02:02+00:00"
    (folder / "run.json").write_text(json.dumps({**about(folder), "began": began}))
    kept = (folder / "records.rank0.jsonl").read_text().splitlines()[:2]
    monkeypatch.setattr("runs.records._write", original)
    assert case.script.main(["--resume", str(folder), *case.resumed]) == 0
    assert outcome(folder) == expected
    assert set(kept) <= set((folder / "records.jsonl").read_text().splitlines())
    assert (about(folder)["status"], about(folder)["began"]) == ("finished", began)


@only_by_default("benchmark")
def test_a_kill_keeps_the_records(name, common, unbroken, tmp_path):
    """Guards against a record that is not on the disk yet, and a half-written line that --resume reads."""
    case = CASES[name]
    expected = unbroken(case)
    program = tmp_path / case.path.name
    program.write_text(
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        f"import {case.script.__name__} as script\n"
        "from runs import program, records\n"
        "write = records._write\n"
        "def killed(path, mode, text):\n"
        "    if path.name == 'records.rank0.jsonl' and path.exists():\n"
        "        open(path, mode).write(text[:9])\n"
        f"        os.kill(os.getpid(), {int(signal.SIGKILL)})\n"
        "    write(path, mode, text)\n"
        "records._write = killed\n"
        "program.run(script.main)\n"
    )
    assert forks.run(program, *common, *case.flags).returncode == -signal.SIGKILL
    folder = only_run(tmp_path)
    assert about(folder)["status"] == "running"
    assert (folder / "records.rank0.jsonl").read_text().count("\n") == 1
    assert case.script.main(["--resume", str(folder), *case.resumed]) == 0
    assert outcome(folder) == expected


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
@only_by_default("sweep")  # test_benchmark.py has two ranks, too
def test_ranks_give_the_records_of_one(name, ranks, common, unbroken, tmp_path):
    """Guards against draws that depend on the rank, and examples that are done twice or not at all."""
    case = CASES[name]
    expected = unbroken(case)
    result = forks.run_ranks(ranks, case.path, *common, *case.flags)
    assert result.returncode == 0, result.stderr
    assert outcome(only_run(tmp_path)) == expected
    assert result.stdout.count(f", {ranks} ranks, batch size") == 1  # one rank prints


def test_a_rank_that_fails_ends_the_run_with_its_message(common, tmp_path):
    """Guards against ranks that wait for it, and a rank that waits for the others before it says why."""
    program = tmp_path / "program.py"
    program.write_text(
        f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "import benchmark\n"
        "from measures.benchmarking import Benchmark\n"
        "from runs.program import run\n"
        "def records(self, indices): raise TypeError('rank 1 broke')\n"
        "if os.environ['RANK'] == '1': Benchmark.records = records\n"
        "run(benchmark.main)\n"
    )
    result = forks.run_ranks(2, program, *common)
    assert result.returncode != 0
    assert "rank 1 broke" in result.stderr


@pytest.mark.parametrize("name", ["benchmark", "correctness"])
def test_a_resumed_run_keeps_its_arguments(name, common, tmp_path, capsys):
    """Guards against a run continued with other settings, or by another script."""
    case = CASES[name]
    assert case.script.main([*common, *case.flags]) == 0
    folder = str(only_run(tmp_path))
    other = correctness if case.script is benchmark else benchmark
    for script, flags, said in (
        (case.script, ["--exit_layer", "1"], "that run had --exit_layer 2, this one has 1"),
        (case.script, ["--max_steps=7"], "that run had --max_steps 12, this one has 7"),
        (case.script, ["--chat"], "that run had --chat False, this one has True"),
        (other, [], f"is of {name}.py, go on with that"),
    ):
        with pytest.raises(SystemExit) as end:
            script.main([f"--resume={folder}", *flags])
        assert end.value.code == 2
        assert said in capsys.readouterr().err


def test_tuned_refuses_an_interrupted_sweep(common, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("measures.sweeping.Predicted.measure", interrupted)
        assert sweep.main([*common, *GRID]) == 130
    with pytest.raises(SystemExit):
        benchmark.main([*common[:2], "--tuned", str(tmp_path / "logs")])
    assert f"unfinished, go on with sweep.py --resume {only_run(tmp_path)}" in capsys.readouterr().err
