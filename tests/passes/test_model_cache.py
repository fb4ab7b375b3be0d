"""What is made from a model and kept with it. test_runners.py has changes of weights, which end it."""

import copy
import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

from self_speculation.model_cache import cached, evict, lock, peek, release, singleton, weights_key
from self_speculation.weights.few_bits import FewBitsLinear


def test_weights_in_few_bits_have_a_key():
    """Guards against copies and kept prefixes of earlier weights: those in few bits are no parameters."""
    model = nn.Sequential(*(FewBitsLinear(torch.zeros(34, dtype=torch.uint8), 1, 32) for _ in range(2)))
    keys = [weights_key(model)]
    model[0], model[1] = model[1], model[0]
    keys.append(weights_key(model))
    model[0].weight.fill_(1)
    assert len({*keys, weights_key(model)}) == 3


@pytest.mark.usefixtures("one_rank")
def test_weights_without_versions_or_memory_have_a_key(model):
    """Guards against errors with a model that was made in inference mode, is offloaded or in shards."""
    with torch.inference_mode():
        made = copy.deepcopy(model)
    assert weights_key(made) == weights_key(made)
    head, mesh = model.lm_head, init_device_mesh("cpu", (1,))
    head.weight = nn.Parameter(DTensor.from_local(head.weight.data, mesh, [Replicate()]))
    assert weights_key(model) == weights_key(model)
    assert weights_key(model.to("meta")) == weights_key(model)


class Part:
    """Something that is made."""


def test_it_is_kept_while_it_is_valid():
    """Guards against a part that is made again, one of before a change, and one of another model."""
    model, other = nn.Linear(1, 1), nn.Linear(1, 1)

    def current():
        return cached(model, "key", lambda _: tuple(model.weight.shape), Part)

    part = current()
    assert current() is peek(model, "key") is part
    assert cached(model, "another key", None, Part) is not part
    assert cached(other, "key", None, Part) is not part
    model.weight = nn.Parameter(model.weight[None])
    assert peek(model, "key") is part
    changed = current()
    assert current() is changed is not part
    evict(model, "key")
    assert peek(model, "key") is None
    assert current() is not changed


def test_making_may_change_the_model():
    """Guards against a part that is made twice, since making it has moved weights."""
    model = nn.Linear(1, 1)

    def make():
        model.weight = nn.Parameter(model.weight[None])
        return Part()

    parts = {cached(model, "key", lambda _: tuple(model.weight.shape), make) for _ in range(2)}
    assert len(parts) == 1


def test_it_is_freed_before_the_next_one_is_made_and_with_its_model():
    """Guards against twice the memory, and against memory of a model that is gone."""
    model = nn.Linear(1, 1)
    part = weakref.ref(cached(model, "key", lambda _: 1, Part))

    def make():
        assert part() is None
        return Part()

    part = weakref.ref(cached(model, "key", lambda _: 2, make))
    assert part() is not None
    del model
    gc.collect()
    assert part() is None


def test_what_is_released():
    """Guards against memory that stays, and against settings that go."""
    model = nn.Linear(1, 1)
    part, setting = weakref.ref(cached(model, "key", lambda _: 1, Part)), singleton(model, Part)
    release(model)
    assert part() is None
    assert singleton(model, Part) is setting


def test_threads_make_it_once():
    """Guards against two parts of one model of which one is lost."""
    model, both_ask = nn.Linear(1, 1), threading.Barrier(2)

    def make():
        time.sleep(0.1)  # meanwhile the other one asks
        return Part()

    def ask():
        both_ask.wait(10)
        return cached(model, "key", None, make)

    with ThreadPoolExecutor(2) as threads:
        first, second = (threads.submit(ask) for _ in range(2))
        assert first.result(10) is second.result(10)


def test_reading_does_not_wait_for_making():
    """Guards against decoding that waits while another thread makes copies for seconds."""
    model = nn.Linear(1, 1)
    part = cached(model, "key", None, Part)
    with ThreadPoolExecutor(1) as threads, lock(model):
        assert threads.submit(cached, model, "key", None, Part).result(10) is part
