"""What is made from a model and kept with it. test_runners.py has changes of weights, which end it."""

import copy
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

from self_speculation.models import model_cache
from self_speculation.models.model_cache import cached, counts_writes, kept, peek, release, weights_key
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
    head = model.lm_head
    mesh = init_device_mesh("cpu", (1,))
    head.weight = nn.Parameter(DTensor.from_local(head.weight.data, mesh, [Replicate()]))
    key = weights_key(model)
    assert key == weights_key(model)
    # torch moves no tensor that wraps tensors and has a weak reference.
    assert key != weights_key(model.to("meta")) == weights_key(model)


def rewrapped(module, _):
    module.weight = nn.Parameter(module.weight.data)


def replaced(module, memory):
    module.weight = nn.Parameter(torch.from_numpy(memory))


def replaced_data(module, memory):
    module.weight.data = torch.from_numpy(memory)


@pytest.mark.parametrize("replace", [rewrapped, replaced, replaced_data])
def test_a_key_never_recurs(replace, monkeypatch):
    """Guards against kept prefixes, copies and joint weights of before: a weight that is replaced twice may
    get id, address and version of before. Here all tensors have one id.
    """
    monkeypatch.setattr(model_cache, "id", lambda it: 0 if torch.is_tensor(it) else id(it), raising=False)
    module = nn.Linear(3, 3)
    memory = torch.zeros(3, 3).numpy()
    replaced(module, memory)
    key = weights_key(module)
    replace(module, memory)
    assert weights_key(module) == weights_key(module) != key


def test_writes_to_weights_made_in_inference_mode_are_not_counted():
    """Guards against kept prefixes of before a write: a parameter that is made, outside, of a tensor that was
    made in inference mode has the version 0 for ever, and weights in few bits are buffers.
    """
    with torch.inference_mode():
        made = torch.zeros(1, 1)
        in_few_bits = torch.zeros(34, dtype=torch.uint8)
    module = nn.Linear(1, 1, bias=False)
    assert counts_writes(module)
    module.weight = nn.Parameter(made, requires_grad=False)
    assert not counts_writes(module)
    assert not counts_writes(FewBitsLinear(in_few_bits, 1, 32))


class Part:
    """Something that is made."""


def test_it_is_kept_while_it_is_valid():
    """Guards against a part that is made again, also since making it has moved weights, one of before a
    change, and one of another model.
    """
    model, other = nn.Linear(1, 1), nn.Linear(1, 1)

    def made_by(make):
        return cached(model, "key", lambda _: tuple(model.weight.shape), make)

    def moves():
        model.weight = nn.Parameter(model.weight[None])
        return Part()

    part = made_by(moves)
    assert made_by(Part) is peek(model, "key") is part
    assert cached(model, "another key", bool, Part) is not part
    assert cached(other, "key", bool, Part) is not part
    model.weight = nn.Parameter(model.weight[None])
    changed = made_by(Part)
    assert made_by(Part) is changed is not part


def test_it_is_freed():
    """Guards against twice the memory, memory that stays after `release` or with a model that is gone, and
    settings that go.
    """
    model = nn.Linear(1, 1)
    part = weakref.ref(cached(model, "key", lambda _: 1, Part))

    def make():
        assert part() is None
        return Part()

    part = weakref.ref(cached(model, "key", lambda _: 2, make))
    setting = kept(model).setdefault(Part, Part())
    release(model)
    assert part() is None
    assert kept(model)[Part] is setting
    setting = weakref.ref(setting)
    del model
    gc.collect()
    assert setting() is None


def test_threads_make_it_once():
    """Guards against two parts of one model of which one is lost, and against decoding that waits while
    another thread makes copies for seconds.
    """
    model = nn.Linear(1, 1)
    is_made = threading.Event()
    goes_on = threading.Event()
    part = cached(model, "kept", bool, Part)

    def make():
        is_made.set()
        assert goes_on.wait(10)
        return Part()

    with ThreadPoolExecutor(3) as threads:
        parts = [threads.submit(cached, model, "key", bool, make) for _ in range(2)]
        assert is_made.wait(10)
        assert threads.submit(cached, model, "kept", bool, Part).result(5) is part
        goes_on.set()
        assert parts[0].result(10) is parts[1].result(10)
