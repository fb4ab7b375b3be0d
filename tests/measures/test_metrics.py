"""Sums and medians of records, against numbers worked out by hand."""

import itertools
import json

import pytest

from measures import metrics
from self_speculation.requests.results import DraftStats


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
        "time_per_token": 16 / 8,
        "num_tokens": 8,
    }
    nothing = metrics.speed([empty])
    assert nothing["decode_tokens_per_second_median"] is nothing["time_per_token"] is None
    two_ranks = metrics.speed([record(), record(rank=1, wall_time=12.0)])  # they run at the same time
    assert (two_ranks["total_time"], two_ranks["tokens_per_second"]) == (12.0, 8 / 12)


def test_draft_stats_of_answers_are_added():
    """Guards against means of rates, tokens after an output's end, and sums that depend on the order."""
    first = DraftStats()
    second = DraftStats()
    first.add("n-grams", drafted=2, accepted=2, emitted=3)
    second.add("exit 2", drafted=4, accepted=3, emitted=2)  # the output ends in the accepted tokens
    second.add("n-grams", drafted=1, accepted=0, emitted=1)
    records = [{"drafts": json.loads(json.dumps(each.to_rows()))} for each in (first, second)]
    assert metrics.draft_stats(records) == first + second == second + first
    assert (first + second).accepted_by_position == [2, 2, 0, 0]
    assert metrics.acceptance(records) == {
        "acceptance_rate": 4 / 7,
        "acceptance_rate_mean": (2 / 2 + 2 / 5) / 2,
        "mean_accepted_length": 6 / 3,
        "num_drafted": 7,
        "num_accepted": 4,
        "num_verifications": 3,
        "drafts_by_source": {
            "exit 2": {"rounds": 1, "drafted": 4, "accepted": 2},
            "n-grams": {"rounds": 2, "drafted": 3, "accepted": 2},
        },
    }
    nothing = DraftStats()
    assert nothing.acceptance_rate is nothing.mean_accepted_length is None


def compared(ours, theirs, num_tokens=(100,), baseline_tokens=None, **fields):
    """The speed-up of records with the given wall times and numbers of tokens."""
    pairs = zip(ours, theirs, itertools.cycle(num_tokens), itertools.cycle(baseline_tokens or num_tokens))
    records = [
        record(window=i, num_tokens=n, wall_time=a, prefill_time=0.5)
        | {f"base_{k}": v for k, v in record(num_tokens=m, wall_time=b, prefill_time=0.5).items()}
        | fields
        for i, (a, b, n, m) in enumerate(pairs)
    ]
    return metrics.speedup(records, "base_")


def test_speedup_is_the_median_ratio_of_rates():
    """Guards against a ratio of times, though sampled outputs differ in length, and the pace of a stall."""
    result = compared([1.0] * 10, [1.4] * 8 + [30.0, 1.4], [100], [50], batch_size=2)
    assert result["speedup_quartiles"] == pytest.approx([2.8] * 3)
    assert result["speedup"] == pytest.approx(2.8)
    assert (result["speedup_faster"], result["speedup_windows"], result["identical_outputs"]) == (10, 10, 10)


def test_few_or_contrary_windows_are_remarked_on():
    """Guards against a gain that the examples do not show."""
    for ours, theirs, end in (
        ([1.0] * 8, [1.3] * 8, None),
        ([1.0] * 4, [1.3] * 4, "there are fewer than five"),
        ([1.0] * 6, [1.3, 0.8, 1.2, 0.9, 1.3, 0.7], "1.00 is in the 90 % confidence interval"),
    ):
        warnings = metrics.undecided(compared(ours, theirs)["speedup_interval"], "windows")
        assert warnings == ([f"these windows do not tell which strategy is faster: {end}"] if end else [])


def test_empty_answers_are_not_compared():
    """Guards against a division by zero, and a window that counts on one side alone."""
    result = compared([1.0] * 4, [2.0] * 4, [100, 0, 100, 0], [100, 0, 0, 100])
    assert (result["speedup"], result["speedup_windows"]) == (2.0, 1)
    result = compared([1.0], [2.0], [0])
    assert (result["speedup"], result["speedup_interval"], result["speedup_quartiles"]) == (None, None, [])


def test_text_quality():
    """Guards against references and predictions that change places, and sums in place of means."""
    quality = metrics.text_quality(["a cat sat on it", "b"], ["a cat sat on it ", "c"])
    assert (quality["exact_match"], quality["edit_distance"]) == (0.5, 1.0)  # one space, one letter
    assert quality["rouge1"] == pytest.approx(0.5)
    assert 0 < quality["bleu"] <= 100
