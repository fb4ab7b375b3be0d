"""The distribution of the first three tokens by the full model, compared with samples of a strategy.

The model is so small (5 tokens, 2 layers) that every sequence occurs often.
"""

from __future__ import annotations

import itertools
from collections import Counter

import torch
from conftest import tiny_llama
from scipy.stats import chisquare

from self_speculation import GenerationConfig, Request, Sampler, Verification, make_strategy
from self_speculation.decoding.sampling import verify_draft

PROMPT, VOCAB, STEPS = [3, 1, 4], 5, 3


def model(fused=False):
    """The hidden size is 32 because kernels in four bits need it."""
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
    result = {(): 1.0}
    for _ in range(STEPS):
        shorter, result = result, {}
        for tokens, probability in shorter.items():
            history = torch.tensor([[*PROMPT, *tokens]])
            logits = model()(history).logits[:, -1].float()
            for processor in processors:
                logits = processor(history, logits)
            following = sampler.probabilities(logits)[0].tolist()
            result |= {(*tokens, token): probability * p for token, p in enumerate(following)}
    return result


def observed(config, processors, samples, batch_size):
    """How often each sequence is sampled, with fixed seeds. In a batch, some rows may have room for one token
    and others for three.
    """
    strategy = make_strategy(config.generation_strategy)
    ends = [STEPS, STEPS + 2, STEPS + 1] if batch_size > 1 else [STEPS + 2]
    requests = [
        Request(PROMPT, processors, seed=seed, stop_checks=lambda tokens, end=end: len(tokens) >= end)
        for seed, end in zip(range(samples), itertools.cycle(ends), strict=False)
    ]
    results = strategy.generate_batch(model(fused=True), requests, config, batch_size)
    return Counter(tuple(result.predicted_tokens[:STEPS]) for _, result in results)


def p_value(counts, probabilities):
    """Chi-square over the sequences expected at least five times, the rest in one bin."""
    samples = sum(counts.values())
    assert all(probabilities[key] > 0 for key in counts), "the model never generates this sequence"
    common = [key for key, p in probabilities.items() if p * samples >= 5]
    seen = [counts.get(key, 0) for key in common]
    wanted = [probabilities[key] * samples for key in common]
    seen, wanted = [*seen, samples - sum(seen)], [*wanted, samples - sum(wanted)]
    if wanted[-1] < 1e-3:  # no rest: rounding only
        seen, wanted = seen[:-1], [w * samples / sum(wanted[:-1]) for w in wanted[:-1]]
    return chisquare(seen, wanted).pvalue


def accepts_everything(draft_tokens, *rest):
    honest = verify_draft(draft_tokens, *rest)
    return Verification(torch.full_like(honest.num_accepted, draft_tokens.shape[1]), honest.next_token)


def resamples_from_the_target(draft_tokens, draft_probabilities, target_logits, sampler, *rest):
    """After a rejection, samples from p instead of max(0, p - q)."""
    honest = verify_draft(draft_tokens, draft_probabilities, target_logits, sampler, *rest)
    rows = sampler.probabilities(target_logits).take_along_dim(honest.num_accepted[:, None, None], 1)[:, 0]
    return Verification(honest.num_accepted, torch.multinomial(rows, 1)[:, 0])
