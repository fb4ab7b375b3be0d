"""Published results beside measured ones."""

import io
import json
import re
import subprocess
from contextlib import redirect_stderr, redirect_stdout

import pandas
import pytest
from helpers import only_run, watch

import benchmark
from benchmarks import paper


@pytest.fixture
def started(monkeypatch):
    """The flags of the rows' programs, which run in this process."""
    flags, run = [], subprocess.run

    def run_here(command, **options):
        if not command[1].endswith("benchmark.py"):
            return run(command, **options)
        flags.append(command[2:])
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as errors:
            try:
                status = benchmark.main(command[2:])
            except SystemExit as end:
                status = end.code
        return subprocess.CompletedProcess(command, status, "", errors.getvalue())

    monkeypatch.setattr(subprocess, "run", run_here)
    return flags


def test_rows_are_measured_or_named_and_an_interrupted_run_goes_on(
    started, endless_folder, tmp_path, monkeypatch, capsys
):
    """Guards against a row by other settings than the published ones, a missing dataset that ends the others,
    rows that are measured twice or lost, a rehearsal that looks like a measurement or a failed reproduction,
    and a folder without run.json, which nothing can go on with, that ends its row for ever.
    """
    drawn, measure = watch(monkeypatch, paper, "bars"), paper._measured

    def killed_before(flags, row):
        (row / "benchmark_1").mkdir(parents=True, exist_ok=True)
        return measure(flags, row)

    monkeypatch.setattr(paper, "_measured", killed_before)
    data = tmp_path / "data"
    data.mkdir()
    (data / "xsum_summarization.jsonl").write_text(json.dumps({"document": "a", "summary": "b"}) + "\n")
    flags = ["--model", str(endless_folder), "--output_dir", str(tmp_path / "logs"), "--data_path", str(data)]
    flags += ["--rows", "7B xsum", "llama3-8B", "--max_steps", "4", "--dtype", "float32"]
    assert paper.main(flags) == 0
    folder = only_run(tmp_path)
    why = f"--data_path '{data}/cnn_dm_summarization.jsonl': no such file or folder"
    assert why in capsys.readouterr().out.partition("not measured: llama3-8B cnn_dm")[2]
    table = pandas.read_csv(folder / "paper.csv").set_index("row")
    measured, missing = table.loc["llama2-7B xsum"], table.loc["llama3-8B cnn_dm"]
    assert measured["formula"] == pytest.approx((1 + 12 * 0.546) / (1 + 12 * 8 / 32))
    assert (measured["exit"], measured["examples"]) == (1, 1)
    assert measured["measured_speedup"] > 0 < measured["mean_accepted_length"]
    assert "--data_path" in missing["not_measured"]
    flags = dict(zip(started[0][::2], started[0][1::2], strict=True))
    asked = {"--dataset": "xsum_summarization", "--n_shot": "0", "--num_speculations": "12"}
    asked |= {"--sample": "False", "--max_steps": "4", "--dtype": "float32"}
    assert asked.items() <= flags.items()
    (((table, _, title, _), _),) = drawn
    assert re.match(r"REHEARSAL with \S+, which is none of the published checkpoints\n", title)
    assert table.index[0] == "llama2-7B xsum, exit 8, k 12 (rehearsed at exit 1)"

    (data / "cnn_dm_summarization.jsonl").write_text(json.dumps({"article": "a", "highlights": "b"}) + "\n")
    monkeypatch.setattr(paper, "bars", lambda *_, **__: None)
    assert paper.main(["--resume", str(folder)]) == 0
    assert len(started) == 3
    assert "not measured: " not in capsys.readouterr().out
    assert pandas.read_csv(folder / "paper.csv")["examples"].tolist() == [1, 1]


def test_ctrl_c_in_a_row_is_continued_there(started, tmp_path, monkeypatch):
    """Guards against examples of a row that are measured again."""
    begun = tmp_path / "begun" / "benchmark_1"
    begun.mkdir(parents=True)
    (begun / "run.json").write_text('{"status": "interrupted"}')
    monkeypatch.setattr(benchmark, "main", lambda flags: 130)
    with pytest.raises(KeyboardInterrupt):
        paper._measured({}, begun.parent)
    assert started == [["--resume", str(begun)]]
