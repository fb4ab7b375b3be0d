"""sweep.py: counts read off one pass are the counts of real decoding; nothing finished is done twice."""

import json
import os
import re
from collections import Counter

import pandas
import pytest
from conftest import ROOT
from helpers import custom_data, no_calibration, no_pictures, only_run

import benchmark
import eval as eval_script
import generate
import sweep
from arguments import GenerationConfig, ModelArguments
from measures.replay import predicted_cell, replay, within_noise
from runs.heading import heading
from runs.tuning import TuningArguments, counts, tuned
from self_speculation import default_model
from self_speculation.drafts.costs import Costs
from self_speculation.model.linear import Linear
from sweep import SweepArguments

COUNTS = ["num_verifications", "num_drafted", "num_accepted", "acceptance_rate", "mean_accepted_length"]


@pytest.mark.parametrize(
    ("matches", "max_tokens", "k", "lengths", "accepted", "emitted"),
    [
        # [1, 2] right, 3 by the model; [4, 5] right, 6 by the model: the last
        ("0110111", 7, 2, {2: 2}, (2, 2), 6),
        # drafts 4, two right, 3 by the model; room for 3 more: drafts 2, both right, 6 by the model
        ("0110111", 7, 4, {4: 1, 2: 1}, (2, 2, 0, 0), 6),
        ("0111", 50, 6, {6: 1}, (1, 1, 1, 0, 0, 0), 3),  # the output ends inside a draft
        ("1", 1, 3, {}, (), 0),
    ],
)
def test_replay_by_hand(matches, max_tokens, k, lengths, accepted, emitted):
    """1: the exit guesses this output token. Nothing drafts the first one."""
    rounds = replay([match == "1" for match in matches], max_tokens, k)
    assert rounds.rounds_by_length == lengths
    assert (rounds.accepted_by_position, rounds.num_emitted) == (accepted, emitted)


def test_costs_of_a_round():
    costs = Costs(1.0, {2: 0.5}, {0: (3.0,) * 3, 2: (1.0, 2.0, 4.0)}, lengths=(0, 1, 3))
    assert [costs.verification(2, k) for k in (0, 1, 2, 3)] == [1, 2, 3, 4]
    assert costs.round(2, 3) == 3 * 0.5 + 4
    assert costs.round(0, 3) == 3


def example(matches, prefill_time=0.0):
    """A record of predicted mode."""
    return {
        "tokens": [1] * len(matches), "num_tokens": len(matches), "max_tokens": 100,
        "prefill_time": prefill_time, "matches": {"2": matches},
    }  # fmt: skip


def costs_of(draft_step, plain_step=1.0):
    return Costs(plain_step, {2: draft_step}, {2: (plain_step,)}, (0,))


def cell_of(records, turns, k):
    return predicted_cell(records, costs_of(0.25), turns, 2, k)


def test_a_predicted_cell_is_the_median_example_and_says_how_sure_it_is():
    """Guards against one slow prompt that makes up the figure of a cell, and certainty from too few turns."""
    examples = [*[example("1" * 10)] * 12, example("0" * 10, prefill_time=1000.0)]
    cell = cell_of(examples, [costs_of(0.25)] * 4, 2)
    assert cell["speedup"] == pytest.approx(9 / (3 * 1.5))  # three rounds of two steps and a verification
    assert cell["total_time"] == pytest.approx(12 * 4.5 + 1000 + 9 * 1.5 - 0.5, abs=1)
    assert cell["speedup_low"] is cell["speedup_high"] is None
    cell = cell_of(examples, [costs_of(0.25), costs_of(0.5)] * 5, 2)
    assert (cell["speedup_low"], cell["speedup_high"]) == pytest.approx((9 / (3 * 2.0), 9 / (3 * 1.5)))
    cell = cell_of([example("1" * 10), example("0" * 10)] * 5, [costs_of(0.25)] * 10, 2)
    assert (cell["speedup_low"], cell["speedup_high"]) == pytest.approx(
        (9 / (8 * 1.5 + 1.25), 9 / (3 * 1.5)), rel=0.05
    )
    cell = cell_of(examples[:4], [costs_of(0.25)] * 10, 2)
    assert cell["speedup_low"] is cell["speedup_high"] is None


