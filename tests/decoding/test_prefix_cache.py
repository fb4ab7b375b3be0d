"""The prefix cache: answers are those of prefilling every prompt as a whole."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from conftest import LAYERS, answer_of, card_llama, drained, generate, own_llama, scheduler_of, tiny_llama
from test_batch import ends_at, nan_from, raises_from

from self_speculation import Request, make_strategy
from self_speculation.passes.runners import capture_decoding, fuse

STORY = [5, 9, 4, 7, 3, 3, 8, 21, 22, 30, 6, 11]


def fresh(model, prompt, **config):
    """The result without a cache of earlier requests."""
    return generate(model, prompt, **{"max_steps": 12, **config})


def test_the_slot_with_the_longest_prefix_is_taken():
    """Guards against a cache that is not used, and against a prefix that is overwritten although another slot
    is free.
    """
    scheduler = scheduler_of(tiny_llama(), 3, max_steps=3, reuse_cache=True)

    def cached(*prompts):
        for key, prompt in enumerate(prompts):
            scheduler.add_request(key, Request(prompt))
        results = drained(scheduler)
        return [results[key].num_cached_tokens for key in range(len(prompts))]

    other = STORY[::-1]
    third = [40] * 6
    assert cached(STORY, other, third) == [0, 0, 0]
    assert [cached([*prompt, 9]) for prompt in (STORY, third, other)] == [[12], [6], [12]]
    assert cached([*other, 9]) == [12]  # the last token's logits are needed
    assert cached([41, 42]) == [0]  # takes the least recently used slot: the story's
    assert [cached([*prompt, 9]) for prompt in (third, other, STORY)] == [[6], [12], [0]]


def test_a_cancelled_prompt_leaves_what_is_read_of_it():
    """Guards against a prompt that is read again after a client has left and come back."""
    model = tiny_llama()
    scheduler = scheduler_of(model, 2, 4, max_steps=5, reuse_cache=True)
    scheduler.add_request("left", Request(STORY))
    for _ in range(2):
        scheduler.step()
    scheduler.cancel({"left"})
    assert drained(scheduler)["left"].stop_reason == "cancelled"
    scheduler.add_request("back", Request([*STORY, 9]))
    result = drained(scheduler)["back"]
    assert result.num_cached_tokens == 8
    assert result.predicted_tokens == fresh(model, [*STORY, 9], eos=(), max_steps=5).predicted_tokens


@pytest.mark.parametrize("first", [STORY, [40, 41]])
def test_a_kept_prefix_survives_a_shorter_prompt(first):
    """Guards against a swap of slots that cuts the longer one, whichever comes first."""
    model = tiny_llama()
    short = [40, 41]
    scheduler = scheduler_of(model, 2, max_steps=3, reuse_cache=True)
    second = short if first is STORY else STORY
    for prompts in ([first, second], [[*short, 9]], [[*STORY, 9]]):
        for prompt in prompts:
            scheduler.add_request(len(prompt), Request(prompt))
        results = drained(scheduler)
    (result,) = results.values()
    assert result.num_cached_tokens >= len(STORY)
    assert result.predicted_tokens == fresh(model, [*STORY, 9], eos=(), max_steps=3).predicted_tokens


def test_weights_of_inference_mode():
    """Guards against a prefix that is kept although torch does not count writes to the weights."""
    with torch.inference_mode():
        model = own_llama()
        fuse(model)
        strategy = make_strategy("autoregressive")
        answer_of(strategy, model, STORY, reuse_cache=True)
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
        after = answer_of(strategy, model, [*STORY, 1], reuse_cache=True)
    assert after.num_cached_tokens == 0
    assert after.predicted_tokens == fresh(model, [*STORY, 1]).predicted_tokens


@pytest.mark.parametrize("other", [{"exit_layer": 2}, {"batch_size": 2}, {"cache_dtype": "float16"}])
def test_the_cache_is_for_one_exit_layer_batch_size_and_dtype(other):
    """Guards against layers that an early exit did not run, a cache with too few slots, and keys that are
    rounded although an answer in float32 is asked for.
    """
    model = tiny_llama()
    strategy = make_strategy("autoregressive")
    answer_of(strategy, model, STORY, reuse_cache=True, **other)
    after = answer_of(strategy, model, STORY, reuse_cache=True)
    assert after.num_cached_tokens == 0
    assert after.predicted_tokens == fresh(model, STORY).predicted_tokens


@pytest.mark.parametrize(
    ("breaks", "length"),
    [(nan_from, None), (raises_from, None), (nan_from, 3)],
    ids=["NaN", "error", "ended"],
)
def test_a_failed_request_leaves_no_prefix(breaks, length):
    """Guards against keys of a failed round in a cached prefix, and against NaN there, also of a request that
    ended before it.
    """
    drafts = {**LAYERS, "reuse_cache": True}
    model = tiny_llama(agreement="always")
    strategy = make_strategy("self_speculative")
    answer_of(strategy, model, [*STORY, 9], **drafts)
    request = Request(STORY, breaks(len(STORY) + 3), stop_checks=ends_at(length))
    with nullcontext() if length else pytest.raises((KeyError, FloatingPointError)):
        answer_of(strategy, model, request, **drafts)
    after = answer_of(strategy, model, STORY, **drafts)
    assert (after.num_cached_tokens, after.predicted_tokens) == (0, fresh(model, STORY).predicted_tokens)


def test_two_threads_do_not_share_a_cache():
    """Guards against two requests at once in the kept cache of one strategy."""
    model = tiny_llama()
    strategy = make_strategy("autoregressive")
    answer_of(strategy, model, STORY, reuse_cache=True)
    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(lambda _: answer_of(strategy, model, STORY, reuse_cache=True), range(6)))
    expected = fresh(model, STORY).predicted_tokens
    assert [result.predicted_tokens for result in found] == [expected] * 6


@pytest.mark.usefixtures("graphs")
def test_a_captured_cache_that_another_generation_has_is_not_reused():
    """Guards against an error, or the keys of the failed pass, in the next answer. test_captured_runner.py
    has padding rows.
    """
    model = card_llama()
    strategy = make_strategy("autoregressive")
    capture_decoding(model)
    first = answer_of(strategy, model, STORY, reuse_cache=True)
    fresh(model, STORY[::-1])
    after = answer_of(strategy, model, STORY, reuse_cache=True)
    assert (after.num_cached_tokens, after.predicted_tokens) == (0, first.predicted_tokens)
