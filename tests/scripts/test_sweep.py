"""sweep.py: counts read off one pass are those of real decoding; the last line is the best cell's."""

import re

import pandas
import pytest
from helpers import about, no_calibration, no_pictures, only_run, small_run, watch

import sweep
from measures import sweeping, timed_runs
from measures.replay import costs_of, replayed, round_cost
from runs.records import heading
from sweep import SweepArguments

COUNTS = ["num_verifications", "num_drafted", "num_accepted", "acceptance_rate", "mean_accepted_length"]


def test_costs_of_a_round():
    """Guards against draft lengths and exits between measured ones that have no cost."""
    costs = {2: [(1, 2.5), (3, 5.5)], 4: [(1, 3.5), (3, 7.5)]}
    assert [round_cost(costs, 2, k) for k in (0, 1, 2, 3)] == [1, 2.5, 4, 5.5]
    assert [round_cost(costs, layer, 1) for layer in (1, 3, 4)] == [2.5, 3, 3.5]


def test_costs_are_those_of_rounds_beside_plain_steps():
    """Guards against the pace of a busy moment in a cost, a stall that decides, answers of one token, and
    plain steps that are counted by the drafted answer.
    """

    def timed(pace, stall=1.0, steps=4):
        drafts = [{"source": "exit", "drafted": k, "accepted": 1, "emitted": 2, "rounds": 1} for k in (3, 1)]
        return {
            "drafts": drafts, "num_decode_tokens": steps // 2, "decode_time": pace * stall * 3.0,
            "autoregressive_num_decode_tokens": steps, "autoregressive_decode_time": pace * 4.0,
        }  # fmt: skip

    costs = costs_of(
        {(5, 3): [timed(1.0), timed(2.0), timed(1.0, stall=9.0), timed(1.0, steps=0)], (2, 3): []}
    )
    assert costs == {5: [(2.0, 1.5)]}  # two rounds, of two drafted tokens


def test_a_predicted_cell_is_the_median_example_with_its_interval():
    """Guards against one slow prompt that decides a cell, an interval of too few prompts, and a speed-up that
    leaves out the prompt.
    """

    def cell_of(*examples):
        """The row of examples of ten tokens, which an exit guesses always or never after so many seconds."""
        costs, records = {2: [(2, 1.5)]}, []
        for index, (match, prefill_time) in enumerate(examples):
            record = {"index": index, "tokens": [1] * 10, "num_tokens": 10, "max_tokens": 100}
            record |= {"matches": {"2": match * 10}, "prefill_time": prefill_time, "decode_time": 18.0}
            records.append(replayed(record, costs, (2, 2)))
        return sweeping._row("predicted", (2, 2), records)

    # Three rounds of two draft steps and a verification, or eight of them and a last one of one draft step.
    always, never = 9 / (3 * 1.5), 9 / (8 * 1.5 + 1.25)
    assert cell_of(*[("1", 0.0)] * 12, ("0", 1000.0))["speedup"] == pytest.approx(always)
    assert cell_of(("1", 9.0))["speedup"] == pytest.approx((9 + 18) / (9 + 9))
    cell = cell_of(*[("1", 0.0), ("0", 0.0)] * 5)
    assert (cell["speedup_low"], cell["speedup_high"]) == pytest.approx((never, always), rel=0.05)
    cell = cell_of(*[("1", 0.0)] * 4)
    assert cell["speedup_low"] is cell["speedup_high"] is None


@pytest.fixture
def common(model_folder, tmp_path):
    grid = ["--exit_layer_last", "3", "--num_speculations_last", "4", "--sample", "False"]
    return [*small_run(model_folder, tmp_path, 3, 24), *grid]


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
    ],
)
@pytest.mark.usefixtures("timeless")
def test_predicted_counts_are_the_measured_ones(common, tmp_path, extra):
    """Guards against a replay that drafts, accepts or ends otherwise than decoding does."""
    common += ["--num_speculations_step", "3", *extra]
    for mode in ("predicted", "measured"):
        assert sweep.main([*common, "--mode", mode, "--output_dir", str(tmp_path / mode / "logs")]) == 0
    predicted, measured = table(tmp_path / "predicted"), table(tmp_path / "measured")
    assert len(predicted) == 6
    pandas.testing.assert_frame_equal(predicted[COUNTS], measured[COUNTS])
    assert (predicted["num_tokens"] == measured["num_tokens"]).all()
    assert (predicted[["total_time", "speedup", "tokens_per_second_median"]] > 0).all(axis=None)


