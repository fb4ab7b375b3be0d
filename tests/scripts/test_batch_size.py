"""--batch_size of the scripts: the same records, whatever it is; and nothing that had ended is lost."""

import json

import forks
import pandas
import pytest
import torch
from conftest import ROOT
from helpers import custom_data, no_pictures, only_run, untimed

import benchmark
import correctness
import eval as eval_script
import self_speculation.self_speculation_generator as self_speculation_generator
import sweep
from measures import metrics
from self_speculation import Verification
from self_speculation.decoding.batch import Batch
from self_speculation.decoding.sampling import verify_draft
from self_speculation.model.model_runner import ModelRunner

DRAFTS = ["--exit_layer", "2", "--num_speculations", "3"]
SPECULATION = ["--generation_strategy", "self_speculative", *DRAFTS]
THREE = ["--batch_size", "3"]


@pytest.fixture
def common(model_folder, tmp_path):
    return [
        "--model", str(model_folder), "--output_dir", str(tmp_path / "logs"), "--num_samples", "8",
        "--max_steps", "16", "--dataset", "custom_jsonl", "--data_path", custom_data(tmp_path),
    ]  # fmt: skip


def by_index(folder):
    """Records without times. Order and columns of a file depend on nothing else."""
    return sorted(untimed(folder), key=lambda record: record["index"])


def metrics_of(folder):
    return json.loads((folder / "run.json").read_text())["metrics"]


def elsewhere(tmp_path, name):
    return ["--output_dir", str(tmp_path / name / "logs")]


@pytest.mark.parametrize("drafts", [[], SPECULATION], ids=["autoregressive", "self-speculative"])
def test_a_benchmark_has_the_records_of_batch_1(drafts, common, tmp_path, capsys):
    """Sampled. Guards against draws that depend on the neighbours, and records under another row's index."""
    args = [*common, *drafts, "--no_repeat_ngram_size", "3"]
    assert benchmark.main([*args, *elsewhere(tmp_path, "one")]) == 0
    capsys.readouterr()
    assert benchmark.main([*args, *THREE]) == 0
    folder = only_run(tmp_path)
    assert by_index(folder) == by_index(only_run(tmp_path / "one"))
    records = pandas.read_json(folder / "records.jsonl", lines=True)
    assert set(records["batch_size"]) == {3}
    found = metrics_of(folder)
    assert found["speed"]["total_time"] == pytest.approx(records["wall_time"].sum())
    table = capsys.readouterr().out
    assert ", 1 rank, batch size 3\n" in table
    assert "tokens/s, decode, beside other rows" in table
    assert all(len(line) <= 100 for line in table.splitlines() if "run.json" not in line)


def test_sides_take_turns_by_windows(common, tmp_path, monkeypatch, capsys):
    """Guards against a side that always goes first, and a ratio of examples whose times overlap."""
    monkeypatch.setattr("measures.timed_runs._BATCHES_IN_TURN", 1)
    args = [*common, "--compare", "True", "--sample", "False", *DRAFTS]
    assert benchmark.main([*args, *elsewhere(tmp_path, "one")]) == 0
    assert benchmark.main([*args, "--batch_size", "2"]) == 0
    folder = only_run(tmp_path)
    assert by_index(folder) == by_index(only_run(tmp_path / "one"))
    compared = metrics_of(folder)["comparison"]
    assert (compared["speedup_windows"], compared["identical_outputs"]) == (4, 8)
    assert compared["speedup_of_totals"] > 0
    assert compared["decode_speedup"] is compared["predicted_decode_speedup"] is None  # times overlap
    assert set(pandas.read_json(folder / "records.jsonl", lines=True)["window"]) == {0, 2, 4, 6}
    assert "middle half of windows" in capsys.readouterr().out


