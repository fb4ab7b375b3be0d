"""Chunked prefill: a long prompt shares its steps with sequences that decode, and changes no output."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import generate, tiny_llama

from self_speculation import GenerationConfig, Request, make_strategy
from self_speculation.scheduler import Scheduler

LONG = [3 + i * 7 % 40 for i in range(45)]
PROMPTS = [[5, 9, 4, 7, 7, 3], LONG, [8, 2], [*LONG[:30], 11, 12], [6] * 9]
DRAFTS = [
    {"strategy": "autoregressive"},
    {"strategy": "autoregressive", "exit_layer": 2},
    {"exit_layer": 2, "num_speculations": 3},
    {"exit_layer": 2, "num_speculations": 3, "prompt_lookup": 2},
    {"strategy": "adaptive"},
]


def chunked(model, prompts, batch_size, budget, strategy="self_speculative", seen=None, **config):
    """Results by prompt; all prompts are there from the start."""
    strategy, config = (
        make_strategy(strategy),
        GenerationConfig(**{"sample": False, "max_steps": 12, **config}),
    )
    scheduler = Scheduler(strategy, model, config, batch_size, budget)
    waiting, results = list(enumerate(prompts)), {}
    while len(results) < len(prompts):
        while waiting and scheduler.has_room:
            key, prompt = waiting.pop(0)
            scheduler.add_request(key, Request(prompt, seed=key))
        scheduler.step()
        if seen is not None:
            seen.append([len(sequence.tokens) for sequence in scheduler.batch.sequences])
        results |= dict(scheduler.pop_finished())
    return results


@pytest.mark.parametrize("budget", [1, 7, 16])
@pytest.mark.parametrize("batch_size", [1, 3, 4])
@pytest.mark.parametrize("drafts", DRAFTS)
def test_every_output_is_the_one_alone(drafts, batch_size, budget):
    """Guards against a chunk at a wrong position, a slot that a row overwrites, and a row that ends then."""
    model = tiny_llama(agreement="sometimes", exit_layer=2)
    found = chunked(model, PROMPTS, batch_size, budget, **drafts)
    for key, prompt in enumerate(PROMPTS):
        alone = generate(model, prompt, max_steps=12, eos=[], **drafts)
        assert found[key].predicted_tokens == alone.predicted_tokens


@pytest.mark.parametrize("sample", [False, True])
def test_cached_prefixes(sample):
    """Guards against a prefix that is looked for in the slot that a chunk is written to."""
    model = tiny_llama()
    shared = {"exit_layer": 2, "num_speculations": 2, "sample": sample}
    prompts = [*PROMPTS, *PROMPTS, [*LONG, 1, 2]]
    without = chunked(model, prompts, 3, 8, **shared)
    found = chunked(model, prompts, 3, 8, reuse_cache=True, **shared)
    assert [found[key].predicted_tokens for key in found] == [without[key].predicted_tokens for key in found]
    assert sum(result.num_cached_tokens for result in found.values()) >= 30


def test_nobody_waits_for_a_long_prompt():
    """Guards against streams that stand still while a prompt is read."""
    model, config = tiny_llama(), GenerationConfig(sample=False, max_steps=40)
    scheduler = Scheduler(make_strategy("autoregressive"), model, config, 3, 8)
    scheduler.add_request("short", Request(PROMPTS[0]))
    scheduler.step()
    scheduler.add_request("long", Request(LONG))
    lengths = []
    while len(scheduler.batch) < 2:
        scheduler.step()
        lengths.append(len(scheduler.batch.sequences[0].tokens))
    assert lengths == list(range(2, 2 + len(lengths)))  # a token in each step
    assert len(lengths) == -(-len(LONG) // 7)  # of 8 tokens one is the short one's


def test_prompts_are_read_in_turn():
    """Guards against a short prompt that waits until a long one is read."""
    model, config = tiny_llama(), GenerationConfig(sample=False, max_steps=40)
    scheduler = Scheduler(make_strategy("autoregressive"), model, config, 4, 8)
    scheduler.add_request("running", Request(PROMPTS[0]))
    scheduler.step()
    for key, prompt in (("long", LONG), ("short", PROMPTS[2]), ("third", PROMPTS[4])):
        scheduler.add_request(key, Request(prompt))
    joined = []
    while len(scheduler.batch) < 4:
        before = len(scheduler.batch)
        scheduler.step()
        joined += [sequence.prompt for sequence in scheduler.batch.sequences[before:]]
    assert joined == [PROMPTS[2], PROMPTS[4], LONG]


@pytest.mark.parametrize("reuse_cache", [False, True])
@pytest.mark.parametrize("cancelled", range(4))
def test_a_prompt_leaves_the_queue_while_others_are_read(cancelled, reuse_cache):
    """Guards against keys that stay behind when a prompt changes its slot, and against a prefix in use."""
    model = tiny_llama()
    config = GenerationConfig(sample=False, max_steps=6, reuse_cache=reuse_cache)
    scheduler = Scheduler(make_strategy("autoregressive"), model, config, 5, 4)
    prompts = [PROMPTS[0], LONG, PROMPTS[3], [*LONG[:20], 4, 4]]
    scheduler.add_request("running", Request(PROMPTS[4], config=replace(config, max_steps=30)))
    scheduler.step()
    for key, prompt in enumerate(prompts):
        scheduler.add_request(key, Request(prompt))
    for _ in range(7):
        scheduler.step()
    scheduler.cancel({cancelled})
    results = dict(scheduler.pop_finished())
    scheduler.add_request(4, Request(LONG))
    while len(results) < 6:
        scheduler.step()
        results |= dict(scheduler.pop_finished())
    for key, prompt in enumerate([*prompts, LONG]):
        if key != cancelled:
            alone = generate(model, prompt, max_steps=6, eos=[])
            assert results[key].predicted_tokens == alone.predicted_tokens


def test_a_request_that_is_cancelled_while_its_prompt_is_read():
    """Guards against a slot that stays taken."""
    model, config = tiny_llama(), GenerationConfig(sample=False, max_steps=6)
    scheduler = Scheduler(make_strategy("autoregressive"), model, config, 2, 8)
    scheduler.add_request("short", Request(PROMPTS[0]))
    scheduler.step()
    scheduler.add_request("long", Request(LONG))
    assert not scheduler.has_room
    scheduler.step()
    scheduler.cancel({"long"})
    ((key, result),) = scheduler.pop_finished()
    assert (key, result.predicted_tokens, result.stop_reason) == ("long", [], "stopping_criteria")
    assert scheduler.has_room
    scheduler.add_request("third", Request(PROMPTS[2]))
    results = {}
    while len(results) < 2:
        scheduler.step()
        results |= dict(scheduler.pop_finished())
    for key, prompt in (("short", PROMPTS[0]), ("third", PROMPTS[2])):
        assert results[key].predicted_tokens == generate(model, prompt, max_steps=6, eos=[]).predicted_tokens


def test_an_error_in_a_chunk_is_the_requests_own():
    """Guards against a prompt without room in memory that ends all streams."""
    model = copy.deepcopy(tiny_llama())
    bad = max(LONG)
    model.model.embed_tokens.register_forward_hook(
        lambda module, inputs, output: (
            1 / 0 if (inputs[0] == bad).any() and inputs[0].shape[1] > 1 else output
        )
    )
    found = chunked(model, [PROMPTS[0], LONG, PROMPTS[2]], 2, 8, strategy="autoregressive", max_steps=6)
    assert isinstance(found[1], ZeroDivisionError)
    for key in (0, 2):
        alone = generate(model, PROMPTS[key], max_steps=6, eos=[])
        assert found[key].predicted_tokens == alone.predicted_tokens


def test_the_first_prompt_of_an_idle_scheduler_goes_through_at_once():
    """Guards against chunks where nobody waits for them."""
    model, config = tiny_llama(), GenerationConfig(sample=False, max_steps=4)
    scheduler = Scheduler(make_strategy("autoregressive"), model, config, 2, 1)
    scheduler.add_request("long", Request(LONG, config=replace(config, max_steps=2)))
    scheduler.step()
    assert len(scheduler.batch) == 1
    assert torch.is_tensor(scheduler.batch.last)
