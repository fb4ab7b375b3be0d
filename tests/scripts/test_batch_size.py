"""--batch_size of the scripts: timings of windows, failures of one row, and equal outputs.

test_interruptions.py compares records of batches with those of single sequences.
"""

import json

import pandas
import pytest
import torch
from helpers import about, only_run, small_run

import benchmark
import correctness
import self_speculation.self_speculation_generator as self_speculation_generator
from measures import timed_runs
from self_speculation import Verification
from self_speculation.decoding.batch import Batch
from self_speculation.decoding.sampling import verify_draft
from self_speculation.model.model_runner import ModelRunner

DRAFTS = ["--exit_layer", "2", "--num_speculations", "3"]
THREE = ["--batch_size", "3"]


@pytest.fixture
def common(model_folder, tmp_path):
    return small_run(model_folder, tmp_path, 8, 16)


def test_sides_take_turns_by_windows(common, tmp_path, monkeypatch, capsys):
    """Guards against a side that always goes first, and a ratio of examples whose times overlap."""
    turns, measured = [], timed_runs._measured
    monkeypatch.setattr(timed_runs, "_measured", lambda *args: turns.append(args[0][0]) or measured(*args))
    monkeypatch.setattr(timed_runs, "_BATCHES_IN_TURN", 1)
    args = [*common, "--compare", "True", "--sample", "False", *DRAFTS, "--batch_size", "2"]
    assert benchmark.main(args) == 0
    assert turns == ["autoregressive_", "", "", "autoregressive_"] * 2  # 4 windows of two
    folder = only_run(tmp_path)
    metrics, records = about(folder)["metrics"], pandas.read_json(folder / "records.jsonl", lines=True)
    compared = metrics["comparison"]
    assert metrics["speed"]["total_time"] == pytest.approx(records["wall_time"].sum())
    assert (compared["speedup_windows"], compared["identical_outputs"]) == (4, 8)
    assert compared["speedup_of_totals"] > 0
    assert compared["decode_speedup"] is compared["predicted_decode_speedup"] is None  # times overlap
    assert set(records["window"]) == {0, 2, 4, 6}
    assert set(records["batch_size"]) == {2}
    table = capsys.readouterr().out
    assert all(f in table for f in ("middle half of windows", "decode, beside other rows", "batch size 2\n"))


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
    """Guards against --batch_size that correctness.py ignores or that needs drafts."""
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
