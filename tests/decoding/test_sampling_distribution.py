"""Sampling: the joint distribution of the first three tokens is that of the full model.

False alarms: 1e-4 for each chi-square test, fixed seeds. With 800 samples, rules that accept everything,
judge by the argmax or resample from the target have p-values of at most 2e-9.
"""

import itertools
from contextlib import nullcontext

import pytest
from conftest import mixed_drafts, random_plans
from distributions import config, expected, observed, p_value
from transformers import RepetitionPenaltyLogitsProcessor

from self_speculation.decoding import sampling

SAMPLES, BATCH_SIZE = 800, 50  # a large batch takes few passes


PROCESSORS = {"processor": [RepetitionPenaltyLogitsProcessor(2.0)]}
SETTINGS = {
    "autoregressive": {"generation_strategy": "autoregressive", "exit_layer": -1},  # the comparison itself
    "plain": {},
    "all": {"temperature": 1.5, "top_k": 4, "top_p": 0.8},
    "processor": {},
    "lookup": {"prompt_lookup": 2},
    "int4, lookup": {"draft_weights": "int4", "prompt_lookup": 1, "top_p": 0.8},
}  # fmt: skip
# Rows may have drafts of several sources. This guards against n-grams that are always accepted because
# another row has no draft.
FAST = ("autoregressive", "plain", "all", "processor", "int4, lookup")
DEFAULT = [(name, BATCH_SIZE) for name in FAST]
SLOW = [how for how in itertools.product(SETTINGS, (1, 2, 4)) if how not in DEFAULT]


@pytest.mark.parametrize(
    ("name", "batch_size"), [*DEFAULT, *(pytest.param(*how, marks=pytest.mark.slow) for how in SLOW)]
)
def test_self_speculative_distribution(name, batch_size):
    """Guards against samples from another distribution than the full model's."""
    chosen, processors = config(**SETTINGS[name]), PROCESSORS.get(name, [])
    with nullcontext() if name == "autoregressive" else mixed_drafts():
        samples = observed(chosen, processors, SAMPLES, batch_size)
    assert p_value(samples, expected(chosen, processors)) > 1e-4


def test_drafts_of_likely_tokens_only(monkeypatch):
    """Guards against a target that lacks the other tokens, too, and a draft that states another q."""
    chosen = config(top_p=0.95, temperature=1.5)
    wanted = expected(chosen, [])
    monkeypatch.setattr(sampling, "_LIKELY", 2)
    with mixed_drafts("exit 1"):
        assert p_value(observed(chosen, [], SAMPLES, BATCH_SIZE), wanted) > 1e-4


@mixed_drafts("exit 1")
def test_adaptive_distribution():
    """Guards against plans that change the distribution. They are random, to have every kind of round."""
    chosen = config(
        generation_strategy="adaptive", exit_layer=-1, num_speculations=-1, top_p=0.8,
    )  # fmt: skip
    with random_plans(0):
        assert p_value(observed(chosen, [], SAMPLES, BATCH_SIZE), expected(chosen, [])) > 1e-4
