"""What records add up to, against numbers worked out by hand."""

import pytest
import torch
from conftest import generate, tiny_llama

from measures import metrics, text_quality
from self_speculation.drafts.costs import Costs


def record(drafted=(), accepted=(), **kwargs):
    return {
        "num_tokens": 4, "prefill_time": 1.0, "decode_time": 2.0, "num_decode_tokens": 3, "tokens": [1],
        "num_verifications": 2, "drafted_by_position": drafted, "accepted_by_position": accepted,
        "judged_by_position": (), **kwargs,
    }  # fmt: skip


def test_speed_is_total_tokens_over_total_time_beside_the_mean_of_examples():
    """The mean of rates is not the rate of the whole."""
    records = [record(), record(num_tokens=0, decode_time=0.0, num_decode_tokens=0, prefill_time=1.0)]
    speed = metrics.speed(records)
    assert speed["tokens_per_second"] == 4 / 4
    assert speed["tokens_per_second_mean"] == pytest.approx((4 / 3 + 0) / 2)
    assert speed["decode_tokens_per_second"] == 3 / 2
    assert speed["decode_ms_per_token"] == pytest.approx(2000 / 3)
    assert speed["time_to_first_token_ms"] == 1000
    assert speed["empty_answers"] == 1


def test_acceptance_adds_counts_not_rates():
    records = [record((2, 2), (2, 1)), record((4,), (1,))]
    result = metrics.acceptance(records)
    assert result["acceptance_rate"] == 4 / 8
    assert result["acceptance_by_position"] == [3 / 6, 1 / 2]
    assert result["mean_accepted_length"] == 6 / 4
    assert result["drafts_by_source"] == {}
    sources = [{"layers": (3, 6, 2), "lookup": (1, 2, 2)}, {"layers": (2, 4, 1)}]
    by_source = metrics.acceptance([record((2,), (1,), drafts_by_source=each) for each in sources])
    assert by_source["drafts_by_source"] == {"layers": [5, 10, 3], "lookup": [1, 2, 2]}
    nothing = metrics.acceptance([record(num_verifications=0)])
    assert nothing["acceptance_rate"] is nothing["mean_accepted_length"] is None


def test_token_acceptance_counts_what_was_judged():
    """Of 10 first tokens 8 are accepted, of the 8 judged second ones 4: 12 of 18."""
    assert metrics.token_acceptance([record((10, 10), (8, 4), judged_by_position=(10, 8))]) == 12 / 18
    assert metrics.token_acceptance([record()]) is None


def test_predicted_speedup_of_the_paper():
    """DESIGN's rows: llama2-7B on CNN/DM 1-shot, E 8, k 12, acceptance 68.9 %, is predicted 2.32."""

    def predicted(alpha, k, cost_ratio):
        return metrics.predicted_speedup(alpha, k, 8, Costs(1.0, {8: cost_ratio}, {8: (1.0,)}, (0,), 0.0))

    assert predicted(0.0, 4, 0.25) == 1 / 2
    assert predicted(1.0, 4, 0.25) == 5 / 2
    assert predicted(0.5, 1, 0.5) == pytest.approx(1.5 / 1.5)


def test_speedup_compares_rates_since_sampled_lengths_differ():
    fast = record(**{f"base_{key}": value for key, value in record().items()})
    fast |= {"base_decode_time": 4.0, "base_num_decode_tokens": 6, "base_tokens": [2]}
    result = metrics.speedup([fast, fast], "base_")
    assert result["decode_speedup"] == 1.0
    assert result["decode_speedup_quartiles"] == [1.0, 1.0, 1.0]
    assert metrics.quartiles([1.0, 2.0]) == [1.25, 1.5, 1.75]
    assert result["identical_outputs"] == 0


def test_text_quality():
    quality = text_quality.text_quality(["a cat sat on it", "b"], ["a cat sat on it ", "c"])
    assert quality["exact_match"] == 0.5
    assert quality["rouge1"] == pytest.approx(0.5)
    assert quality["edit_distance"] == 1.0  # one space, one letter
    assert 0 < quality["bleu"] <= 100


PROBLEM = {
    "task_id": "T/0",
    "prompt": "def f():\n",
    "test": "def check(f): assert f() == 1",
    "entry_point": "f",
}


def test_pass_at_1_runs_answers_in_a_process_with_limits():
    """One right, one wrong, one that breaks, one that would end this process, and two that are right up to
    where the function ends: with time enough on a slow machine. Then one that never ends.
    """
    answers = [
        "    return 1", "    return 2", "    return (", "    import os; os._exit(0)",
        "    return 1\n\ndef g(x", "    return 1\nprint(f",
    ]  # fmt: skip
    assert text_quality.pass_at_1([PROBLEM] * 6, answers, timeout=100.0) == 3 / 6
    assert text_quality.pass_at_1([PROBLEM], ["    while True: pass"], timeout=0.5) == 0


def test_measured_counts_feed_the_formula():
    """On a model that always accepts, alpha is 1 and the mean accepted length k + 1."""
    result = generate(
        tiny_llama(agreement="always"), [3, 4], exit_layer=2, num_speculations=3, max_steps=13, eos=[]
    )
    counts = record(
        result.drafted_by_position, result.accepted_by_position, judged_by_position=result.judged_by_position
    )
    assert metrics.token_acceptance([counts]) == 1
    assert torch.tensor(result.mean_accepted_length) == 4