def test_pictures_table_and_flags(common, tmp_path, monkeypatch, capsys):
    """Guards against a table without model and machine, predicted cells above measured ones, and flags of
    another cell than the best one.
    """
    monkeypatch.setattr("measures.sweeping._PROMPTS", 1)
    assert sweep.main([*common, "--num_speculations_last", "3", "--verify_top", "2"]) == 0
    folder = only_run(tmp_path)
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "sweep.pdf").read_bytes().startswith(b"%PDF")
    run, output = about(folder), capsys.readouterr().out
    assert f"\n{heading(run, ('exit_layer', 'num_speculations'))}\n" in output
    files = "records.jsonl, run.json, sweep.csv, sweep.pdf, sweep.png"
    assert f"\n{folder}/: {files}\n" in output
    modes = re.findall("^ *(measured|predicted) +[0-9]", output, re.MULTILINE)
    assert modes == ["measured"] * 2 + ["predicted"] * 9
    assert len(re.findall(" predicted, .* measured$", output, re.MULTILINE)) == 2
    best = run["metrics"]["best"]
    assert output.splitlines()[-1] == (
        f"--generation_strategy self_speculative --exit_layer {best['exit_layer']} "
        f"--num_speculations {best['num_speculations']}"
    )
    rows = pandas.read_csv(folder / "sweep.csv")
    assert rows["mode"].value_counts().to_dict() == {"predicted": 9, "measured": 2}
    assert best["speedup"] == pytest.approx(rows[rows["mode"] == "measured"]["speedup"].max())
    costs = run["metrics"]["costs"]
    assert {layer: len(points) for layer, points in costs.items()} == {"1": 2, "2": 2, "3": 2}


@pytest.mark.parametrize(("verified", "which", "speedup"), [("0", "", 2.0), ("2", "measured ", 0.5)])
@pytest.mark.usefixtures("timeless")
def test_frame_and_last_lines_are_of_one_cell(
    verified, which, speedup, common, tmp_path, monkeypatch, capsys
):
    """Guards against a frame around another cell than the last line's, "no cell is faster" where two of
    twelve were measured, and a cell of few prompts that looks certain.
    """
    drawn = watch(monkeypatch, sweeping, "heat_maps")
    speeds = {"predicted": {"speedup": 2.0}, "measured": {"speedup": 0.5}}
    made = sweeping._row
    monkeypatch.setattr(sweeping, "_row", lambda mode, *rest: made(mode, *rest) | speeds[mode])
    assert sweep.main([*common, "--num_samples", "1", "--verify_top", verified]) == 0
    best = about(only_run(tmp_path))["metrics"]["best"]
    assert best["speedup"] == speedup
    (((_, _, framed, title, _, measured), _),) = drawn
    assert measured == (0.5 if which else None)
    assert framed == ((best["exit_layer"], best["num_speculations"]), f"best {which}speed-up")
    assert title.endswith("\n1 prompt, whole answers with prefill")
    output = capsys.readouterr().out
    slower = "no measured cell is faster than decoding without drafts; the nearest:"
    assert (output.splitlines()[-2] == slower) == (verified == "2")
    said = "note: these prompts do not tell which strategy is faster: there are fewer than five"
    assert " ".join(output.split()).count(said) == 1


@pytest.mark.parametrize(
    ("flags", "is_slower"),
    [("--mode predicted", False), ("--mode predicted --verify_top 1", True), ("--mode measured", True)],
)
@pytest.mark.usefixtures("timeless")
def test_a_sweep_of_a_busy_machine_says_so(flags, is_slower, common, tmp_path, monkeypatch, capsys):
    """Guards against a heading and a picture with threads that measured cells did not have."""
    measure, measuring = timed_runs.measure_examples, []

    def busy(*args):
        measuring.append(args)
        yield from measure(*args)
        measuring.clear()

    monkeypatch.setattr(timed_runs, "measure_examples", busy)
    monkeypatch.setattr("torch.get_num_threads", lambda: 1 if measuring else 2)
    grid = ["--exit_layer_last", "1", "--num_speculations_last", "1", "--num_samples", "1", "--threads", "1"]
    assert sweep.main([*common, *grid, *flags.split()]) == 0
    assert about(only_run(tmp_path))["threads_used"] == (1 if is_slower else 2)
    said = "down to 1 of 2 threads" if is_slower else "2 threads"
    assert f", {said}, 1 rank" in " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("timeless")
def test_unused_and_cut_flags_are_named(common, tmp_path, capsys):
    """Guards against a sweep that ignores a flag without a word."""
    flags = ["--exit_layer", "2", "--num_speculations", "3", "--generation_strategy", "adaptive"]
    grid = ["--exit_layer_last", "99", "--num_speculations_last", "1"]
    assert sweep.main([*common, *flags, *grid]) == 0
    said = capsys.readouterr().err
    for name in ("exit_layer 2", "num_speculations 3", "generation_strategy adaptive"):
        assert f"--{name}: not used; " in said
    assert "--exit_layer_last 99: cut to 3, the model has 4 layers" in said
    assert table(tmp_path).index.get_level_values(0).tolist() == [1, 2, 3]


@pytest.mark.usefixtures("timeless")
def test_copies_may_use_all_layers(common, tmp_path, capsys):
    """Guards against flags of a best cell without the copy that it drafts with."""
    drafts = ["--draft_weights", "int4"]
    assert sweep.main([*common, *drafts, "--exit_layer_last", "9"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(" ".join(drafts))
    by_exit = table(tmp_path)["acceptance_rate"].groupby("exit_layer")
    assert [*by_exit.groups] == [1, 2, 3, 4]
    assert by_exit.min()[4] > by_exit.max()[1]


def test_all_layers_of_a_copy_are_in_the_grid_by_default():
    """Guards against a grid that ends before the best exit of a model without early exits."""
    assert SweepArguments().exit_layers(30, of_copy=True) == [*range(1, 16), 30]
    assert SweepArguments().exit_layers(29, of_copy=False) == [*range(1, 16)]
    assert SweepArguments(exit_layer_last=2).exit_layers(30, of_copy=True) == [1, 2]
