"""What is made from a model and kept with it: fused layers, traces, captured passes, statistics, finished
answers. It is freed with the model, so it must not refer to the model.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from threading import Lock, RLock
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

T = TypeVar("T")


class _Made:
    """Of one model."""

    def __init__(self) -> None:
        self.lock = RLock()
        self.by_key: dict[Hashable, tuple[Hashable, Any]] = {}  # what it is valid for, and itself


_MADE: WeakKeyDictionary[nn.Module, _Made] = WeakKeyDictionary()
_LOCK = Lock()


def _of(model: nn.Module) -> _Made:
    of_model = _MADE.get(model)
    if of_model is None:
        with _LOCK:
            of_model = _MADE.setdefault(model, _Made())
    return of_model


def made(model: nn.Module, key: Hashable, valid_for: Hashable, make: Callable[[], T]) -> T:
    """The result of `make`, kept by key until it is asked for with another `valid_for`."""
    of_model = _of(model)
    kept = of_model.by_key.get(key)
    if kept is None or kept[0] != valid_for:
        with of_model.lock:
            kept = of_model.by_key.get(key)  # another thread may have made it meanwhile
            if kept is None or kept[0] != valid_for:
                kept = None
                of_model.by_key.pop(key, None)  # free its memory first
                kept = of_model.by_key[key] = valid_for, make()
    return kept[1]


def discard(model: nn.Module, key: Hashable) -> None:
    _of(model).by_key.pop(key, None)


def lock(model: nn.Module) -> AbstractContextManager[bool]:
    """Held by a thread, re-entrantly, while it makes something from a model, or changes what is kept. Passes
    do not hold it: they read what is made, which nobody changes afterwards.
    """
    return _of(model).lock
