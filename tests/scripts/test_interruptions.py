"""After an interruption --resume gives the records of an unbroken run; so do ranks and batches."""

import errno
import functools
import json
import re
import shlex
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import forks
import psutil
import pytest
import torch.distributed.run
from conftest import ROOT
from helpers import (
    SPECULATION,
    Killed,
    about,
    no_pictures,
    only_run,
    records_of,
    refused,
    run_program,
    small_run,
)

import benchmark
import correctness
import sweep
from runs import records

GRID = ["--sample", "False", "--exit_layer_last", "2", "--num_speculations_last", "3", "--mode", "measured"]


CASES = {
    # Sampled: an example must not depend on earlier ones of the process.
    "benchmark": (benchmark, [*SPECULATION, "--no_repeat_ngram_size", "3"]),
    "batches": (benchmark, [*SPECULATION, "--batch_size", "3"]),
    "correctness": (correctness, [*SPECULATION, "--batch_size", "3"]),
    "sweep": (sweep, [*GRID, "--num_samples", "3", "--batch_size", "3"]),
}
# Parts of the names of fields that come from a clock, or say who else was there.
UNSTABLE = ("time", "speedup", "per_second", "batch_size", "window", "rank", "threads")


@pytest.fixture
def common(model_folder, tmp_path, monkeypatch):
    no_pictures(monkeypatch)
    return small_run(model_folder, tmp_path, 6, 12)


@pytest.fixture(scope="module")
def unbroken(model_folder, tmp_path_factory):
    """The records of a case in a single run at batch size 1."""

    @functools.cache
    def of(name):
        script, flags = CASES[name]
        folder = tmp_path_factory.mktemp(name)
        assert script.main([*small_run(model_folder, folder, 6, 12), *flags, "--batch_size", "1"]) == 0
        return outcome(only_run(folder))

    return of


def outcome(folder):
    """What records hold apart from times, in the order of their indices."""
    table = records_of(folder).sort_values("index")
    return table[[name for name in table if not any(word in name for word in UNSTABLE)]].to_dict("records")


ENDINGS = {  # error, exit status, status in run.json
    "Ctrl-C": (KeyboardInterrupt, 130, "interrupted"),
    "full disk": (OSError(errno.ENOSPC, "No space left on device"), 1, "failed"),
    "kill": (Killed, None, "running"),
}


@pytest.mark.parametrize(
    ("name", "ending"), [("sweep", "Ctrl-C"), ("batches", "full disk"), ("benchmark", "kill")]
)
def test_an_early_end_keeps_the_records(name, ending, common, unbroken, tmp_path, monkeypatch, capsys):
    """Guards against records that are lost, made twice or read by half, a --resume that needs flags, and
    figures of batches of several sizes that do not say so.
    """
    script, flags = CASES[name]
    error, exit_status, status = ENDINGS[ending]
    write = records._write
    expected = unbroken(name)
    ended = None

    def fails(path, mode, text):
        """Write half of the third record."""
        if path.name == "records.jsonl" and path.exists() and path.read_text().count("\n") == 2:
            write(path, mode, text[:9])
            raise error
        write(path, mode, text)

    capsys.readouterr()
    with monkeypatch.context() as patch, suppress(Killed):
        patch.setattr(records, "_write", fails)
        ended = script.main([*common, *flags])
    folder = only_run(tmp_path)
    assert (ended, about(folder)["status"]) == (exit_status, status)
    printed = capsys.readouterr().err
    if ending != "kill":
        assert ("No space left on device" if ending == "full disk" else "interrupted") in printed
        unit = "cells" if script is sweep else "examples"
        _, kept, command = printed.rpartition(f"; 2 of 6 {unit} are kept, go on with ")
        program, *words = shlex.split(command)
        assert kept
        assert Path(program).samefile(sys.executable)
        assert words == [sys.argv[0], "--resume", str(folder)]
    began = "2020-02-02T02:02:02+00:00"
    (folder / "run.json").write_text(json.dumps({**about(folder), "began": began}))
    kept = (folder / "records.jsonl").read_text().splitlines()[:2]
    other_size = ["--batch_size", "2"] if name == "batches" else []
    assert script.main(["--resume", str(folder), *other_size]) == 0
    printed = capsys.readouterr()
    assert "not used" not in printed.err  # of flags that nobody gave
    assert ("6 examples, batches of 2, 3" in printed.out) == (name == "batches")
    assert outcome(folder) == expected
    assert set(kept) <= set((folder / "records.jsonl").read_text().splitlines())
    assert (about(folder)["status"], about(folder)["began"]) == ("finished", began)


