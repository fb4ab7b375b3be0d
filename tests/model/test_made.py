"""What is made from a model and kept with it."""

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

from torch import nn

from self_speculation.model.made import discard, lock, made


class Part:
    """Something that is made."""


def test_it_is_kept_while_it_is_valid():
    """Guards against a part that is made again, one of before a change, and one of another model."""
    model, other = nn.Linear(1, 1), nn.Linear(1, 1)
    part = made(model, "key", (1, 2), Part)
    assert made(model, "key", (1, 2), Part) is part
    assert made(model, "another key", (1, 2), Part) is not part
    assert made(other, "key", (1, 2), Part) is not part
    changed = made(model, "key", (1, 3), Part)
    assert changed is not part
    assert made(model, "key", (1, 2), Part) is not part
    discard(model, "key")
    assert made(model, "key", (1, 3), Part) is not changed


def test_it_is_freed_before_the_next_one_is_made_and_with_its_model():
    """Guards against twice the memory, and against memory of a model that is gone."""
    model = nn.Linear(1, 1)
    part = weakref.ref(made(model, "key", 1, Part))

    def make():
        assert part() is None
        return Part()

    part = weakref.ref(made(model, "key", 2, make))
    assert part() is not None
    del model
    gc.collect()
    assert part() is None


def test_threads_make_it_once():
    """Guards against two parts of one model of which one is lost."""
    model, both_ask = nn.Linear(1, 1), threading.Barrier(2)

    def ask():
        both_ask.wait(10)
        return made(model, "key", 1, lambda: both_ask.n_waiting or Part())

    with ThreadPoolExecutor(2) as threads:
        first, second = (threads.submit(ask) for _ in range(2))
        assert first.result(10) is second.result(10)


def test_reading_does_not_wait_for_making():
    """Guards against decoding that waits while another thread makes copies for seconds."""
    model = nn.Linear(1, 1)
    part = made(model, "key", 1, Part)
    with ThreadPoolExecutor(1) as threads, lock(model):
        assert threads.submit(made, model, "key", 1, Part).result(10) is part
