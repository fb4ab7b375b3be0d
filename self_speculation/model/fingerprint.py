"""Fingerprints: derived objects are valid while theirs is unchanged.

The structure of modules needs no read from a device. The contents of tensors are torch's versions, and a
sample that meets every row and every column. Single elements written through `.data` may change neither: call
`fuse(model)` then. The contents of offloaded weights are not seen.
"""

from __future__ import annotations

import io
import itertools
import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from functools import cache
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from self_speculation.model.mapped import MappedFiles

# Attributes of every module, of which its `forward` reads only "training" as it is.
_OF_ALL = vars(nn.Module()).keys() - {"training"}
_NUMBERS = frozenset((int, float, complex, bool, str, type(None), torch.dtype))

# Up to _SHORT elements, a tensor of one dimension is read whole. A longer one is sampled as rows of _ROW
# elements: weights of bitsandbytes hold several rows.
_SHORT, _ROW = 2**16, 1024


def fingerprint(*roots: nn.Module) -> Hashable:
    """Changes with the structure and the contents of these modules. One read from each device."""
    tensors = {id(tensor): tensor for module in _modules(roots) for tensor in _own_tensors(module)}
    return structure(*roots), *contents([tensors.values()])


def structure(*roots: nn.Module, attributes: bool = True) -> tuple[tuple[Any, ...], ...]:
    """Changes when a module, a `forward`, a hook, a number or a tensor in these modules is replaced, and when
    a tensor moves or is converted. Reads nothing from a device.

    Args:
        attributes: False: leave out numbers, functions but `forward`, and tensors that are no parameters.

    Returns:
        For each module its `id`, and what else is seen of it.
    """
    return tuple(_structure_of(module, attributes) for module in _modules(roots))


@torch.no_grad()
def contents(groups: Sequence[Iterable[Tensor]]) -> list[Hashable]:
    """For each group of tensors, a value that changes when they are written to. One read from each device."""
    samples: dict[torch.device, dict[torch.dtype, list[tuple[list, Tensor]]]]
    samples = defaultdict(lambda: defaultdict(list))
    found: list[list[Hashable]] = []
    files = MappedFiles()
    for group in groups:
        tensors = [*group]
        found.append([_version(tensor) for tensor in tensors])
        for part in itertools.chain.from_iterable(map(_parts, tensors)):
            if (address := files.address(part)) is not None:  # sampling would read its file into memory
                found[-1].append(address)
            elif part.device.type != "meta" and part.numel():
                samples[part.device][part.dtype].append((found[-1], _sample(part)))
    for by_dtype in samples.values():
        joined = [torch.cat([part for _, part in pairs]).view(torch.uint8) for pairs in by_dtype.values()]
        bits = io.BytesIO(torch.cat(joined).cpu().numpy().data)  # the read
        for values, sample in itertools.chain.from_iterable(by_dtype.values()):
            values.append(bits.read(sample.nbytes))
    return [tuple(values) for values in found]


def _modules(roots: Iterable[nn.Module]) -> list[nn.Module]:
    """All modules in these."""
    modules = [*roots]
    for module in modules:  # the list grows
        modules += [child for child in module._modules.values() if child is not None]
    return modules


def _structure_of(module: nn.Module, attributes: bool) -> tuple[Any, ...]:
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


def _version(tensor: Tensor) -> int | None:
    """torch's version of a parameter; None for one made in inference mode, and for buffers: passes may write
    the same numbers again, such as rotary frequencies.
    """
    try:
        return tensor._version if isinstance(tensor, nn.Parameter) else None
    except RuntimeError:
        return None


def _sample(part: Tensor) -> Tensor:
    """[n] elements, a view of the tensor, at least one of each row and of each column of a matrix."""
    part = part.data
    if not part.is_contiguous():  # a tensor with gaps, such as some columns of another, is copied
        part = part.permute(sorted(range(part.dim()), key=part.stride, reverse=True)).contiguous()
    step = _step(part.numel(), part.shape[-1] if part.dim() > 1 else part.numel())
    return part.as_strided(((part.numel() - 1) // step + 1,), (step,))


@cache
def _step(size: int, columns: int) -> int:
    """Elements in memory from one of a sample to the next, for rows of so many columns.

    The step is shorter than a row, so it meets every row. It shares no divisor with the number of columns and
    is no longer than a column, so it meets every column.
    """
    rows = size // columns
    if min(rows, columns) == 1:
        if size <= _SHORT:
            return 1
        rows, columns = size // _ROW, _ROW
    step = min(rows, columns - 1)
    while math.gcd(step, columns) > 1:
        step -= 1
    return step