def test_cells_within_noise_are_those_that_it_does_not_tell_from_the_best():
    """Guards against intervals that overlap only because all cells have the noise of one plain step, and
    against cells told apart where too little was measured.
    """
    turns = [costs_of(0.25, plain_step) for plain_step in (0.6, 0.8, 1.0, 1.3, 1.6)] * 4
    rows = [cell_of([example("11011011011")] * 6, turns, k) for k in (2, 3)]
    assert rows[1]["speedup_high"] > rows[0]["speedup_low"]
    assert within_noise(rows, rows[0]) == []
    turns = [costs_of(0.25), costs_of(5.0)] * 5  # in every other turn, longer drafts are too dear
    rows = [cell_of([example("1" * 11)] * 6, turns, k) for k in (2, 4)]
    assert within_noise(rows, rows[0]) == [rows[1]]
    assert (
        within_noise([{**row, "speedup_low": None} for row in rows], {**rows[0], "speedup_low": None}) == []
    )
    measured = [
        {"mode": "measured", "exit_layer": 3, "num_speculations": k, "speedup": speedup, "speedup_low": low}
        | {"speedup_high": high}
        for k, (speedup, low, high) in enumerate(
            ((1.5, 1.35, 1.7), (1.3, 1.2, 1.4), (1.2, 1.1, 1.3), (1.1, None, None), (None, None, None)), 1
        )
    ]
    assert within_noise(measured, measured[0]) == [measured[1], measured[3]]


def test_prompts_may_not_tell_a_cell_from_the_best():
    """Guards against a best cell that is the best on these prompts alone; half of them prefer another."""
    prompts = [example("1" * 13), example("1101" * 3 + "1")] * 5
    rows = [cell_of(prompts, [costs_of(0.25)] * 10, k) for k in (2, 4)]
    best = max(rows, key=lambda row: row["speedup"])
    assert within_noise(rows, best) == [row for row in rows if row is not best]


def test_a_measured_cell_is_compared_with_those_that_were_only_predicted():
    """Guards against a best cell "beyond noise" because --verify_top measured no other."""
    rows = [cell_of([example("1" * 11)] * 6, [costs_of(0.25)] * 10, k) for k in (2, 5, 6)]
    equal = {**rows[1], "num_speculations": 4, "speedup": 0.9}
    measured = {**rows[1], "mode": "measured"}
    assert within_noise([*rows, equal, measured], measured) == [equal]


@pytest.fixture
def common(model_folder, tmp_path):
    return [
        "--model", str(model_folder), "--output_dir", str(tmp_path / "logs"), "--num_samples", "6",
        "--max_steps", "24", "--dataset", "custom_jsonl", "--data_path", custom_data(tmp_path),
        "--exit_layer_last", "3", "--num_speculations_last", "4", "--sample", "False",
    ]  # fmt: skip


@pytest.fixture
def timeless(monkeypatch):
    no_calibration(monkeypatch)
    no_pictures(monkeypatch)


def table(tmp_path):
    frame = pandas.read_csv(only_run(tmp_path) / "sweep.csv")
    return frame.set_index(["exit_layer", "num_speculations"]).sort_index()


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param([], marks=pytest.mark.slow),
        pytest.param(["--no_repeat_ngram_size", "2"], marks=pytest.mark.slow),
        ["--stop_token_ids", *map(str, range(30, 60))],
        ["--draft_vocabulary", "20"],
    ],
)
@pytest.mark.usefixtures("timeless")
def test_predicted_counts_are_the_measured_ones(common, tmp_path, extra, capsys):
    """Guards against a replay that drafts, accepts or ends otherwise than decoding does; with a short
    vocabulary, also against drafts that know ids too early or too late.
    """
    assert sweep.main([*common, *extra, "--output_dir", str(tmp_path / "p" / "logs")]) == 0
    assert (
        sweep.main([*common, *extra, "--mode", "measured", "--output_dir", str(tmp_path / "m" / "logs")]) == 0
    )
    predicted, measured = table(tmp_path / "p"), table(tmp_path / "m")
    assert len(predicted) == 12
    pandas.testing.assert_frame_equal(predicted[COUNTS], measured[COUNTS])
    assert (predicted["num_tokens"] == measured["num_tokens"]).all()
    assert (predicted[["total_time", "speedup", "tokens_per_second_median"]] > 0).all(axis=None)
    assert "fewer than five turns of the calibration" in capsys.readouterr().out


