"""Reads from the device: each waits for all that a GPU was given to do, so they are few and counted."""

import random

import pytest
import torch
from conftest import drawn_plan, generate, planned, tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode

from self_speculation.decoding.batch import Batch
from self_speculation.drafts.policy import AdaptivePolicy

PROMPT = [5, 9, 4, 7, 7, 3, 9, 4]


# In inference mode the first two come as they are, and not as the third.
READING = (torch.ops.aten.item, torch.ops.aten.is_nonzero, torch.ops.aten._local_scalar_dense)


class Reads(TorchDispatchMode):
    """Counts what waits for a GPU: numbers taken out of tensors, and copies to the host."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function.overloadpacket in READING
        return function(*args, **(kwargs or {}))


@pytest.fixture
def reads(monkeypatch):
    """Counts while an answer is made. On a CPU the last three do not go through the dispatcher."""
    counting = Reads()
    for name in ("tolist", "numpy", "cpu"):
        original = getattr(torch.Tensor, name)

        def count(tensor, *args, original=original, **kwargs):
            counting.number += 1
            return original(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, count)
    # Copies are made and looked at once, when an answer begins. Only on a CPU are layers traced.
    monkeypatch.setattr("self_speculation.model.linear.contents", lambda groups: [()] * len(groups))
    monkeypatch.setattr("self_speculation.model.traced_runner._can_be_traced", lambda *_: False)
    return counting


class Terminal:
    """A streamer that is shown drafts, and reads nothing."""

    def put(self, ids, is_draft=False):
        pass

    def delete(self, num_tokens, is_draft=False):
        pass

    def end(self):
        pass


WAYS = {
    "layers": ({}, lambda result: 0),
    "sampled": ({"sample": True}, lambda result: 0),
    "int4": ({"draft_weights": "int4"}, lambda result: 0),
    "short vocabulary": ({"draft_vocabulary": 9}, lambda result: 0),
    "lookups": ({"prompt_lookup": 3}, lambda result: 0),
    "fixed confidence": ({"draft_confidence": "0.1"}, lambda result: result.num_drafted),
    "learnt confidence": ({"draft_confidence": "auto"}, lambda result: result.num_drafted),
    "learnt confidence, shown": (
        {"draft_confidence": "auto", "streamer": Terminal()},
        lambda result: result.num_drafted,
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_one_read_a_round_and_at_most_one_for_a_drafted_token(way, reads):
    """Guards against a second look at a verdict, a probability or a token."""
    config, drafting = WAYS[way]
    with reads:
        result = generate(
            tiny_llama(fused=True), PROMPT, exit_layer=2, num_speculations=3, max_steps=30, eos=[], **config
        )
    assert reads.number == 1 + result.num_verifications + drafting(result)


def test_autoregressive_decoding_reads_a_token_at_a_time(reads):
    with reads:
        generate(tiny_llama(), PROMPT, max_steps=30, eos=[])
    assert reads.number == 30


@pytest.mark.parametrize("config", [{}, {"draft_vocabulary": 9}], ids=str)
def test_adaptive_rounds_read_no_more(config, reads, monkeypatch):
    """Guards against plans that take a read, and lookups that do. Whether a draft of layers goes on takes one
    for each of its tokens. Plans are given, so that every kind of round comes.
    """
    draws = random.Random(0)

    def plan(matched, rooms):
        return drawn_plan(matched, rooms, draws.choice, draws.randint)

    model = tiny_llama(num_layers=8)
    monkeypatch.setattr(AdaptivePolicy, "plan", planned(plan))
    with reads:
        result = generate(model, PROMPT, "adaptive", max_steps=60, eos=[], **config)
    assert set(result.drafts_by_source) == {"none", "exit 1", "exit 2", "exit 3", "lookup", "prediction"}
    of_layers = sum(
        counts.drafted for name, counts in result.drafts_by_source.items() if name.startswith("exit")
    )
    assert reads.number == 1 + result.num_verifications + of_layers


def test_what_is_shown_is_read_once(reads):
    """A drafted token is shown as it comes, which takes a read, and none where it is not shown."""
    model, shared = tiny_llama(), {"exit_layer": 2, "num_speculations": 3, "max_steps": 30, "eos": []}
    with reads:
        result = generate(model, PROMPT, streamer=Terminal(), **shared)
    assert reads.number == 1 + result.num_verifications + result.num_drafted


@pytest.mark.parametrize("fault", ["token", "confidence"])
def test_the_count_sees_a_read_too_many(fault, reads, monkeypatch):
    """The counts above mean something: an extra read in the middle is found."""
    propose = Batch.propose

    def twice(self, tokens, *rest):
        int(tokens) if fault == "token" else tokens.cpu()
        return propose(self, tokens, *rest)

    monkeypatch.setattr(Batch, "propose", twice)
    with reads:
        result = generate(tiny_llama(), PROMPT, exit_layer=2, num_speculations=3, max_steps=30, eos=[])
    assert reads.number == 1 + result.num_verifications + result.num_drafted
