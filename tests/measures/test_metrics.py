"""Sums and medians of records, against numbers worked out by hand."""

import json

import pytest
from conftest import generate, tiny_llama

from measures import benchmarking, metrics, text_quality
from self_speculation.drafts.costs import Costs
from self_speculation.results import DraftStats


def record(**kwargs):
    return {
        "num_tokens": 4, "prefill_time": 1.0, "decode_time": 2.0, "num_decode_tokens": 3, "tokens": [1],
        "wall_time": 3.0, "batch_size": 1, "window": 0, "rank": 0, **kwargs,
    }  # fmt: skip


def test_speed_is_total_tokens_over_wall_time():
    """Guards against a mean of rates, a median that a stall moves, and the pace of a single rank."""
    empty = record(num_tokens=0, decode_time=0.0, num_decode_tokens=0, wall_time=1.0, window=1)
    stalled = record(wall_time=12.0, window=2)
    assert metrics.speed([record(), empty, stalled]) == {
        "tokens_per_second": 8 / 16,
        "tokens_per_second_median": 4 / 12,
        "decode_tokens_per_second_median": 3 / 2,
        "time_to_first_token_ms": 1000,
        "total_time": 16.0,
        "num_tokens": 8,
        "empty_answers": 1,
    }
    assert metrics.speed([empty])["decode_tokens_per_second_median"] is None
    two_ranks = metrics.speed([record(), record(rank=1, wall_time=12.0)])  # they run at the same time
    assert (two_ranks["total_time"], two_ranks["tokens_per_second"]) == (12.0, 8 / 12)


def stats(*rounds):
    """Of rounds: source, drafted, accepted and emitted tokens."""
    found = DraftStats()
    for each in rounds:
        found.add(*each)
    return found


def test_draft_stats_count_the_output():
    """Guards against counts of tokens after the end of the output."""
    # The first output ends in the accepted tokens.
    found = stats(("a", 4, 3, 2), ("b", 2, 0, 1), ("b", 2, 2, 3))
    assert (found.num_verifications, found.num_emitted, found.mean_accepted_length) == (3, 6, 2)
    assert found.drafted_by_position == (3, 3, 1, 1)
    assert found.accepted_by_position == (2, 2, 0, 0)
    assert found.acceptance_by_position == (2 / 3, 2 / 3, 0, 0)
    assert (found.acceptance_rate, found.token_acceptance) == (4 / 8, 4 / 5)
    assert found.by_source == {"a": (1, 4, 2), "b": (2, 4, 2)}
    assert found.rounds_by_length == {4: 1, 2: 2}
    nothing = DraftStats()
    assert nothing.acceptance_rate is nothing.token_acceptance is nothing.mean_accepted_length is None


def test_draft_stats_of_answers_are_added():
    """Guards against means of rates, counts without names, and sums that depend on the order."""
    first, second = stats(("n-grams", 2, 2, 3)), stats(("exit 2", 4, 1, 2), ("n-grams", 1, 0, 1))
    records = [{"drafts": json.loads(json.dumps(each.to_rows()))} for each in (first, second)]
    assert metrics.draft_stats(records) == first + second == second + first
    assert metrics.acceptance(metrics.draft_stats(records)) == {
        "acceptance_rate": 3 / 7,
        "mean_accepted_length": 6 / 3,
        "acceptance_by_position": (2 / 3, 1 / 2, 0, 0),
        "rounds_by_accepted": [2 / 3, 1 / 3, 0, 0],
        "num_drafted": 7,
        "num_accepted": 3,
        "num_verifications": 3,
        "drafts_by_source": {
            "exit 2": {"rounds": 1, "drafted": 4, "accepted": 1},
            "n-grams": {"rounds": 2, "drafted": 3, "accepted": 2},
        },
    }
    assert [*metrics.acceptance(first + second)["drafts_by_source"]] == ["exit 2", "n-grams"]


def test_predicted_speedup_of_the_paper():
    """Guards against another formula than theorem 3.8 of Leviathan et al."""

    def predicted(alpha, k, cost_ratio):
        return metrics.predicted_speedup(alpha, k, 8, Costs(1.0, {8: cost_ratio}, {8: (1.0,)}, (0,)))

    assert predicted(0.0, 4, 0.25) == 1 / 2
    assert predicted(1.0, 4, 0.25) == 5 / 2
    assert predicted(0.5, 1, 0.5) == pytest.approx(1.5 / 1.5)