def test_pictures_table_and_flags(common, tmp_path, capsys):
    named = ["--generation_strategy", "self_speculative"]
    assert sweep.main([*common, "--verify_top", "2", *named]) == 0
    folder = only_run(tmp_path)
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "sweep.pdf").read_bytes().startswith(b"%PDF")
    output = capsys.readouterr().out
    assert (
        f"\n{heading(json.loads((folder / 'run.json').read_text()), ('exit_layer', 'num_speculations'))}\n"
        in output
    )
    # Guards against files that nobody is told of, and the two rows of a cell far from what tells them apart.
    files = "records.jsonl, run.json, sweep.csv, sweep.pdf, sweep.png, vocabulary.json"
    assert f"\n{folder}/: {files}\n" in output
    modes = re.findall("^ *(measured|predicted) +[0-9]", output, re.MULTILINE)
    assert modes == ["measured"] * 2 + ["predicted"] * 12
    assert output.count("measured") >= 4  # two lines about the cells, two rows
    assert sum(" predicted, " in line and line.endswith(" measured") for line in output.splitlines()) == 2
    assert output.count("(90 %)") == 1  # the sentence on what noise does not tell from the best
    assert all(len(line) <= 100 for line in output.splitlines() if "run.json" not in line)
    run = json.loads((folder / "run.json").read_text())
    best = run["metrics"]["best"]
    assert output.splitlines()[-1] == (
        f"--generation_strategy self_speculative --exit_layer {best['exit_layer']} "
        f"--num_speculations {best['num_speculations']}"
    )
    rows = pandas.read_csv(folder / "sweep.csv")
    assert rows["mode"].value_counts().to_dict() == {"predicted": 12, "measured": 2}
    assert best["speedup"] == pytest.approx(rows[rows["mode"] == "measured"]["speedup"].max())
    assert "draft_vocabulary" not in rows
    assert {"draft_step", "verifications"} <= set(run["metrics"]["calibration"])


@pytest.mark.parametrize(
    "grid", [["--exit_layer_first", "2", "--exit_layer_last", "2"], ["--num_speculations_last", "1"]]
)
def test_a_grid_of_one_row_or_column(common, tmp_path, grid, monkeypatch):
    """Guards against a picture whose axes have no extent."""
    no_calibration(monkeypatch)
    assert sweep.main([*common, *grid]) == 0
    assert (only_run(tmp_path) / "sweep.png").exists()


@pytest.mark.usefixtures("timeless")
def test_flags_that_the_grid_replaces_are_named(common, capsys):
    """Guards against a sweep that ignores an exit layer or a draft length without a word."""
    flags = ["--exit_layer", "2", "--num_speculations", "3", "--generation_strategy", "adaptive"]
    assert sweep.main([*common, *flags, "--num_speculations_last", "1"]) == 0
    said = capsys.readouterr().err
    assert "--exit_layer 2: not used; the grid is --exit_layer_first to --exit_layer_last\n" in said
    assert "--num_speculations 3: not used; the grid is --num_speculations_first to" in said
    assert "--generation_strategy adaptive: not used; cells are self_speculative\n" in said


def test_the_bar_of_a_calibration_that_ran_out_of_time_ends_full(common, monkeypatch, capsys):
    """Guards against a bar that stops at 45 % of turns for which there was no time."""
    no_pictures(monkeypatch)
    monkeypatch.setattr("measures.calibration._PATIENCE", 0.0)
    assert sweep.main([*common, "--num_speculations_last", "1"]) == 0
    bars = [line for line in capsys.readouterr().err.splitlines() if line.startswith("calibration")]
    assert bars[-1].startswith("calibration: 100%")


