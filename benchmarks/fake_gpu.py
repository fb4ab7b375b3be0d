"""A GPU of tensors that have shapes, strides and devices, but no memory.

Passes run on it as on an H100, so one sees which kernels they launch, what each of them reads and writes, and
a tensor on the wrong device.
"""

import inspect
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from self_speculation.backends.round_tensors import Outcome
from self_speculation.machine.transfers import AsyncRead

DEVICE = "cuda:0"
_OURS = ("decode_attention", "gated")  # operators of card_kernels.py
_KERNELS = ("rotate_and_write", "attend", "merge", "gate")
_LOOKED_UP = ("embedding", "index", "index_select", "gather")  # they read no more than they return


class Launch(NamedTuple):
    """A kernel, and the bytes that it reads and writes."""

    name: str
    num_bytes: int


@dataclass
class Trace:
    """What has run.

    Attributes:
        launches: kernels and copies, also in graphs.
        replays: which of them each replay of a graph has made.
        num_calls: of the host: launches and views; a replay is one.
    """

    launches: list[Launch] = field(default_factory=list)
    replays: list[slice] = field(default_factory=list)
    num_calls: int = 0


class FakeGPU(TorchDispatchMode):
    """Notes what runs.

    Attributes:
        trace: of all since it was set.
        length: positions of a row, whose keys and values attention reads.
        num_shared: the first of them, which are read once for all rows.
        is_replaying: a graph runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trace = Trace()
        self.length = 1
        self.num_shared = 0
        self.is_replaying = False

    def graph_recorder(self, _: torch.device) -> Callable[[Callable[[], None]], Callable[[], None]]:
        """In the place of `GraphRecorder`: a replay runs what was captured."""
        return lambda run: partial(self._replay, run)

    def _replay(self, run: Callable[[], None]) -> None:
        trace = self.trace
        num_calls = self.trace.num_calls
        num_launches = len(self.trace.launches)
        self.is_replaying = True
        run()
        trace.num_calls = num_calls + 1
        self.is_replaying = False
        trace.replays.append(slice(num_launches, len(trace.launches)))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in _OURS:
            return self._launched_by(name, *args)
        result = function(*args, **(kwargs or {}))
        given = tensors_of((args, kwargs))
        returned = tensors_of(result)
        if name.startswith(("empty", "new_empty", "device")) or not any(map(is_there, given + returned)):
            return result
        assert not self.is_replaying or all(map(is_there, given + returned)), "a graph copies from the host"
        self.trace.num_calls += 1
        known = {*map(storage, given)}
        is_view = not function._schema.is_mutable and known.issuperset(map(storage, returned))
        if not is_view:
            read = returned if name in _LOOKED_UP else given
            self.trace.launches.append(Launch(name, sum(map(_num_bytes, read + returned))))
        return result

    def _launched_by(self, name: str, *args: object) -> Tensor:
        """An operator of ours, which launches kernels."""
        self.trace.num_calls += 1
        module = sys.modules["self_speculation.backends.card_kernels"]
        kernels: dict[str, Any] = {kernel: _Kernel(getattr(module, kernel), self) for kernel in _KERNELS}
        with patch.multiple(module, **kernels):
            return getattr(module, name)(*args)


class _Kernel:
    """In the place of a kernel in Triton."""

    def __init__(self, kernel: Any, gpu: FakeGPU) -> None:
        self._names = list(inspect.signature(kernel.fn).parameters)
        self._gpu = gpu
        self._name = kernel.fn.__name__

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self._launch

    def _launch(self, *args: object, **constants: object) -> None:
        given: dict[str, Any] = dict(zip(self._names, args, strict=False)) | constants
        parts = {name: part for name, part in given.items() if isinstance(part, Tensor)}
        if "positions" in parts:
            rows, width = parts["positions"].shape
            num_read = rows * width
            if self._name == "attend":
                num_read = rows * (self._gpu.length - self._gpu.num_shared) + self._gpu.num_shared
            for name in parts.keys() & {"cos", "sin"}:
                parts[name] = parts[name][0].expand(num_read, -1)
            for name in ("keys", "values"):
                parts[name] = parts[name][0, :, 0].expand(num_read, -1, -1)
        for name in parts.keys() & {"sums", "stats"}:  # of all heads of queries, without padding
            num_heads = len(parts["out" if self._name == "merge" else "qkv"]) * given["HEADS"]
            num_splits = given["SPLITS"] + (given["PREFIX_SPLITS"] if self._gpu.num_shared else 0)
            parts[name] = parts[name][0, 0].expand(num_heads * num_splits, -1)
        num_bytes = sum(part.numel() * part.itemsize for part in parts.values())
        self._gpu.trace.launches.append(Launch(self._name, num_bytes))


class _OnMeta(TorchFunctionMode):
    """A call may ask CUDA for the current device, which a torch without it cannot: it runs on "meta"."""

    def __init__(self, gpu: FakeGPU) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.copy_ and _is_same(*args[:2]):
            return args[0]
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            if "not linked with support for cuda" not in str(error):
                raise
        if function is Tensor.copy_ and not is_there(args[1]):
            assert not self._gpu.is_replaying, "a graph copies from the host"
            assert hasattr(args[1], "has_pinned_memory"), "pageable memory"
        else:
            assert len({tensor.device for tensor in tensors_of((args, kwargs)) if tensor.dim()}) == 1
        result = function(*_moved(args, "meta"), **_moved(kwargs, "meta"))
        is_in_place = function.__name__.endswith("_") and not function.__name__.endswith("__")
        return args[0] if is_in_place else _moved(result, DEVICE)


def _moved(values: Any, device: str) -> Any:
    return tree_map_only(
        Tensor,
        lambda part: torch.empty_strided(part.shape, part.stride(), dtype=part.dtype, device=device),
        values,
    )


def tensors_of(values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def is_there(tensor: Tensor) -> bool:
    """Whether a tensor is on the fake GPU."""
    return tensor.device.type != "cpu"


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether a copy of one to the other does nothing."""
    layouts = [(part.shape, part.stride(), part.storage_offset(), part.dtype) for part in (one, other)]
    return layouts[0] == layouts[1] and storage(one) == storage(other)


