"""Sampling: the joint distribution of the first three tokens is the full model's, exactly enumerated.

False-alarm rate: 1e-4 for each chi-square test; the seed is fixed, so that none flickers. Power of 800
samples: of 7 experiments with each wrong rule below all found it, with p-values of 2e-9 at most.
"""

import itertools
import random
from collections import Counter

import pytest
import torch
from distributions import (
    PROMPT,
    STEPS,
    accepts_everything,
    config,
    expected,
    forgets_what_was_not_drafted,
    judges_by_the_argmax,
    model,
    observed,
    p_value,
    resamples_from_the_target,
)
from transformers import RepetitionPenaltyLogitsProcessor

import self_speculation.self_speculation_generator as self_speculation_generator
from self_speculation import Request, make_strategy
from self_speculation.drafts.policy import AdaptivePolicy, Plan

SAMPLES = 800


class OnlyOthers:
    """A processor that now and then leaves nothing but ids that a short vocabulary does not have."""

    def __call__(self, ids, logits):
        if int(ids.sum()) % 2:
            return logits
        return logits.index_fill(1, torch.tensor(PROMPT), -torch.inf)


SETTINGS = {
    "plain": ({}, []),
    "cold": ({"temperature": 0.5}, []),
    "hot": ({"temperature": 2.0}, []),
    "top_k": ({"top_k": 3}, []),
    "top_p": ({"top_p": 0.7}, []),
    "all": ({"temperature": 1.5, "top_k": 4, "top_p": 0.8}, []),
    "processor": ({}, [RepetitionPenaltyLogitsProcessor(2.0)]),
    "confidence": ({"draft_confidence": "0.3", "num_speculations": 3}, []),
    "confidence, learnt": ({"draft_confidence": "auto", "num_speculations": 3}, []),
    "lookup": ({"prompt_lookup": 2}, []),
    "int8": ({"draft_weights": "int8", "exit_layer": 2}, []),
    "int4": ({"draft_weights": "int4", "exit_layer": 2}, []),
    "vocabulary": ({"draft_vocabulary": 1}, []),
    "vocabulary, processor": ({"draft_vocabulary": 2, "top_p": 0.9}, [OnlyOthers()]),
    "vocabulary, all": (
        {"draft_vocabulary": 1, "draft_weights": "int8", "draft_confidence": "auto", "prompt_lookup": 1},
        [],
    ),
    "int4, lookup, confidence": (
        {"draft_weights": "int4", "draft_confidence": "0.2", "prompt_lookup": 1, "top_p": 0.8},
        [],
    ),
}


# Parts of what "all" and the last one are about, too.
SLOW = dict.fromkeys(
    ("cold", "hot", "top_k", "top_p", "confidence", "int8", "int4", "vocabulary"), pytest.mark.slow
)


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, ())) for name in SETTINGS])
def test_self_speculative_distribution(name):
    kwargs, processors = SETTINGS[name]
    assert (
        p_value(observed(config(**kwargs), processors, SAMPLES), expected(config(**kwargs), processors))
        > 1e-4
    )


@pytest.mark.parametrize("draft_vocabulary", [None, 2])
def test_adaptive_distribution(draft_vocabulary, monkeypatch):
    """Plans are drawn, so that exits, lookups and plain steps all come in turn."""
    draws = random.Random(0)

    def plan(_, matched, rooms):
        [room], able = rooms, [name for name in matched if matched[name] != [None]]
        source = draws.choice(["", *able]) if room else ""
        return Plan(source, draws.randint(1, room) if source else 0)

    monkeypatch.setattr(AdaptivePolicy, "plan", plan)
    chosen = config(
        generation_strategy="adaptive", exit_layer=-1, num_speculations=-1, top_p=0.8,
        draft_vocabulary=draft_vocabulary,
    )  # fmt: skip
    assert p_value(observed(chosen, [], SAMPLES), expected(chosen, [])) > 1e-4


MIXTURES = {
    "exit": {},
    "lookup": {"prompt_lookup": 1},
    "lookup, confidence": {"prompt_lookup": 2, "draft_confidence": "0.3", "num_speculations": 3},
    "int8, vocabulary, lookup": {"draft_weights": "int8", "draft_vocabulary": 2, "prompt_lookup": 1},
}


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize(
    ("batch_size", "refilled"),
    [(2, True), *(pytest.param(*how, marks=pytest.mark.slow) for how in [(2, False), (4, False), (4, True)])],
)
def test_the_distribution_of_rows_with_drafts_of_several_sources(refilled, batch_size, name):
    """Guards against a lookup of one row that is accepted whatever it is, because another row drafts nothing.
    Where rows are refilled, some have room for one token and others for three.
    """
    chosen, likely = config(**MIXTURES[name]), expected(config(**MIXTURES[name]), [])
    lengths = itertools.cycle((3, 5, 4) if refilled else (5,))
    prompts = itertools.islice(zip(itertools.count(), lengths), SAMPLES)
    requests = [
        Request(PROMPT, seed=seed, ends_text=lambda tokens, end=end: len(tokens) >= end)
        for seed, end in prompts
    ]
    fused = chosen.draft_weights != "exact"
    results = make_strategy("self_speculative").generate_batch(model(fused), requests, chosen, batch_size)
    tokens = Counter(tuple(result.predicted_tokens[:STEPS]) for _, result in results)
    assert p_value(tokens, likely) > 1e-4


def test_autoregressive_distribution():
    plain = config(generation_strategy="autoregressive", exit_layer=-1)
    assert p_value(observed(plain, [], SAMPLES), expected(plain, [])) > 1e-4


@pytest.mark.parametrize(
    ("rule", "samples"),
    [
        (accepts_everything, 200),
        (resamples_from_the_target, 600),
        (judges_by_the_argmax, 600),
        (forgets_what_was_not_drafted, 600),
    ],
)
def test_a_wrong_accept_rule_is_caught(rule, samples, monkeypatch):
    """The tests above could not fail if their statistics were too weak; with each classic mistake they do.

    Power: 30 experiments of 200 samples all found the first (p at most 1e-14), 10 of 600 samples each all
    found the second and the third (p at most 4e-7). With a short vocabulary, 5 of 300 samples each all found
    the fourth (p at most 5e-8).
    """
    monkeypatch.setattr(self_speculation_generator, "verify_draft", rule)
    drafts = config(draft_vocabulary=1 if rule is forgets_what_was_not_drafted else None)
    assert p_value(observed(drafts, [], samples), expected(drafts, [])) < 1e-4