@pytest.mark.parametrize(
    ("name", "ranks"), [("batches", 2), *(pytest.param(name, 4, marks=pytest.mark.slow) for name in CASES)]
)
def test_ranks_give_the_records_of_one(name, ranks, common, unbroken, tmp_path):
    """Guards against draws that depend on the rank, and examples that are done twice or not at all."""
    script, flags = CASES[name]
    expected = unbroken(name)
    result = forks.run_ranks(ranks, ROOT / f"{script.__name__}.py", *common, *flags)
    assert result.returncode == 0, result.stderr
    assert outcome(only_run(tmp_path)) == expected
    if script is benchmark:
        records = records_of(only_run(tmp_path))
        assert records["rank"].tolist() == [index % ranks for index in records["index"]]
    assert result.stdout.count(f", {ranks} ranks, batch size ") == 1  # one rank prints


def test_a_rank_that_fails_ends_the_run_with_its_message(common, tmp_path):
    """Guards against ranks that wait for it, and a rank that waits for all ranks before it says why."""
    code = (
        "import os, benchmark; from measures.benchmarking import Benchmark; from runs.program import run\n"
        "def records(self, indices): raise TypeError('rank 1 broke')\n"
        "if os.environ['RANK'] == '1': Benchmark.records = records\n"
        "run(benchmark.main)\n"
    )
    result = run_program(2, tmp_path, code, *common)
    assert result.returncode != 0
    assert "rank 1 broke" in result.stderr


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_and_what_was_done_is_kept(endless_folder, tmp_path, monkeypatch):
    """By the real torchrun. Guards against a rank 0 that waits, and a model that needs the hub's cache."""
    monkeypatch.setenv("HF_HOME", "/proc/nowhere")
    args = [ROOT / "benchmark.py", *small_run(endless_folder, tmp_path, 10, 400)]
    with tempfile.TemporaryFile() as printed:
        run = forks.Fork(
            torch.distributed.run.__file__, "--nproc_per_node", 2, *args, stderr=printed.fileno()
        )
        try:
            while not list(tmp_path.glob("logs/*/records.jsonl")):
                time.sleep(0.1)
                assert run.poll() is None, forks.read(printed)
            ranks = psutil.Process(run.pid).children()
            (victim,) = (process for process in ranks if process.environ().get("RANK") == "1")
            victim.kill()
            assert run.wait() == 1
        finally:
            run.end()
        errors = forks.read(printed)
    ended = "(another rank is gone|interrupted)"
    kept = r"[1-9]\d* of 10 examples are kept"
    assert re.search(
        rf"{ended}; {kept}, go on with \S+/torchrun --nproc_per_node 2 \S+/benchmark.py --resume \S+", errors
    ), errors
    (path,) = tmp_path.glob("logs/*/records.jsonl")
    assert path.read_text()


def test_a_resumed_run_keeps_its_arguments(common, tmp_path, capsys):
    """Guards against a run continued with other settings, and against tracebacks for an older version's."""
    flags = [*common, *CASES["sweep"][1]]
    assert sweep.main(flags) == 0
    folder = only_run(tmp_path)
    resume = f"--resume={folder}"
    run = about(folder)

    def says(script=sweep, *words, run=run):
        (folder / "run.json").write_text(run if isinstance(run, str) else json.dumps(run))
        return refused(script.main, [resume, *words], capsys)

    for name, was, now in (("max_steps", 12, 9), ("batch_size", 3, 2)):
        assert f"that run had --{name} {was}, this one has {now}" in says(sweep, f"--{name}", str(now))
    assert "is of sweep.py, go on with that" in says(correctness)
    assert "that run had device 'other', this one has" in says(run={**run, "device": "other"})
    for damaged in ("[]", "{"):
        assert "no run.json of a run in there" in says(run=damaged)
    old = {**run, "arguments": run["arguments"] | {"threads": "two"}}
    assert "--threads 'two': must be an integer" in says(run=old)
    del run["arguments"]["n_shot"]  # of a version without this flag
    (folder / "run.json").write_text(json.dumps(run))
    assert sweep.main([*flags, resume, "--output_dir", str(tmp_path)]) == 0
