"""sweep.py: counts read off one pass are those of real decoding; the last line is the best cell's."""

import re

import numpy
import pandas
import pytest
from conftest import needs_operators
from helpers import about, no_pictures, only_run, small_run, watch

import sweep
from measures import sweeping
from measures.sweeping import Counted
from runs.description import heading

COUNTS = ["num_verifications", "num_drafted", "num_accepted", "acceptance_rate", "mean_accepted_length"]


def arguments(model_folder, tmp_path):
    grid = ["--exit_layer_last", "3", "--num_speculations_last", "4", "--sample", "False"]
    return [*small_run(model_folder, tmp_path, 3, 24), *grid]


@pytest.fixture
def common(model_folder, tmp_path, monkeypatch):
    no_pictures(monkeypatch)
    return arguments(model_folder, tmp_path)


def table(tmp_path):
    frame = pandas.read_csv(only_run(tmp_path) / "sweep.csv")
    return frame.set_index(["exit_layer", "num_speculations"]).sort_index()


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param([], marks=pytest.mark.slow),
        pytest.param(["--no_repeat_ngram_size", "2"], marks=pytest.mark.slow),
        ["--stop_token_ids", *map(str, range(30, 45))],  # a few answers end, the rest are cut
    ],
)
def test_counts_are_the_measured_ones(common, tmp_path, extra):
    """Guards against a replay that drafts, accepts or ends otherwise than decoding does."""
    common += ["--num_speculations_step", "3", *extra]
    for mode in ("counted", "measured"):
        assert sweep.main([*common, "--mode", mode, "--output_dir", str(tmp_path / mode / "logs")]) == 0
    counts = table(tmp_path / "counted")
    measured = table(tmp_path / "measured")
    assert len(counts) == 6
    pandas.testing.assert_frame_equal(counts[COUNTS], measured[COUNTS])
    timed = ["speedup", "total_time", "tokens_per_second_median"]
    assert (counts[timed] > 0).sum().tolist() == [3] * 3
    assert counts["measured"].tolist() == counts["speedup"].notna().tolist()
    assert (measured[timed] > 0).all(axis=None)
    assert measured["measured"].all()


def test_pictures_table_and_flags(model_folder, tmp_path, monkeypatch, capsys):
    """Guards against counted cells among measured ones, flags of another cell, and flags that are ignored."""
    monkeypatch.setattr(sweeping.metrics, "ratios", lambda *_: numpy.array([2.0] * 5))
    grid = ["--exit_layer_last", "99", "--num_speculations_last", "3", "--batch_size", "2"]
    assert sweep.main([*arguments(model_folder, tmp_path), *grid, "--exit_layer", "2"]) == 0
    folder = only_run(tmp_path)
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    run = about(folder)
    output, printed = capsys.readouterr()
    assert "--exit_layer: not used, " in printed
    assert "--exit_layer_last 99: cut to 3, the model has 4 layers" in printed
    assert output.startswith(
        f"{heading(run, ('exit_layer', 'num_speculations'))}\n\ncells chosen on 2 prompts, "
    )
    assert "measured on 1 prompt: " in output
    assert f"\n{folder}/: records.jsonl, run.json, sweep.csv, sweep.pdf, sweep.png\n" in output
    assert len(re.findall(r"^ +\d +\d +0\.", output, re.MULTILINE)) == 3
    assert "\n6 other cells: counts in sweep.csv and sweep.png\n" in output
    best = run["metrics"]["best"]
    rows = pandas.read_csv(folder / "sweep.csv")
    assert output.splitlines()[-1] == (
        f"--generation_strategy self_speculative --exit_layer {best['exit_layer']} "
        f"--num_speculations {best['num_speculations']}"
    )
    assert best["speedup"] == pytest.approx(rows["speedup"].max())