@pytest.mark.usefixtures("timeless")
def test_the_grid_is_cut_to_the_model_with_a_notice(common, tmp_path, capsys):
    assert sweep.main([*common, "--exit_layer_last", "99", "--num_speculations_last", "1"]) == 0
    assert "--exit_layer_last 99: cut to 3, the model has 4 layers" in capsys.readouterr().err
    assert table(tmp_path).index.get_level_values(0).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--exit_layer_first", "4"], "--exit_layer_first 4: beyond --exit_layer_last 3, the grid is empty"),
        (
            ["--exit_layer_first", "9", "--exit_layer_last", "9"],
            "--exit_layer_first 9: must be between 1 and 3",
        ),
        (["--num_speculations_step", "0"], "--num_speculations_step 0: must be at least 1"),
        (["--verify_top", "-1"], "--verify_top -1: must be at least 0"),
        (["--mode", "x"], "choose from 'predicted', 'measured'"),
        (["--shared_lookup", "9"], "--shared_lookup 9: must be 0, each cell has the same prompts"),
    ],
)
def test_impossible_grids(common, args, message, capsys):
    with pytest.raises(SystemExit) as exit:
        sweep.main([*common, *args])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("timeless")
def test_drafts_in_four_bits_may_use_all_layers(common, tmp_path, capsys):
    """Guards against a cell that is named, and used by --tuned, without the copy that it drafts with."""
    assert sweep.main([*common, "--draft_weights", "int4", "--exit_layer_last", "9"]) == 0
    said = capsys.readouterr().out
    assert " --draft_weights int4" in said.splitlines()[-1]
    best, by_hand = (
        tuned(GenerationConfig(), TuningArguments(str(only_run(tmp_path))), ModelArguments(common[1]), argv)
        for argv in ([], ["--draft_weights", "exact"])
    )
    assert (best.draft_weights, by_hand.draft_weights) == ("int4", "exact")
    predicted = table(tmp_path).reset_index()
    assert set(predicted["exit_layer"]) == {1, 2, 3, 4}
    deepest = predicted[predicted["exit_layer"] == 4]
    assert deepest["acceptance_rate"].min() > predicted[predicted["exit_layer"] == 1]["acceptance_rate"].max()


@pytest.mark.usefixtures("timeless")
def test_all_layers_of_a_copy_are_in_the_grid(common, tmp_path, monkeypatch):
    """Guards against a grid that ends before the one exit that pays for a model without early exits."""
    monkeypatch.setattr(SweepArguments, "exit_layer_last", 2)  # as if nobody had asked for an end
    given = [*common, "--exit_layer_last", "2"]
    assert sweep.main([*given, "--draft_weights", "int4"]) == 0
    assert set(table(tmp_path).reset_index()["exit_layer"]) == {1, 2, 4}


@pytest.mark.usefixtures("timeless")
def test_cells_of_an_older_run_are_read(common, tmp_path, capsys):
    """Guards against a --resume that fails on records from before a column was added."""
    args = [*common, "--mode", "measured", "--exit_layer_last", "1", "--num_speculations_last", "2"]
    assert sweep.main(args) == 0
    path = only_run(tmp_path) / "records.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for name in ("speedup_low", "speedup_high", "tokens_per_second_median"):
        del records[0][name]
    records[0] |= {"draft_vocabulary": None, "speedup_q1": 1.0, "time_per_token": 0.1}
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert sweep.main([*args, "--resume", str(only_run(tmp_path))]) == 0
    assert len(table(tmp_path)) == 2
    assert capsys.readouterr().out.count("medians, from and to") == 2


