"""Fingerprints: derived objects are valid while theirs is unchanged.

Replaced modules and tensors are seen by their addresses, and writes to weights by torch's count of them. Only
small buffers are read from a device. What is written through `.data` is not counted: call `fuse(model)` then.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# Attributes of every module, of which its `forward` reads only "training" as it is.
_OF_ALL = vars(nn.Module()).keys() - {"training"}
_SMALL = 4096
_NUMBERS = frozenset((int, float, complex, bool, str, type(None), torch.dtype))


def fingerprint(*roots: nn.Module) -> Hashable:
    """Changes with the structure of these modules, and with writes to their tensors that torch counts."""
    modules = (module for root in roots for module in root.modules())
    tensors = {id(tensor): tensor for module in modules for tensor in _own_tensors(module)}
    parts = (part for tensor in tensors.values() for part in _parts(tensor))
    return structure(*roots), *map(_value, parts)


def _value(tensor: Tensor) -> Hashable:
    """Passes write the same numbers to some buffers, such as rotary frequencies, so small ones are read. An
    object that equals no other stands for a tensor whose writes torch does not count.
    """
    if isinstance(tensor, nn.Parameter) or tensor.numel() > _SMALL or tensor.device.type == "meta":
        return object() if tensor.is_inference() else tensor._version
    return tuple(tensor.flatten().tolist())


def version_of(tensor: Tensor) -> int | None:
    """torch's count of writes; None for a tensor made in inference mode."""
    return None if tensor.is_inference() else tensor._version


def structure(*roots: nn.Module, attributes: bool = True) -> tuple[Hashable, ...]:
    """Changes when a module, a `forward`, a hook, a number or a tensor in these modules is replaced, and when
    a tensor moves or is converted. Reads nothing from a device.

    Args:
        attributes: False: leave out numbers, functions but `forward`, and tensors that are no parameters.

    Returns:
        For each module its `id`, and what else is seen of it.
    """
    return tuple(_structure_of(module, attributes) for root in roots for module in root.modules())


def _structure_of(module: nn.Module, attributes: bool) -> Hashable:
    """It refers to functions weakly, since they may have the model. Of their `id`, another function could be
    the next owner.
    """
    read = [
        (name, _frozen(value))
        for name, value in [*vars(module).items()]  # a copy: another thread's pass may add one
        if name == "forward" or (attributes and name not in _OF_ALL)
    ]
    hooks = _frozen([[*module._forward_pre_hooks.values()], [*module._forward_hooks.values()]])
    tensors = _own_tensors(module) if attributes else [*module.parameters(recurse=False)]
    addresses = [
        (part.data_ptr(), part.shape, part.stride(), part.dtype, part.device)
        for tensor in tensors
        for part in _parts(tensor)
    ]
    return id(module), type(module), hooks, tuple(read), tuple(map(id, tensors)), tuple(addresses)


def _frozen(value: Any) -> Hashable:
    """Numbers and references to functions, also in containers; the type of anything else."""
    kind: Any = type(value)
    if kind in _NUMBERS:
        return value
    if callable(value):
        return ref(value) if kind.__weakrefoffset__ else value
    if kind is dict:
        return tuple((key, _frozen(each)) for key, each in value.items())
    return tuple(map(_frozen, value)) if kind in (list, tuple, set) else kind


def _own_tensors(module: nn.Module) -> list[Tensor]:
    """Parameters, buffers and other tensors of a module."""
    registered = (*module._parameters.values(), *module._buffers.values())
    others = [value for value in [*vars(module).values()] if type(value) is Tensor]
    return [tensor for tensor in registered if tensor is not None] + others


def _parts(tensor: Any) -> Sequence[Tensor]:
    """The plain tensors in a tensor: those of a quantised one; this rank's part of a sharded one."""
    if type(tensor) in (nn.Parameter, Tensor) or not is_traceable_wrapper_subclass(tensor):
        return (tensor,)
    inner = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
    return [part for each in inner if isinstance(each, Tensor) for part in _parts(each)]
