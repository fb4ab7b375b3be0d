"""What is made from a model and kept with it: layers, copies, captured passes, statistics, prefixes.
It is freed with the model, so it must not refer to the model.
"""

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from threading import RLock
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

T = TypeVar("T")


class _Shelf:
    """What is kept with one model, by key.

    Attributes:
        kept: settings and statistics.
        made: a value to compare, and the result that is valid while the value stays.
    """

    def __init__(self) -> None:
        self.lock = RLock()
        self.kept = dict[Hashable, Any]()
        self.made = dict[Hashable, tuple[Hashable, Any]]()


_IN_BUFFERS = ("weight", "bias")  # of `weights.few_bits`

_SHELVES: WeakKeyDictionary[nn.Module, _Shelf] = WeakKeyDictionary()


def _shelf(model: nn.Module) -> _Shelf:
    return _SHELVES.setdefault(model, _Shelf())  # all threads get the same one


@dataclass(frozen=True)
class WeightsKey:
    """Equal: the weights are the same tensors, over the same memory, without a counted write between.

    A weight that is replaced twice may get id and address of before. A weak reference that is kept is of one
    object for ever.
    """

    values: tuple[int | None, ...]
    refs: Sequence[ref[Any]] = field(compare=False)


def weights_key(model: nn.Module) -> WeightsKey:
    """Changes when a weight is replaced, moved or written to: what was made of the model is invalid then.

    torch counts no writes through `.data`, and none to a tensor that was made in inference mode.
    """
    weights = _weights(model)
    # torch swaps the contents of tensors that wrap others, when they move, unless there are weak references.
    wrappers = {kind for kind in {*map(type, weights)} if hasattr(kind, "__tensor_flatten__")}
    # Python has one such reference of an object at a time.
    refs: list[ref[Any]] = [ref(weight) for weight in weights if type(weight) not in wrappers]
    refs += [ref(weight.untyped_storage()) for weight in weights]
    ids = map(id, (*weights, *refs))
    addresses = [weight.data_ptr() for weight in weights]
    return WeightsKey((*ids, *addresses, *map(version, weights)), refs)


def counts_writes(model: nn.Module) -> bool:
    """Whether torch counts writes to all weights."""
    return None not in map(version, _weights(model))


def version(weight: torch.Tensor) -> int | None:
    """The number of writes that torch has counted; None: it was made in inference mode, which counts none."""
    try:
        return None if weight.is_inference() else weight._version
    except RuntimeError:  # a parameter over such a tensor may be none itself
        return None


def _weights(model: nn.Module) -> list[torch.Tensor]:
    """Parameters and, in few bits, buffers; one that is shared comes several times."""
    modules = [model]
    for module in modules:  # it grows meanwhile; `modules` and `parameters` take three times as long
        modules += [child for child in module._modules.values() if child is not None]
    weights: list[torch.Tensor | None] = []
    for module in modules:
        weights += module._parameters.values()
        if module._buffers:
            weights += map(module._buffers.get, _IN_BUFFERS)
    return [weight for weight in weights if weight is not None]


def kept(model: nn.Module) -> dict[Any, Any]:
    """Settings and statistics, by key, as long as the model is there."""
    return _shelf(model).kept


def cached(model: nn.Module, key: Hashable, valid_for: Callable[[T], Hashable], make: Callable[[], T]) -> T:
    """The result of `make`, in this call or an earlier one with this key.

    Args:
        valid_for: the result is made again once `valid_for(result)` has another value than right after
            `make`, which may move weights.
    """
    shelf = _shelf(model)

    def find() -> tuple[Hashable, T] | None:
        made = shelf.made.get(key)
        return made if made is not None and made[0] == valid_for(made[1]) else None

    if (found := find()) is None:
        with shelf.lock:
            if (found := find()) is None:  # no other thread has made it meanwhile
                shelf.made.pop(key, None)  # free the memory first
                result = make()
                found = shelf.made[key] = valid_for(result), result
    return found[1]


def peek(model: nn.Module, key: Hashable) -> Any:
    """The result that was made for a key, valid or not; None: there is none."""
    return _shelf(model).made.get(key, (None, None))[1]


def release(model: nn.Module) -> None:
    """Free what decoding has made of a model: joint weights, copies, captured passes, kept caches.
    After `model.to("cpu")` they would hold the weights on the GPU. What was set or learnt stays, and the next
    generation makes the rest again. Call it while nothing is generated.
    """
    _shelf(model).made.clear()


def lock(model: nn.Module) -> AbstractContextManager[bool]:
    """Held by a thread, re-entrantly, while it makes something from a model, or changes what is kept. Passes
    do not hold it: they read what is made, which nobody changes afterwards.
    """
    return _shelf(model).lock
