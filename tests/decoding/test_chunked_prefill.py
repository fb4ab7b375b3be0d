"""Chunked prefill: a long prompt shares its steps with sequences that decode, and changes no output."""

from types import SimpleNamespace

import pytest
import torch
from conftest import drained, ids_of, own_llama, scheduler_of, tiny_llama
from helpers import watch

from self_speculation import Request

LONG = [3 + i * 7 % 40 for i in range(45)]
PROMPTS = [[5, 9, 4, 7, 7, 3], LONG, [8, 2], [*LONG[:30], 11, 12], [6] * 9]


def add(scheduler, prompts):
    """Request each prompt by its key."""
    for key, prompt in prompts.items():
        scheduler.add_request(key, Request(prompt, seed=0))


def assert_as_alone(model, results, prompts, **config):
    """The prompts by key have the outputs that they have alone."""
    for key, prompt in prompts.items():
        assert results[key].predicted_tokens == ids_of(model, prompt, **{"max_steps": 12, **config})


@pytest.mark.parametrize(("budget", "left"), [(8, 7), (1, 1)])
def test_a_long_prompt_does_not_hold_up_others(budget, left):
    """Guards against streams that stand still while a prompt is read, against a prompt that is not read while
    others decode, and against chunks where no sequence decodes.
    """
    scheduler = scheduler_of(tiny_llama(), 3, budget, max_steps=60)
    scheduler.add_request("first", Request(LONG))
    scheduler.step()
    assert len(scheduler.batch) == 1
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
    scheduler.add_request("running", Request(PROMPTS[0]))
    scheduler.step()
    add(scheduler, {"long": LONG, "short": PROMPTS[2], "third": PROMPTS[4]})
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


def test_a_short_prompt_does_not_wait_for_whole_chunks(monkeypatch):
    """Guards against whole chunks for a long prompt that came to an idle scheduler: in the step in which a
    short one joins, and while it waits, also behind several long ones.
    """
    monkeypatch.setattr("self_speculation.passes.model_runner.PREFILL_CHUNK", 32)
    scheduler = scheduler_of(tiny_llama(), 5, 8)
    calls = watch(monkeypatch, scheduler, "_prefill_chunk")

    def step():
        """The tokens that it prefills of each prompt."""
        calls.clear()
        scheduler.step()
        return {sequence.key: number for (sequence, _), number in calls}

    add(scheduler, {"long": [*LONG, *LONG]})
    assert step() == {"long": 32}
    add(scheduler, {"short": [8, 2, 5]})
    steps = [step(), step()]
    assert len(scheduler.batch) == 1
    add(scheduler, {"longer": [*LONG, *LONG], "third": [*LONG, *LONG]})
    steps += [step(), step()]
    add(scheduler, {"last": [8, 2]})
    steps += [step(), step()]
    assert len(scheduler.batch) == 2
    while scheduler._waiting:
        steps.append(step())
    assert max(sum(numbers.values()) for numbers in steps) <= 8


def test_a_first_token_ends_whole_chunks(monkeypatch):
    """Guards against a whole chunk of a prompt that the reader of the first token adds, before the second."""
    scheduler = scheduler_of(tiny_llama(), 2, 8)
    scheduler._ensure_prepared().runner.prefill_chunk = 32
    calls = watch(monkeypatch, scheduler, "_prefill_chunk")
    answered = SimpleNamespace(put=lambda _: scheduler.add_request("next", Request(LONG)), end=list)
    scheduler.add_request("first", Request([8, 2, 5], streamer=answered))
    scheduler.step()
    assert [number for _, number in calls] == [3, 7]  # one of the 8 tokens is the first sequence's


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
    assert_as_alone(model, drained(scheduler), {"long": LONG, "short": [8, 2]})
