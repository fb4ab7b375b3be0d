"""Prefill: pieces of prompts share steps and passes with decoding rows, and change no output."""

import functools

import pytest
import torch
from conftest import WITHOUT_OPERATORS, drained, ids_of, own_llama, scheduler_of, tiny_llama
from helpers import watch

import self_speculation.engine.scheduler
from self_speculation import Request
from self_speculation.backends.cpu_runner import InPlaceRunner
from self_speculation.backends.runner import ModelRunner

LONG = [3 + i * 7 % 40 for i in range(45)]
TEXT = [3 + i * i % 43 for i in range(200)]


def add(scheduler, prompts):
    """Request each prompt by a key. Returns a dict that gets the logits after each prompt."""
    seen = {}

    def keep(key, _, scores):
        seen.setdefault(key, scores.clone())
        return scores

    for key, prompt in prompts.items():
        scheduler.add_request(key, Request(prompt, functools.partial(keep, key)))
    return seen


@pytest.mark.parametrize(("budget", "left"), [(8, 7), (1, 1)])
def test_a_long_prompt_does_not_hold_up_others(budget, left):
    """Guards against streams that stand still while a prompt is read, against a prompt that is not read while
    other rows decode, and against chunks where no sequence decodes.
    """
    scheduler = scheduler_of(tiny_llama(), 3, budget, max_steps=60)
    scheduler.add_request("first", Request(LONG))
    while not scheduler.batch:
        scheduler.step()
    scheduler.add_request("long", Request(LONG))
    lengths = []
    while len(scheduler.batch) < 2 and scheduler.batch.sequences[0].remaining:
        scheduler.step()
        lengths.append(len(scheduler.batch.sequences[0].output_ids))
    assert lengths == list(range(3, 3 + len(lengths)))  # a token in each step
    fewest = -(-len(LONG) // left)  # the first sequence's token counts
    assert fewest <= len(lengths) <= 1.3 * fewest  # tokens far behind count as more


def test_pieces_far_behind_in_a_prompt_are_smaller_beside_an_answer(monkeypatch):
    """Guards against steps that get longer and longer while a prompt is read, since the tokens attend to all
    before them, and against a prompt that is read in smaller pieces though nobody waits.
    """
    widths = []
    forward = self_speculation.engine.scheduler.prefill

    def recorded(runner, cache, pieces, *args):
        widths.extend(map(len, pieces))
        return forward(runner, cache, pieces, *args)

    monkeypatch.setattr(self_speculation.engine.scheduler, "prefill", recorded)
    scheduler = scheduler_of(tiny_llama(max_position_embeddings=2048), 2, 17, max_steps=300)
    scheduler.add_request("long alone", Request([3] * 800))
    while not scheduler.batch:
        scheduler.step()
    assert widths == [17] * 47 + [1]
    widths.clear()
    scheduler.add_request("long", Request([4] * 800))
    while len(scheduler.batch) < 2:
        scheduler.step()
    assert scheduler.batch.sequences[0].remaining  # it decoded all the time
    assert sum(widths) == 800
    assert widths[0] == 16
    assert widths[:-1] == sorted(widths[:-1], reverse=True)
    assert widths[-2] in (3, 4)  # with 32 dimensions, 192 positions cost as much as the products


def test_a_step_costs_no_more_than_the_budget_beside_a_prompt_that_is_read_far(monkeypatch):
    """Guards against prompts in one pass that each get what they could afford alone."""
    scheduler = scheduler_of(tiny_llama(max_position_embeddings=2048), 3, 61, max_steps=300)
    add(scheduler, {"running": [5, 9, 4], "long": [3] * 800})
    deep = scheduler._waiting
    while not (len(deep) == 1 and deep[0].num_computed > 400):
        scheduler.step()
    scheduler.add_request("new", Request([3] * 20))
    costs = []
    choose = scheduler._schedule_prefill

    def recorded(left, least):
        chosen = choose(left, least)
        costs.extend(width * scheduler._cost(sequence) for sequence, width in chosen or [])
        return chosen

    monkeypatch.setattr(scheduler, "_schedule_prefill", recorded)
    scheduler.step()
    assert 50 < sum(costs) <= 60 + 3  # a token of the long one is rounded to the nearest


def test_prompts_are_read_in_turn():
    """Guards against a short prompt that waits until a long one is read, or for a separate step."""
    scheduler = scheduler_of(tiny_llama(), 4, 8, max_steps=30)
    scheduler.add_request("running", Request([5, 9, 4, 7, 7, 3]))
    scheduler.step()
    add(scheduler, {"long": LONG, "short": [8, 2], "third": [6] * 9})
    joined = []
    while len(scheduler.batch) < 4:
        before = len(scheduler.batch)
        scheduler.step()
        joined += [sequence.request_id for sequence in scheduler.batch.sequences[before:]]
    assert joined == ["short", "third", "long"]


@pytest.mark.parametrize("reuse_cache", [False, True])
def test_nan_of_a_cancelled_prompt_does_not_stay_in_its_slot(reuse_cache):
    """Guards against NaN that the next sequence in this slot reads, beyond the last token, and NaN in padding
    by a token that the row does not have.
    """
    model = own_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[[0, 49]] = torch.nan
        model.lm_head.weight[[0, 49]] = 0  # no output has them
    scheduler = scheduler_of(model, 2, 8, reuse_cache=reuse_cache)
    scheduler.add_request("long", Request(LONG))
    scheduler.step()
    scheduler.add_request("nan", Request([49] * 30))
    for _ in range(3):
        scheduler.step()
    scheduler.cancel({"nan"})
    scheduler.add_request("short", Request([8, 2]))
    results = drained(scheduler)
    together = scheduler_of(model, 2)
    padded = {"nine": LONG[:9], "twelve": LONG[:12]}
    add(together, padded)
    results |= drained(together)
    for key, prompt in {"long": LONG, "short": [8, 2], **padded}.items():
        assert results[key].predicted_tokens == ids_of(model, prompt, max_steps=12)


@pytest.mark.parametrize(
    ("most", "budget", "lengths", "passes"),
    [
        (64, None, [8] * 8, [[8] * 8]),
        (64, 64, [16] * 8, [[16] * 4]),
        (64, None, [16] * 8, [[16] * 4] * 2),
        (64, None, [3, 16, 4, 14, 20, 3], [[3, 16, 4, 14, 20, 3]]),
        (
            64,
            None,
            [20, 90, 19, 80],
            [[20, 19], [90], [16]],
        ),  # 64 of the last one are those of the one before
        (1024, None, [128] * 8, [[128] * 8]),
        (1024, None, [101, 128, 110, 90, 115, 100, 121, 107], [[101, 128, 110, 90, 115, 100, 121, 107]]),
        (1024, 300, [101, 128, 110, 90], [[101, 128], [71]]),
        (1024, None, [101, 20, 128], [[101, 128], [20]]),
    ],
)
def test_a_pass_reads_many_prompts(most, budget, lengths, passes, monkeypatch):
    """Guards against weights that are read eight times for eight prompts, and padding that takes more time
    than it saves.
    """
    if most == 64 and WITHOUT_OPERATORS:
        pytest.skip("passes of operators")
    scheduler = scheduler_of(tiny_llama(fused=most == 64), 8, budget, max_steps=3)
    scheduler._max_pass_tokens = most
    ran = watch(monkeypatch, InPlaceRunner if most == 64 else ModelRunner, "run_layers")
    starts = [1 if length == 80 else number for number, length in enumerate(lengths)]
    pairs = zip(starts, lengths, strict=True)
    add(scheduler, {number: TEXT[at : at + length] for number, (at, length) in enumerate(pairs)})
    scheduler.step()
    assert [[*widths] for (_, cache, _, widths, *_), _ in ran if cache.is_prompt] == passes


def test_an_error_in_a_pass_is_that_of_one_prompt(monkeypatch):
    """Guards against an error that ends all prompts of a pass."""
    forward = self_speculation.engine.scheduler.prefill

    def out_of_memory(runner, cache, pieces, *args):
        if any(49 in piece for piece in pieces):
            raise MemoryError
        return forward(runner, cache, pieces, *args)

    monkeypatch.setattr("self_speculation.engine.scheduler.prefill", out_of_memory)
    scheduler = scheduler_of(tiny_llama(), 3)
    prompts = {0: [5, 9, 4], 1: [5, 49, 4], 2: [7, 7]}
    add(scheduler, prompts)
    results = drained(scheduler)
    assert isinstance(results.pop(1), MemoryError)
    for key, result in results.items():
        assert result.predicted_tokens == ids_of(tiny_llama(), prompts[key], max_steps=12)
