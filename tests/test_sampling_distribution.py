"""Sampling: the joint distribution of the first three tokens is the full model's, exactly enumerated.

False-alarm rate: 1e-4 for each chi-square test; the seed is fixed, so that none flickers.
"""

import itertools
import random

import pytest
import torch
from conftest import tiny_llama
from scipy.stats import chisquare
from transformers import RepetitionPenaltyLogitsProcessor

import self_speculation.self_speculation_generator as self_speculation_generator
from self_speculation import GenerationConfig, Sampler, Verdict, make_strategy
from self_speculation.decoding.sampling import verify_draft
from self_speculation.drafts.policy import AdaptivePolicy, Plan

PROMPT, VOCAB, STEPS, SAMPLES = [3, 1, 4], 5, 3, 2500


def model(fused=False):
    """Also for int8 drafts, whose kernel takes rows of 32 elements."""
    return tiny_llama(
        num_layers=2, vocab_size=VOCAB, hidden_size=32, eos_token_id=None, bos_token_id=0, fused=fused
    )


def config(**kwargs):
    return GenerationConfig(
        **{"max_steps": STEPS + 2, "num_speculations": 2, "generation_strategy": "self_speculative",
           "exit_layer": 1, "temperature": 1.0, "top_p": 1.0, **kwargs},
    )  # fmt: skip


@torch.inference_mode()
def expected(config, processors):
    """Probability of every sequence of three tokens by the full model, run by transformers."""
    sampler = Sampler.of(config)
    result = {}
    for tokens in itertools.product(range(VOCAB), repeat=STEPS):
        probability = 1.0
        for i, token in enumerate(tokens):
            history = torch.tensor([[*PROMPT, *tokens[:i]]])
            logits = model()(history).logits[:, -1].float()
            for processor in processors:
                logits = processor(history, logits)
            probability *= float(sampler.probabilities(logits)[0, token])
        result[tokens] = probability
    return result


def observed(config, processors):
    torch.manual_seed(0)
    counts = {}
    generator = make_strategy(config.generation_strategy)
    for _ in range(SAMPLES):
        result = generator.generate_token_ids(
            model(config.draft_weights == "int8"), PROMPT, [], config, logits_processors=processors
        )
        key = tuple(result.predicted_tokens[:STEPS])
        counts[key] = counts.get(key, 0) + 1
    return counts


def p_value(counts, probabilities):
    """Chi-square over the sequences expected at least five times, the rest in one bin."""
    assert all(probabilities[key] > 0 for key in counts), "a sequence that the model never gives"
    common = [key for key, p in probabilities.items() if p * SAMPLES >= 5]
    seen = [counts.get(key, 0) for key in common]
    wanted = [probabilities[key] * SAMPLES for key in common]
    seen, wanted = [*seen, SAMPLES - sum(seen)], [*wanted, SAMPLES - sum(wanted)]
    if wanted[-1] < 1e-3:  # no rest: rounding only
        seen, wanted = seen[:-1], [w * SAMPLES / sum(wanted[:-1]) for w in wanted[:-1]]
    return chisquare(seen, wanted, sum_check=False).pvalue


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
    "int8, lookup, confidence": (
        {"draft_weights": "int8", "draft_confidence": "0.2", "prompt_lookup": 1, "top_p": 0.8},
        [],
    ),
}


# Parts of what "all" and the last one are about, too.
SLOW = dict.fromkeys(("cold", "hot", "top_k", "top_p", "confidence", "int8"), pytest.mark.slow)


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, ())) for name in SETTINGS])
def test_self_speculative_distribution(name):
    kwargs, processors = SETTINGS[name]
    assert p_value(observed(config(**kwargs), processors), expected(config(**kwargs), processors)) > 1e-4


def test_adaptive_distribution(monkeypatch):
    """Plans are drawn, so that exits, lookups, plain steps and probes all come in turn."""
    draws = random.Random(0)

    def plan(_, matched, room):
        source = draws.choice(["", *matched]) if room else ""
        length = draws.randint(1, room) if source else 0
        return Plan(source, length, length, probe=0 if source == "exit 1" else draws.choice([0, 1]))

    monkeypatch.setattr(AdaptivePolicy, "plan", plan)
    chosen = config(generation_strategy="adaptive", exit_layer=-1, num_speculations=-1, top_p=0.8)
    assert p_value(observed(chosen, []), expected(chosen, [])) > 1e-4


def test_autoregressive_distribution():
    plain = config(generation_strategy="autoregressive", exit_layer=-1)
    assert p_value(observed(plain, []), expected(plain, [])) > 1e-4


def accepts_everything(draft_tokens, draft_probabilities, target_logits, sampler):
    honest = verify_draft(draft_tokens, draft_probabilities, target_logits, sampler)
    return Verdict(torch.tensor(len(draft_tokens)), honest.next_token)


def resamples_from_the_target(draft_tokens, draft_probabilities, target_logits, sampler):
    """Forgets to take q out of p after a rejection."""
    honest = verify_draft(draft_tokens, draft_probabilities, target_logits, sampler)
    row = sampler.probabilities(target_logits)[int(honest.num_accepted)]
    return Verdict(honest.num_accepted, torch.multinomial(row, 1)[0])


def judges_by_the_argmax(draft_tokens, _, target_logits, sampler):
    """The greedy rule on sampled drafts."""
    agrees = draft_tokens == target_logits[:-1].argmax(-1)
    accepted = agrees.long().cumprod(0).sum()
    row = sampler.probabilities(target_logits)[int(accepted)]
    return Verdict(accepted, torch.multinomial(row, 1)[0])


@pytest.mark.parametrize("rule", [accepts_everything, resamples_from_the_target, judges_by_the_argmax])
def test_a_wrong_accept_rule_is_caught(rule, monkeypatch):
    """The tests above could not fail if their statistics were too weak; with each classic mistake they do."""
    monkeypatch.setattr(self_speculation_generator, "verify_draft", rule)
    assert p_value(observed(config(), []), expected(config(), [])) < 1e-4