def test_speedup_is_the_median_ratio_of_rates():
    """Guards against a ratio of times though sampled outputs differ in length, and times of other windows."""
    base = {"base_num_tokens": 5, "base_wall_time": 1.0, "base_tokens": [1]}
    base |= {"base_num_decode_tokens": 9, "base_decode_time": 9.0}
    walls = [0.0, 1.0, 2.0, 2.0]
    records = [record(**base, num_tokens=10, wall_time=wall, window=i // 2) for i, wall in enumerate(walls)]
    found = metrics.speedup(records, "base_")
    # 20 tokens in 1 s and in 4 s, against 10 in 2 s each
    assert found["speedup_quartiles"] == pytest.approx([1.0 + 0.25 * 3, 2.5, 1.0 + 0.75 * 3])
    assert found["speedup_of_totals"] == pytest.approx((40 / 5) / (20 / 4))
    assert (found["decode_speedup"], found["identical_outputs"]) == (1.5, 4)
    batches = [{**each, "batch_size": 2, "tokens": [2]} for each in records]
    found = metrics.speedup(batches, "base_")
    assert (found["decode_speedup"], found["identical_outputs"]) == (None, 0)  # decode times overlap
    assert metrics.quartiles([1.0]) == [1.0, 1.0, 1.0]


def compared(ours, theirs, tokens=()):
    """The speed-up of records with these wall times, and the remarks about it."""
    tokens = tokens or [100] * len(ours)
    records = [
        {
            "window": i, "batch_size": 4, "num_tokens": n, "wall_time": a, "tokens": [],
            "base_num_tokens": n, "base_wall_time": b, "base_tokens": [],
        }
        for i, (a, b, n) in enumerate(zip(ours, theirs, tokens, strict=True))
    ]  # fmt: skip
    result = metrics.speedup(records, "base_")
    return result, benchmarking.remarks(result, "windows")


def test_two_stalled_examples_are_no_speedup():
    """Guards against a headline outside its own middle half: a sum of times is that of its stalls."""
    result, said = compared([1.0] * 10, [1.4] * 8 + [30.0, 1.4])
    low, median, high = result["speedup_quartiles"]
    assert low <= result["speedup"] == median <= high
    assert result["speedup"] == pytest.approx(1.4)
    assert result["speedup_of_totals"] > 4
    assert (result["speedup_faster"], result["speedup_windows"]) == (10, 10)
    assert said == ["a few slow or long windows dominate the speed-up of totals"]


def test_few_or_contrary_examples_are_remarked_on():
    """Guards against a gain that the examples do not show."""
    assert compared([1.0] * 8, [1.3] * 8)[1] == []
    (few,) = compared([1.0] * 4, [1.3] * 4)[1]
    assert few == "these windows do not tell which strategy is faster: there are fewer than five"
    said = compared([1.0] * 6, [1.3, 0.8, 1.2, 0.9, 1.3, 0.7])[1]
    assert "do not tell which strategy is faster: 1.00 is in the 90 % confidence interval" in said[0]


def test_empty_answers_are_not_compared():
    """Guards against a division by zero, and a window that counts on one side alone."""
    result, said = compared([1.0, 1.0], [2.0, 2.0], tokens=[100, 0])
    assert (result["speedup"], result["speedup_of_totals"], result["speedup_windows"]) == (2.0, 2.0, 1)
    result, (said,) = compared([1.0], [2.0], tokens=[0])
    assert (result["speedup"], result["speedup_of_totals"], result["speedup_interval"]) == (None, None, None)
    assert "nothing to compare" in said


def test_text_quality():
    """Guards against references and predictions that change places, and sums in place of means."""
    quality = text_quality.text_quality(["a cat sat on it", "b"], ["a cat sat on it ", "c"])
    assert quality["exact_match"] == 0.5
    assert quality["rouge1"] == pytest.approx(0.5)
    assert quality["edit_distance"] == 1.0  # one space, one letter
    assert 0 < quality["bleu"] <= 100


PROBLEM = {"task_id": "T/0", "prompt": "def f():\n", "test": "def check(f): assert f() == 1"}
PROBLEM |= {"entry_point": "f"}


def test_pass_at_1_runs_answers_in_a_process_with_limits():
    """Guards against a wrong, broken or endless program that passes or ends this process, and against text
    after the function that fails a correct one.
    """
    answers = [
        "    return 1", "    return 2", "    return (", "    import os; os._exit(0)",
        "    return 1\n\ndef g(x", "    return 1\nprint(f",
    ]  # fmt: skip
    assert text_quality.pass_at_1([PROBLEM] * 6, answers, timeout=100.0) == pytest.approx(3 / 6)
    assert text_quality.pass_at_1([PROBLEM], ["    while True: pass"], timeout=0.5) == 0


def test_measured_counts_feed_the_formula():
    """Guards against counts of a real run that the formula reads otherwise."""
    result = generate(
        tiny_llama(agreement="always"), [3, 4], exit_layer=2, num_speculations=3, max_steps=13, eos=[]
    )
    assert result.draft_stats.token_acceptance == 1
    assert result.mean_accepted_length == 4
    assert result.num_decode_tokens == result.draft_stats.num_emitted
