"""Prompts on a CPU: no way to read one changes a bit of any answer."""

import functools
import os
import random
import subprocess
import sys

import pytest
import torch
from conftest import (
    ADAPTIVE,
    COPY,
    LAYERS,
    ROOT,
    config_of,
    drained,
    needs_operators,
    own_llama,
    scheduler_of,
)

from self_speculation import Request, make_strategy
from self_speculation.passes.model_runner import forward
from self_speculation.passes.runners import fuse, make_runner
from self_speculation.weights import kernels

pytestmark = needs_operators
rounds_prompts = kernels.cpu_operators().variant == "AVX512_BF16" or "-DPAIRS" in kernels._OPTIONS


@functools.cache
def model_of(dtype):
    model = own_llama(max_position_embeddings=1024, attention_bias=True).to(dtype)
    fuse(model)
    return model


def logits_after(model, ids, size, is_prompt=True):
    """[V] after a prompt in pieces of this size."""
    runner = make_runner(model)
    cache = runner.new_cache(len(ids), len(ids))
    cache.is_prompt = is_prompt
    with torch.inference_mode():
        pieces = torch.tensor([ids]).split(size, 1)
        return [forward(runner, cache, piece).logits[0, -1] for piece in pieces][-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tokens_of_a_prompt_are_one_kind(dtype):
    """Guards against a prompt in bfloat16 whose weights have more bits, against output that is rounded, and
    against chunks that differ. test_in_place.py has all ways to read one.
    """
    model, ids = model_of(dtype), random.Random(0).choices(range(3, 40), k=700)
    expected, as_output = (logits_after(model, ids, 700, is_prompt) for is_prompt in (True, False))
    assert torch.equal(logits_after(model, ids, 100), expected)
    assert torch.equal(as_output, expected) != (rounds_prompts and dtype == torch.bfloat16)
    assert (as_output - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("way", [{}, LAYERS, COPY, ADAPTIVE, {"sample": True}], ids=str)
@pytest.mark.parametrize("budget", [None, 1, 23, 64])
def test_answers_of_a_scheduler_are_those_alone(way, budget):
    """Guards against a chunk, a neighbour or a kept prefix that changes an answer."""
    model, draw = model_of(torch.bfloat16), random.Random(budget or 0)
    start = draw.choices(range(3, 40), k=150)
    prompts = [
        start[: draw.choice((0, 10, 70, 130))]
        + draw.choices(range(3, 40), k=draw.choice((1, 5, 33, 90, 200)))
        for _ in range(8)
    ]
    scheduler = scheduler_of(model, 3, budget, **way, reuse_cache=not rounds_prompts)
    results, waiting = {}, [*enumerate(prompts)]
    while waiting or scheduler.has_requests:
        for key, prompt in waiting[: scheduler.num_free_slots]:
            scheduler.add_request(key, Request(prompt, seed=key))
            waiting.remove((key, prompt))
        scheduler.step()
        results |= scheduler.pop_finished()
    for key, prompt in enumerate(prompts):
        alone = scheduler_of(model, 1, **way)
        alone.add_request(0, Request(prompt, seed=key))
        assert results[key].predicted_tokens == drained(alone)[0].predicted_tokens


def test_a_kept_prompt_is_one_that_is_read_anew():
    """Guards against keys of a kept prompt that differ in a bit."""
    model, strategy = model_of(torch.bfloat16), make_strategy("autoregressive")
    ids = random.Random(1).choices(range(3, 40), k=300)
    seen = {}
    for cached, prompt in ((0, ids), (250, [*ids[:250], 41, 42])):
        keep = functools.partial(seen.setdefault, cached)
        config = config_of(max_steps=1, reuse_cache=True)
        processors = [lambda _, scores, keep=keep: keep(scores.clone())]
        result = strategy.generate_token_ids(model, prompt, [], config, logits_processors=processors)
        assert result.num_cached_tokens == cached
    assert torch.equal(seen[250][0], logits_after(model, [*ids[:250], 41, 42], 252))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(rounds_prompts, reason="the operators round prompts already")
def test_prompts_in_bfloat16():
    """Guards against prompts in bfloat16, which few processors multiply, that depend on how they are read."""
    code = (
        "import sys, pytest; from self_speculation.weights import kernels; kernels._OPTIONS += ('-DPAIRS',);"
        f"sys.exit(pytest.main(['-n0', '-p', 'no:cacheprovider', {__file__!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
