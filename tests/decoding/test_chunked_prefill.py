"""Chunked prefill: a long prompt shares its steps with sequences that decode, and changes no output."""

import pytest
import torch
from conftest import drained, ids_of, own_llama, scheduler_of, tiny_llama

from self_speculation import Request

LONG = [3 + i * 7 % 40 for i in range(45)]


def add(scheduler, prompts):
    """Request each prompt by its key."""
    for key, prompt in prompts.items():
        scheduler.add_request(key, Request(prompt, seed=0))


@pytest.mark.parametrize(("budget", "left"), [(8, 7), (1, 1)])
def test_a_long_prompt_does_not_hold_up_others(budget, left):
    """Guards against streams that stand still while a prompt is read, against a prompt that is not read while
    others decode, and against chunks where no sequence decodes.
    """
    scheduler = scheduler_of(tiny_llama(), 3, budget, max_steps=60)
    scheduler.add_request("first", Request(LONG))
    while not scheduler.batch:
        scheduler.step()
    scheduler.add_request("long", Request(LONG))
    lengths = []
    while len(scheduler.batch) < 2 and scheduler.batch.sequences[0].remaining:
        scheduler.step()
        lengths.append(len(scheduler.batch.sequences[0].tokens))
    assert lengths == list(range(2, 2 + len(lengths)))  # a token in each step
    assert len(lengths) == -(-len(LONG) // left)  # the first sequence's token counts


def test_prompts_are_read_in_turn():
    """Guards against a short prompt that waits until a long one is read, or for a step of its own."""
    scheduler = scheduler_of(tiny_llama(), 4, 8)
    scheduler.add_request("running", Request([5, 9, 4, 7, 7, 3]))
    scheduler.step()
    add(scheduler, {"long": LONG, "short": [8, 2], "third": [6] * 9})
    joined = []
    while len(scheduler.batch) < 4:
        before = len(scheduler.batch)
        scheduler.step()
        joined += [sequence.key for sequence in scheduler.batch.sequences[before:]]
    assert joined == ["short", "third", "long"]
    scheduler = scheduler_of(tiny_llama(), 4, 16)
    add(scheduler, dict(enumerate([[8, 2], [5, 9, 4], [6] * 9, [7]])))
    scheduler.step()
    assert len(scheduler.batch) == 4


def test_nan_of_a_cancelled_prompt_does_not_stay_in_its_slot():
    """Guards against NaN that the next sequence in this slot reads, beyond its last token."""
    model = own_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[49] = torch.nan
    scheduler = scheduler_of(model, 2, 8)
    scheduler.add_request("long", Request(LONG))
    scheduler.step()
    scheduler.add_request("nan", Request([49] * 30))
    for _ in range(3):
        scheduler.step()
    scheduler.cancel({"nan"})
    scheduler.add_request("short", Request([8, 2]))
    results = drained(scheduler)
    for key, prompt in {"long": LONG, "short": [8, 2]}.items():
        assert results[key].predicted_tokens == ids_of(model, prompt, max_steps=12)