def _num_bytes(tensor: Tensor) -> int:
    """The bytes in memory; an expanded tensor repeats elements."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


class _CurrentDevice:
    """At first it is another one than the model's."""

    index = 1

    def exchange(self, index: int) -> int:
        before = self.index
        self.index = before if index < 0 else index
        return before

    def from_dlpack(self, part: Tensor) -> Tensor:
        assert part.device.index == self.index, "Can't export tensors on a different CUDA device index"
        return part


class _Event:
    """In the place of an event of CUDA's."""

    def __init__(self, enable_timing: bool) -> None: ...

    def record(self, stream: object = None) -> None:
        assert str(stream) == DEVICE, "recorded on a stream of the current GPU, which is another one"

    def elapsed_time(self, _: object) -> float:
        return 1.0


def _pinned(part: Any) -> Any:
    """In the place of `pin_memory`, and of pinned memory."""
    assert part.device.type == "cpu", "only dense CPU tensors can be pinned"
    part.has_pinned_memory = True
    return part


def _stand_ins(gpu: FakeGPU) -> dict[str, object]:
    """In the place of what asks a GPU, by name. Whatever is read from the GPU is drawn."""
    draws = random.Random(0)
    start_reading = AsyncRead.__init__
    tensor = torch.tensor
    empty = torch.empty
    zeros = torch.zeros
    current = _CurrentDevice()

    def drawn(part: Tensor) -> float:
        """Ids, or numbers between 0 and 1; nothing is damaged."""
        if part.dtype == torch.bool:
            return 0
        return draws.random() if part.is_floating_point() else draws.randrange(5, 60)

    def queue(reading: Any, numbers: Sequence[Tensor]) -> None:
        reading.numbers = numbers
        start_reading(reading, numbers)

    def read(reading: Any) -> list[list[float]]:
        return [[drawn(part) for _ in range(part.numel())] for part in reading.numbers]

    def some_accepted(_: object, __: object, lengths: Sequence[int]) -> list[int]:
        return [draws.randint(0, length) for length in lengths]

    def some_outcomes(_: object, __: object, widths: Sequence[int]) -> list[Outcome]:
        counts = [draws.randint(1, width) for width in widths]
        tokens = [[draws.randrange(5, 60) for _ in range(count)] for count in counts]
        return [Outcome([0.0] * width, of_row) for width, of_row in zip(widths, tokens, strict=True)]

    def fake_tensor(data: Any, dtype: Any = None, device: Any = None, pin_memory: bool = False) -> Tensor:
        assert not pin_memory or isinstance(data, list), "Can't pin tensor constructed from numpy"
        made = tensor(data, dtype=dtype)
        return empty(made.shape, dtype=made.dtype, device=device)

    def fake_empty(*size: Any, pin_memory: bool = False, **kind: Any) -> Tensor:
        made = empty(*size, **kind)
        return _pinned(made) if pin_memory else made

    def new_zeros(like: Tensor, *size: Any, **kind: Any) -> Tensor:
        return zeros(*size, **{"dtype": like.dtype, "device": like.device, **kind})

    package = "self_speculation"
    return {
        "torch.backends.cuda.enable_cudnn_sdp": lambda enabled: None,
        "torch.cuda.get_device_capability": lambda device: (9, 0),
        "torch.cuda.get_device_properties": lambda device: SimpleNamespace(multi_processor_count=132),
        "torch.cuda.mem_get_info": lambda device: (2**36, 2**36),
        f"{package}.backends.captures.GraphRecorder": gpu.graph_recorder,
        # A parameter of no memory is no `Parameter`, and nowhere.
        f"{package}.backends.card_runner.why_not_plain": lambda *modules: None,
        f"{package}.backends.layers.weights_key": lambda model: (),
        "torch.from_dlpack": current.from_dlpack,
        "torch.cuda._exchange_device": current.exchange,
        "torch.cuda._maybe_exchange_device": current.exchange,
        "torch.cuda.current_stream": lambda device=None: device,
        "torch.cuda.Event": _Event,
        f"{package}.self_speculation_generator.leading_matches": some_accepted,
        f"{package}.backends.round_tensors.RoundTensors.outcomes": some_outcomes,
        f"{package}.machine.transfers.AsyncRead.__init__": queue,
        f"{package}.machine.transfers.AsyncRead.wait": read,
        # Fake mode holds on one thread.
        f"{package}.backends.copies.ThreadPoolExecutor": lambda number: nullcontext(SimpleNamespace(map=map)),
        # These draw by a generator of CUDA's.
        "torch.Tensor.normal_": lambda tensor, *_, **__: tensor,
        "torch.Tensor.uniform_": lambda tensor, *_, **__: tensor,
        # These make real memory even so.
        "torch.tensor": fake_tensor,
        "torch.empty": fake_empty,
        "torch.Tensor.pin_memory": _pinned,
        "torch.Tensor.new_zeros": new_zeros,
    }


@contextmanager
def fake_gpu() -> Iterator[FakeGPU]:
    """In this block there is one, "cuda:0"."""
    with torch.device("cpu"):  # torch caches constructors at the first context, here before the patches
        torch.empty(0)
    with ExitStack() as stack:
        gpu = FakeGPU()
        for name, value in _stand_ins(gpu).items():
            stack.enter_context(patch(name, value))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(_OnMeta(gpu))
        yield stack.enter_context(gpu)


def fake_model(config: PretrainedConfig, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A model on the fake GPU."""
    with torch.no_grad(), torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
