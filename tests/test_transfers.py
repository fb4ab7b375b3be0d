"""Reads from the device: each waits for all queued work of a GPU, so tests count them."""

import random
from unittest.mock import Mock

import pytest
import torch
from conftest import drawn_plan, generate, planned, tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode

from self_speculation.drafts.adaptive import AdaptivePolicy

PROMPT = [5, 9, 4, 7, 7, 3, 9, 4]


# In inference mode the first two are not dispatched as the third.
READING = (torch.ops.aten.item, torch.ops.aten.is_nonzero, torch.ops.aten._local_scalar_dense)


class Reads(TorchDispatchMode):
    """Counts numbers that are taken out of tensors."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function.overloadpacket in READING
        return function(*args, **(kwargs or {}))


@pytest.fixture
def reads(monkeypatch):
    """Counts reads inside `with reads`. On a CPU these three methods do not go through the dispatcher."""
    counting = Reads()
    for name in ("tolist", "numpy", "cpu"):
        original = getattr(torch.Tensor, name)

        def count(tensor, *args, original=original, **kwargs):
            counting.number += 1
            return original(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, count)
    # Copies are checked once, when an answer begins. Layers are traced only on a CPU.
    monkeypatch.setattr("self_speculation.model.linear.contents", lambda groups: [()] * len(groups))
    monkeypatch.setattr("self_speculation.model.traced_runner._can_be_traced", lambda *_: False)
    return counting


@pytest.mark.parametrize(
    ("config", "reads_drafts"),
    [
        ({}, False),
        ({"sample": True}, False),
        ({"draft_weights": "int4"}, False),
        ({"draft_vocabulary": 9}, False),
        ({"prompt_lookup": 3}, False),
        ({"draft_confidence": 0.1}, True),
        ({"streamer": Mock()}, True),  # which shows drafts
        ({"streamer": Mock(), "draft_confidence": 0.3}, True),
    ],
)
def test_one_read_a_round_and_at_most_one_for_a_drafted_token(config, reads_drafts, reads):
    """Guards against a second read of a verification, a probability or a token."""
    drafts = {"exit_layer": 2, "num_speculations": 3, "max_steps": 30, "eos": []}
    with reads:
        result = generate(tiny_llama(fused=True), PROMPT, **drafts, **config)
    assert reads.number == 1 + result.num_verifications + reads_drafts * result.num_drafted


def test_autoregressive_decoding_reads_once_per_token(reads):
    """Guards against a second read of a token."""
    with reads:
        generate(tiny_llama(), PROMPT, max_steps=30, eos=[])
    assert reads.number == 30


@pytest.mark.parametrize("config", [{}, {"draft_vocabulary": 9}], ids=str)
def test_adaptive_rounds_read_no_more(config, reads, monkeypatch):
    """Guards against reads for plans or n-grams. A draft of layers takes one for each token, to decide
    whether it goes on. Random plans give every kind of round.
    """
    draws = random.Random(0)

    def plan(matched, rooms):
        return drawn_plan(matched, rooms, draws.choice, draws.randint)

    model = tiny_llama(num_layers=8)
    monkeypatch.setattr(AdaptivePolicy, "plan", planned(plan))
    with reads:
        result = generate(model, PROMPT, "adaptive", max_steps=60, eos=[], **config)
    assert set(result.drafts_by_source) == {"none", "exit 1", "exit 2", "exit 3", "n-grams"}
    of_layers = sum(
        counts.drafted for name, counts in result.drafts_by_source.items() if name.startswith("exit")
    )
    # The verdict on exits is queued before the prompt's first token, so no read waits for it.
    assert reads.number == 2 + result.num_verifications + of_layers