def test_ratio_of_windows_by_hand():
    """Guards against wall times of one side, or of another window, in a ratio."""
    records = [
        {
            "index": i, "window": i // 2, "rank": 0, "num_tokens": 10, "wall_time": wall, "tokens": [i],
            "batch_size": 2, "prefill_time": 9.0, "decode_time": 9.0, "num_decode_tokens": 9,
            "b_num_tokens": 5, "b_wall_time": 1.0, "b_tokens": [i],
            "b_prefill_time": 9.0, "b_decode_time": 9.0,
        }
        for i, wall in enumerate([0.0, 1.0, 2.0, 2.0])
    ]  # fmt: skip
    found = metrics.speedup(records, "b_")
    # 20 tokens in 1 s and in 4 s, against 10 in 2 s each
    assert found["speedup_quartiles"] == pytest.approx([1.0 + 0.25 * 3, 2.5, 1.0 + 0.75 * 3])
    assert found["speedup_of_totals"] == pytest.approx((40 / 5) / (20 / 4))
    records[2]["rank"] = records[3]["rank"] = 1  # at the same time as the others
    assert metrics.speed(records)["total_time"] == 4.0
    assert metrics.speed(records)["tokens_per_second"] == 40 / 4.0


@pytest.mark.parametrize("temperature", ["1", "0"])
def test_a_sampled_run_with_copies_keeps_its_batch_size(common, tmp_path, capsys, temperature):
    """Guards against answers of one run that depend on two batch sizes: rounding in a copy's passes changes
    what is drawn.
    """
    flags = [*SPECULATION, "--draft_weights", "int4", "--sample", "True", "--temperature", temperature]
    args = [*common, "--num_samples", "2", "--max_steps", "8", *flags]
    assert benchmark.main(args) == 0
    again = [*args, "--batch_size", "2", "--resume", str(only_run(tmp_path))]
    if temperature == "0":  # greedy
        assert benchmark.main(again) == 0
        return
    with pytest.raises(SystemExit) as ended:
        benchmark.main(again)
    said = "that run had --batch_size 1, this one has 2; with int4 drafts, sampled tokens depend on the batch"
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_ranks_have_batches_of_their_own(common, tmp_path):
    """Guards against examples that are done twice or not at all, and a wall time that adds up ranks."""
    args = [*common, *SPECULATION]
    assert benchmark.main([*args, *elsewhere(tmp_path, "one")]) == 0
    result = forks.run_ranks(2, ROOT / "benchmark.py", *args, *THREE)
    assert result.returncode == 0, result.stderr
    folder = only_run(tmp_path)
    assert by_index(folder) == by_index(only_run(tmp_path / "one"))
    by_rank = pandas.read_json(folder / "records.jsonl", lines=True).groupby("rank")["wall_time"].sum()
    assert len(by_rank) == 2
    assert metrics_of(folder)["speed"]["total_time"] == pytest.approx(by_rank.max())


