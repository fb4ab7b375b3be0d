"""Published results beside measured ones."""

import io
import json
import re
import subprocess
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pandas
import pytest
from conftest import PROMPT, ROOT, config_of, generate, tiny_llama
from helpers import no_pictures, only_run, refused, watch

import benchmark
from benchmarks import paper, paper_rounds
from self_speculation.backends.runners import make_runner


@pytest.fixture
def started(monkeypatch):
    """The flags of the rows' programs, which run in this process."""
    flags = []
    run = subprocess.run

    def run_here(command, **options):
        main = {"benchmark.py": benchmark.main, "paper_rounds.py": paper_rounds.main}.get(
            Path(command[1]).name
        )
        if main is None:
            return run(command, **options)
        if main is not paper_rounds.main:
            flags.append(command[2:])
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as errors:
            try:
                status = main(command[2:])
            except SystemExit as end:
                status = end.code
        return subprocess.CompletedProcess(command, status, "", errors.getvalue())

    monkeypatch.setattr(subprocess, "run", run_here)
    return flags


def test_rows_are_measured_or_named_and_an_interrupted_run_goes_on(
    started, endless_folder, tmp_path, monkeypatch, capsys
):
    """Guards against a row by other settings than the published ones, a missing dataset that ends all rows,
    rows that are measured twice or lost, a rehearsal that looks like a measurement or a failed reproduction,
    and a folder without run.json, which nothing can go on with, that ends the row for ever.
    """
    drawn = watch(monkeypatch, paper, "bars")
    measure = paper._measured

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
    measured = table.loc["llama2-7B xsum"]
    missing = table.loc["llama3-8B cnn_dm"]
    assert measured["formula"] == pytest.approx((1 + 12 * 0.546) / (1 + 12 * 8 / 32))
    assert (measured["exit"], measured["examples"]) == (1, 1)
    assert measured["measured_speedup"] > 0 < measured["mean_accepted_length"]
    assert measured["least"] == measured["measured_speedup"] == measured["most"]
    assert 0 <= measured["paper_acceptance"] <= 1
    assert {"seeds", "processor", "memory_gib", "processors", "pinned_to", "load"} <= {
        *measured.dropna().index
    }
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


def test_repeats_have_a_spread(monkeypatch, tmp_path):
    """Guards against one lucky measurement."""
    speeds = iter([1.2, 1.5, 1.3])
    monkeypatch.setattr(paper, "_measured", lambda flags, folder: {"measured_speedup": next(speeds)})
    monkeypatch.setattr(paper, "_finished", lambda *_: {"metrics": {"paper_acceptance": 0.5}})
    found = paper._repeated({"sample": False}, tmp_path, [1], 3)
    assert (found["least"], found["measured_speedup"], found["most"]) == (1.2, 1.3, 1.5)


def test_samples_by_several_seeds(started, endless_folder, tmp_path, monkeypatch, capsys):
    """Guards against greedy runs, one seed for all, the paper's greedy rounds beside sampled ones, and
    acceptance of one run in the place of the mean.
    """
    no_pictures(monkeypatch)
    monkeypatch.setattr(paper, "bars", lambda *_, **__: None)
    flags = ["--model", str(endless_folder), "--output_dir", str(tmp_path / "logs"), "--rows", "7B human"]
    flags += ["--temperature", "1", "--seeds", "7", "8", "--num_samples", "2", "--max_steps", "12"]
    assert paper.main(flags) == 0
    asked = [dict(zip(run[::2], run[1::2], strict=True)) for run in started]
    rules = [(each["--seed"], each["--temperature"], each["--top_p"]) for each in asked]
    assert rules == [("7", "1.0", "1.0"), ("8", "1.0", "1.0")]
    output = capsys.readouterr().out
    assert "sampled at temperature 1, published rows are greedy" in output
    assert (" reject* " in output, " paper* " in output) == (True, False)
    folder = only_run(tmp_path)
    row = pandas.read_csv(folder / "paper.csv").iloc[0]
    found = [json.loads(path.read_text()) for path in folder.glob("row0/seed*/benchmark_*/run.json")]
    rates = [run["metrics"]["acceptance"]["by_rejection"]["acceptance_rate"] for run in found]
    assert (len(rates), row["seeds"]) == (2, "7 8")
    assert row["rejection_acceptance"] == pytest.approx(sum(rates) / 2)


def test_a_pattern_that_matches_nothing_is_an_error_beside_others(capsys):
    """Guards against rows that are silently not measured."""
    assert "--rows ['human', '9B']: 9B must be a part of" in refused(
        paper.main, ["--rows", "human", "9B"], capsys
    )


@pytest.mark.parametrize("agreement", ["always", "never", "sometimes"])
def test_the_rounds_of_the_paper(agreement):
    """Guards against another output, and counts of another definition: the first token is drafted too, a
    draft stops at an end id, and the last token has none.
    """
    model = tiny_llama(agreement=agreement)
    plain = generate(model, PROMPT, max_steps=12, eos=()).predicted_tokens
    config = config_of(exit_layer=2, num_speculations=3, max_steps=12)
    output, drafted, accepted = paper_rounds.decode(make_runner(model), PROMPT, [], config)
    assert output == plain
    assert drafted >= accepted
    if agreement == "always":
        assert (drafted, accepted) == (9, 9)  # 3 + 1, 3 + 1, 3 + 1
        end = plain[1:2]
        output, drafted, accepted = paper_rounds.decode(make_runner(model), PROMPT, end, config)
        assert output == plain[: plain.index(*end) + 1]
        assert drafted == accepted == len(output)
    elif agreement == "never":
        assert (drafted, accepted) == (3 * 8 + 3 + 2 + 1, 0)


def test_the_page_of_models_cites_published_figures_only():
    """Guards against a speed-up that the table of published results lacks."""
    page = (ROOT / "docs" / "models.md").read_text()
    rows = re.findall(
        r"^\| \[`(facebook/layerskip-\S+)`\]\S+ \| (\d+) \|.*\| ([^|]+) \|$", page, re.MULTILINE
    )
    assert len(rows) == 7
    for model, layers, figures in rows:
        known = paper.PUBLISHED[paper.PUBLISHED["model"] == model]
        assert {*known["layers"]} <= {int(layers)}
        assert {float(each) for each in re.findall(r"\d\.\d+", figures)} <= {*known["speedup"]}, model