@pytest.mark.usefixtures("timeless")
def test_a_predicted_sweep_counts_what_was_output(common, tmp_path, capsys):
    """Guards against counts that --tuned does not hand on to --draft_vocabulary, and against that flag left
    out of those of the best cell.
    """
    assert sweep.main([*common, "--num_speculations_last", "2", "--draft_vocabulary", "200"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("--draft_vocabulary 200")
    folder = only_run(tmp_path)
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    counted, of_model = Counter(id_ for r in records for id_ in r["tokens"]), ModelArguments(common[1])
    assert counts(str(folder), of_model) == counted
    (folder / "vocabulary.json").write_text("[1]")
    with pytest.raises(SystemExit):
        counts(str(folder), of_model)
    assert "vocabulary.json: " in capsys.readouterr().err


def by_generate(common, *flags):
    common = common[: common.index("--num_samples")]
    return generate.main([*common, "--prompt", "def", "--streamer", "none", *flags, "--sample", "False"])


def by_benchmark(common, *flags):
    common = common[: common.index("--exit_layer_last")]
    return benchmark.main([*common, *flags, "--sample", "False"])


def by_sweep(common, *flags):
    return sweep.main([*common, *flags, "--num_speculations_last", "2"])


def by_eval(common, *flags):
    tasks = ["--include_path", str(ROOT / "eval_tasks"), "--tasks", "python_functions", "--limit", "1"]
    return eval_script.main([*common[: common.index("--num_samples")], *tasks, *flags, "--max_steps", "3"])


@pytest.mark.parametrize("script", [by_generate, by_benchmark, by_sweep, by_eval])
@pytest.mark.usefixtures("timeless", "few_files_are_read")
def test_a_short_head_is_made_once_of_the_ids_that_were_counted(script, common, tmp_path, monkeypatch):
    """Guards against a head that is made before the counts are known, and a script that ignores them."""
    (tmp_path / "vocabulary.json").write_text('{"299": 3, "131": 2, "222": 1}')
    (tmp_path / "sweep.csv").write_text(
        "mode,exit_layer,num_speculations,draft_weights,speedup\npredicted,2,3,exact,1.5\n"
    )
    made, of_rows = [], Linear.of_rows
    monkeypatch.setattr(Linear, "of_rows", lambda self, ids: made.append(ids.tolist()) or of_rows(self, ids))
    assert script(common, "--tuned", str(tmp_path / "sweep.csv"), "--draft_vocabulary", "4") == 0
    assert made == [[0, 131, 222, 299]]


def test_a_sweep_uses_another_one_for_its_ids_alone(common, tmp_path, capsys):
    """Guards against --tuned that says nothing where it does nothing."""
    (tmp_path / "sweep.csv").write_text(
        "mode,exit_layer,num_speculations,draft_weights,speedup\npredicted,2,3,exact,1.5\n"
    )
    for flags, message in (
        ([], "sweep.csv: gives the ids of --draft_vocabulary here; give that flag too"),
        (
            ["--draft_vocabulary", "9"],
            "sweep.csv: has no vocabulary.json, which --mode predicted writes",
        ),
    ):
        with pytest.raises(SystemExit) as end:
            sweep.main([*common, "--tuned", str(tmp_path / "sweep.csv"), *flags])
        assert end.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.usefixtures("timeless")
def test_tuned_uses_the_best_cell(common, tmp_path, capsys):
    assert sweep.main([*common, "--num_speculations_last", "2"]) == 0
    folder = only_run(tmp_path)
    best = json.loads((folder / "run.json").read_text())["metrics"]["best"]
    flags = common[: common.index("--exit_layer_last")]
    output = ["--output_dir", str(tmp_path / "b" / "logs")]
    assert benchmark.main([*flags, "--tuned", str(folder.parent), *output]) == 0
    run = json.loads((only_run(tmp_path / "b") / "run.json").read_text())
    arguments = run["arguments"]
    assert "exit_layer {exit_layer}, num_speculations {num_speculations}".format(**best) in heading(run)
    assert arguments["generation_strategy"] == "self_speculative"
    assert {name: arguments[name] for name in ("exit_layer", "num_speculations")} == {
        name: best[name] for name in ("exit_layer", "num_speculations")
    }
    # The same command goes on with it, though the run has an exit layer by now.
    assert (
        benchmark.main([*flags, "--tuned", str(folder.parent), "--resume", str(only_run(tmp_path / "b"))])
        == 0
    )
    same = os.path.relpath(flags[1])
    by_another_path = tuned(GenerationConfig(), TuningArguments(str(folder)), ModelArguments(same), [])
    assert by_another_path.exit_layer == best["exit_layer"]
    for extra, message in (
        (["--exit_layer", "2"], "--tuned sets exit_layer and num_speculations"),
        (["--tuned", str(tmp_path / "nowhere.csv")], "nowhere.csv: No such file"),
        (["--tuned", str(tmp_path)], "no sweep in there"),
        (["--model", default_model()], f"is a sweep of --model {flags[1]}, not of {default_model()}"),
    ):
        with pytest.raises(SystemExit):
            benchmark.main([*flags, "--tuned", str(folder), *extra])
        assert message in capsys.readouterr().err