def test_the_cells_that_should_be_fastest_are_measured(common, monkeypatch):
    """Guards against exits that are right but cost more than earlier ones, or that are early but wrong."""
    measured = []
    monkeypatch.setattr(Counted, "timed", lambda _, cell, *__: measured.append(cell) or [])
    monkeypatch.setattr(sweeping, "_speeds", lambda _: {})

    def chosen(guesses):
        monkeypatch.setattr(Counted, "measure", lambda *_: guesses | {"tokens": [1] * 20, "max_tokens": 99})
        assert sweep.main(common) == 0
        return {measured.pop()[0] for _ in range(3)}

    never = "0" * 20
    always = "1" * 20
    assert chosen({"matches": {"1": never, "2": always, "3": always}}) == {2}
    assert chosen({"matches": dict.fromkeys("123", always)}) == {1}


def test_prompts_choose_cells_or_confirm_them(common, monkeypatch, capsys):
    """Guards against the luckiest of many cells, measured by the prompts that chose it."""
    asked = {"counted": [], "measured": []}
    speedups = iter([9.0, 1.0, 3.0, 2.0, 2.0, 3.0, 8.0, 1.1, 1.0, 9.0])  # of both halves, cell by cell
    for mode, halves in asked.items():
        with monkeypatch.context() as patch:
            watch(
                patch, Counted.__mro__[1], "timed", lambda _, cell, half, *__, to=halves: to.append([*half])
            )
            if mode == "measured":
                patch.setattr(sweeping.metrics, "ratios", lambda *_: numpy.array([next(speedups)] * 5))
            grid = ["--exit_layer_last", "1", "--num_speculations_last", "5", "--mode", mode]
            assert sweep.main([*common, *grid, "--num_samples", "5"]) == 0
    assert asked == {"counted": [[1, 3]] * 3, "measured": [[0, 2, 4], [1, 3]] * 5}
    output = capsys.readouterr().out
    assert output.endswith("--exit_layer 1 --num_speculations 2\n")  # 3.00 on the other half, not 9.00


@pytest.mark.parametrize(("speedup", "number"), [(0.5, 5), (2.0, 5), (2.0, 4)])
def test_the_last_lines_say_what_a_sweep_found(speedup, number, common, tmp_path, monkeypatch, capsys):
    """Guards against a slow or uncertain best cell that does not say so, and a busy machine."""
    drawn = watch(monkeypatch, sweeping, "heat_maps")
    monkeypatch.setattr(sweeping.metrics, "ratios", lambda *_: numpy.array([speedup] * number))
    monkeypatch.setattr("runs.description.most_threads", lambda model: 2)  # cells are measured with one
    assert sweep.main([*common, "--num_samples", "1"]) == 0
    (((_, title, _), _),) = drawn
    assert ", down to 1 of 2 threads, " in title
    *_, before, last = capsys.readouterr().out.splitlines()
    printed = "no measured cell is faster than decoding without drafts; the nearest:"
    assert (before == printed) == (speedup < 1)
    if number < 5:
        why = "these prompts do not tell which strategy is faster: there are fewer than five"
        assert last == f"no cell is recommended: {why}; take more, by --num_samples"
        assert about(only_run(tmp_path))["metrics"]["best"] is None
    else:
        assert last.startswith("--generation_strategy self_speculative --exit_layer ")


def test_a_measured_sweep_of_empty_answers(common, tmp_path, capsys):
    """Guards against statistics of nothing: every id ends an answer."""
    assert sweep.main([*common, "--mode", "measured", "--stop_token_ids", *map(str, range(400))]) == 0
    assert "no answers to compare: all are empty" in capsys.readouterr().out
    assert about(only_run(tmp_path))["metrics"]["best"] is None


@needs_operators
def test_copies_may_use_all_layers(common, tmp_path, monkeypatch, capsys):
    """Guards against flags of a best cell without the copy, and a grid that ends before the best exit."""
    monkeypatch.setattr(sweeping.metrics, "ratios", lambda *_: numpy.array([2.0] * 5))
    drafts = ["--draft_weights", "int4"]
    assert sweep.main([*common, *drafts, "--exit_layer_last", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(" ".join(drafts))
    by_exit = table(tmp_path)["acceptance_rate"].groupby("exit_layer")
    assert [*by_exit.groups] == [1, 2, 4]
    assert by_exit.min()[4] > by_exit.max()[1]
