"""Several threads decode with one model, whose weights change between generations."""

import os
import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial

import pytest
import torch
from conftest import PROMPT, WAYS, ids_of, own_llama

from self_speculation.backends.runners import fuse
from self_speculation.drafts.draft import Draft
from self_speculation.drafts.policy import AdaptivePolicy, SourceStats

NUM_THREADS = 6
PROMPTS = [PROMPT, [8, 3, 11], [6] * 9]


SECONDS = float(os.environ.get("STRESS_SECONDS", "20"))  # how long to look for faults


@torch.no_grad()
def change(model, how):
    """Change weights as callers do, while nobody decodes."""
    if how == "to":
        dtype = model.dtype
        model.to(torch.float64).to(dtype)
    elif how == "assign":
        model.load_state_dict({name: -each for name, each in model.state_dict().items()}, assign=True)
    for weight in model.model.layers[1].parameters():
        if how == "data":
            weight.data = -weight.data
        elif how == "in place":
            weight.neg_()


def run_all(*functions):
    """Run each function in a thread. Returns the results."""
    with ThreadPoolExecutor(len(functions)) as threads:
        return [future.result() for future in [threads.submit(function) for function in functions]]


def test_statistics_change_for_one_thread_at_a_time():
    """Guards against a RuntimeError or a division by zero while another answer teaches times."""
    both = threading.Barrier(2)
    met = []

    def grows(num_tokens):
        with suppress(threading.BrokenBarrierError):  # half a second after the first thread came
            met.append(both.wait(0.5))
        return float(num_tokens)

    stats = SourceStats(grows)
    one, other = AdaptivePolicy({}, stats), AdaptivePolicy({}, stats)
    draft = Draft([None], torch.empty(1, 0), [0])
    run_all(lambda: one.plan([None], [1]), lambda: other.learn(draft, [0], (0.0, 1.0)))
    assert both.broken
    assert not met


@pytest.mark.timeout(0)  # STRESS_SECONDS says how long
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_answers_are_those_of_the_current_weights(dtype, request):
    """Guards against layers over weights that no parameter has any more, what is made twice or half made, and
    statistics that change while they are read.
    """
    request.addfinalizer(partial(sys.setswitchinterval, sys.getswitchinterval()))
    sys.setswitchinterval(1e-4)  # seconds
    draws = random.Random(time.time())
    end = time.monotonic() + SECONDS / 2
    num_rounds = 0
    together = threading.Barrier(NUM_THREADS)

    def decode(which, how, fuses):
        together.wait()
        if fuses:
            fuse(model)
        assert ids_of(model, PROMPTS[which], **WAYS[how]) == expected[which], f"{how}, round {num_rounds}"

    while time.monotonic() < end:
        if num_rounds % 20 == 0:
            model = own_llama().to(dtype)
            fuse(model)
        else:
            change(model, draws.choice(("to", "assign", "data", "in place", "nothing")))
        fresh = own_llama().to(dtype)
        fresh.load_state_dict(model.state_dict())
        fuse(fresh)
        expected = [ids_of(fresh, prompt) for prompt in PROMPTS]
        drawn = [
            (draws.randrange(len(PROMPTS)), draws.choice([*WAYS]), draws.random() < 0.1)
            for _ in range(NUM_THREADS)
        ]
        run_all(*[partial(decode, *each) for each in drawn])
        num_rounds += 1
    print(f"{num_rounds} rounds of {NUM_THREADS} answers")