def test_an_example_without_numbers_is_named_and_its_neighbours_are_kept(
    common, tmp_path, monkeypatch, capsys
):
    """Guards against a NaN that ends the batch, or that is blamed on the example at its place in there."""
    run, prompts = ModelRunner.run, []

    def damaged(self, inputs, first, last, num_logits):
        result = run(self, inputs, first, last, num_logits)
        if inputs.shape[1] > 4 and first == 0 and num_logits:  # a prompt's pass
            prompts.append(1)
            if len(prompts) == warm + 5:
                result.logits.fill_(torch.nan)
        return result

    warm = 3  # prompts of the warm-up
    monkeypatch.setattr(ModelRunner, "run", damaged)
    assert benchmark.main([*common, "--sample", "False", *THREE]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("example 4: the model's logits are not numbers")
    written = (only_run(tmp_path) / "records.rank0.jsonl").read_text().splitlines()
    done = {json.loads(record)["index"] for record in written}
    assert {0, 1, 2, 3} <= done
    assert 4 not in done
    assert f"; {len(done)} of 8 examples are kept, go on with --resume" in line


def test_out_of_memory_in_a_batch_asks_for_a_smaller_one(common, monkeypatch, capsys):
    """Guards against a traceback, and advice that leaves out the flag that helps."""
    emit, rounds = Batch.emit, []

    def fails(self, logits):
        rounds.append(len(self))
        if rounds.count(3) > 15:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return emit(self, logits)

    monkeypatch.setattr(Batch, "emit", fails)
    assert benchmark.main([*common, "--sample", "False", *THREE]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("out of memory; less takes a --batch_size below 3, a shorter prompt")
    assert "of 8 examples are kept, go on with --resume" in line


@pytest.mark.parametrize("flags", [[], DRAFTS, ["--generation_strategy", "adaptive"]])
def test_correctness_compares_batches_with_single_sequences(flags, common, capsys):
    assert correctness.main([*common, *THREE, "--sample", "False", *flags]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("passed: 8 of 8 examples identical")


def test_correctness_catches_rows_that_are_mixed_up(common, monkeypatch, capsys):
    """Guards against a check that decodes both sides alone, or both in the batch."""

    def shifted(draft_tokens, *rest):
        honest = verify_draft(draft_tokens, *rest)
        rows = len(draft_tokens)
        return Verification(honest.num_accepted, honest.next_token.roll(1) if rows > 1 else honest.next_token)

    monkeypatch.setattr(self_speculation_generator, "verify_draft", shifted)
    assert correctness.main([*common, *THREE, "--sample", "False", *DRAFTS]) == 1
    output = capsys.readouterr().out
    assert "self-speculative, batches of 3" in output
    assert output.splitlines()[-1].startswith("FAILED: ")


def test_sampled_correctness_draws_the_same_in_batches(common, tmp_path):
    """Guards against draws that share random numbers in a batch."""
    args = [*common, *DRAFTS, "--samples_per_prompt", "30", "--sampled_prompts", "1", "--top_k", "8"]
    assert correctness.main([*args, *elsewhere(tmp_path, "one")]) == 0
    assert correctness.main([*args, "--batch_size", "8"]) == 0
    assert by_index(only_run(tmp_path)) == by_index(only_run(tmp_path / "one"))


def test_a_measured_sweep_counts_the_same(common, tmp_path, monkeypatch, capsys):
    """Guards against cells that count other drafts than single sequences make, and a --resume that mixes
    speed-ups of several batch sizes.
    """
    no_pictures(monkeypatch)
    grid = ["--mode", "measured", "--exit_layer_last", "2", "--num_speculations_last", "2"]
    args = [*common, "--sample", "False", *grid]
    assert sweep.main([*args, *elsewhere(tmp_path, "one")]) == 0
    assert sweep.main([*args, *THREE]) == 0
    counts = [
        "exit_layer",
        "num_speculations",
        "num_verifications",
        "num_drafted",
        "num_accepted",
        "num_tokens",
    ]
    left, right = (pandas.read_csv(only_run(path) / "sweep.csv") for path in (tmp_path, tmp_path / "one"))
    pandas.testing.assert_frame_equal(left[counts], right[counts])
    assert (left["speedup"] > 0).all()
    assert ", 1 rank, batch size 3\n" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        sweep.main([*args, "--batch_size", "2", "--resume", str(only_run(tmp_path))])
    assert "that run had --batch_size 3, this one has 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "flags", "said"),
    [
        (sweep, THREE, "--batch_size 3: must be 1 in predicted mode"),
        (benchmark, ["--batch_size", "0"], "--batch_size 0: must be at least 1"),
        (correctness, ["--batch_size", "-1"], "--batch_size -1: must be at least 1"),
    ],
)
def test_impossible_batches(script, flags, said, common, capsys):
    with pytest.raises(SystemExit) as end:
        script.main([*common, *flags])
    assert end.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.usefixtures("few_files_are_read")
@pytest.mark.parametrize("size", ["3", pytest.param("auto", marks=pytest.mark.slow)])
def test_an_evaluation_has_the_answers_of_batch_1(size, model_folder, tmp_path, capsys):
    """Sampled, two tasks at once. Guards against answers handed to another document, and log-likelihoods'
    batch size where answers are generated.
    """
    tasks = ["--include_path", str(ROOT / "eval_tasks"), "--tasks", "python_functions,python_lines"]
    args = ["--model", str(model_folder), *tasks, "--limit", "7", "--max_steps", "12", *SPECULATION]
    args += ["--sample", "True", "--log_samples", "--device", "cpu"]
    results = []
    for name, batch in (("one", "1"), ("many", size)):
        assert eval_script.main([*args, "--batch_size", batch, *elsewhere(tmp_path, name)]) == 0
        folder = only_run(tmp_path / name)
        (answers,), (path,) = folder.glob("samples_python_functions_*"), folder.glob("results_*.json")
        rows = [json.loads(line) for line in answers.read_text().splitlines()]
        results.append(([row["resps"] for row in rows], json.loads(path.read_text())["results"]))
    (single, scores), (batched, batched_scores) = results
    assert batched == single
    assert len(single) == 7
    assert batched_scores.keys() == scores.keys()
    for task, own in scores.items():
        for metric, value in own.items():
            wanted = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            assert batched_scores[task][metric] == wanted
    assert "python_functions: 7 answers" in capsys.readouterr().out
