"""Stands in for CUDA graphs on a CPU: a capture records calls, and a replay makes them again.

As on a GPU, a capture computes nothing, reads nothing on the host, and has its results in a pool whose
content is lost when another graph runs. All graphs of a stream use one workspace, which is freed when one of
them fails or is destroyed. A failed capture leaves its stream the current one. A process captures one graph
at a time.
"""

import itertools
import threading
from contextlib import contextmanager
from types import SimpleNamespace
from weakref import WeakMethod

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from self_speculation.model_cache import singleton
from self_speculation.passes import graph_recorder
from self_speculation.passes.layers import Settings

# Calls that read a tensor on the host, copy host data, or give results whose shape depends on values.
REFUSED = {
    "item", "_local_scalar_dense", "equal", "is_nonzero", "lift_fresh", "nonzero", "unique", "_unique2",
    "masked_select", "resize_", "set_",
}  # fmt: skip


COMPARED = 1  # replays of a graph


class CaptureError(Exception):
    """CUDA would end the capture."""


class Graph(TorchDispatchMode):
    """In the place of `torch.cuda.CUDAGraph`."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self._outer = {}  # storages from before the capture that it writes to, with their content
        self._pool = {}  # storages that it made, with a tensor that has all of each
        self._stream = self._workspace = None

    def begin(self, stream):
        self._stream, self._workspace = stream, stream.workspace

    def __del__(self):
        if self._stream is not None:
            self._stream.workspace = object()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function.overloadpacket.__name__
        tensors = tensors_of((args, kwargs))
        if name in REFUSED or any(index.dtype == torch.bool for index in tensors if name.startswith("index")):
            raise CaptureError(name)
        held = {storage(tensor) for tensor in tensors}
        if function._schema.is_mutable:
            for tensor in tensors:
                if storage(tensor) not in self._pool.keys() | self._outer.keys():
                    self._outer[storage(tensor)] = tensor, tensor.untyped_storage().clone()
        result = function(*args, **kwargs)
        made = {i: part for i, part in enumerate(tensors_of(result)) if storage(part) not in held}
        self._pool |= {storage(part): part for part in made.values()}
        if made or function._schema.is_mutable:  # a view has the contents of what it views
            self.calls.append((function, args, kwargs, made))
        return result

    def end(self):
        for tensor, content in self._outer.values():
            tensor.untyped_storage().copy_(content)
        self._lose_pool()

    def replay(self):
        assert self._workspace is self._stream.workspace, "another graph has freed the workspace"
        for function, args, kwargs, made in self.calls:
            result = function(*args, **kwargs)
            new = tensors_of(result) if made else ()
            for index, old in made.items():
                assert old.shape == new[index].shape
                old.copy_(new[index])
        self._lose_pool()

    def _lose_pool(self):
        for tensor in self._pool.values():
            tensor.fill_(torch.nan if tensor.is_floating_point() else 1)


def tensors_of(values):
    """Those with a storage: weights packed for oneDNN have none, and are never written to."""
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
    return [tensor for tensor in tensors if tensor.layout == torch.strided]


def storage(tensor):
    return tensor.untyped_storage()._cdata


class Stream:
    def __init__(self):
        self.device, self.workspace = None, object()

    def wait_stream(self, stream):
        assert isinstance(stream, Stream)


class Streams(threading.local):
    def __init__(self):
        self.all = [Stream()]  # the last one is current


STREAMS, CAPTURING = Streams(), threading.Lock()


@contextmanager
def on_stream(stream):
    outer = len(STREAMS.all)
    STREAMS.all.append(stream)
    try:
        yield
    finally:
        del STREAMS.all[outer:]


@contextmanager
def capture(graph, pool, stream, capture_error_mode):
    assert (type(pool), type(stream), capture_error_mode) == (object, Stream, "thread_local")
    if not CAPTURING.acquire(blocking=False):
        raise CaptureError("another thread captures")
    graph.begin(stream)
    STREAMS.all.append(stream)
    try:
        with graph:
            yield
    except BaseException:
        stream.workspace = object()
        raise
    finally:
        graph.end()
        CAPTURING.release()
    STREAMS.all.pop()


def decode_eagerly(model):
    """From now on nothing is captured for this model."""
    singleton(model, Settings).is_captured = False


def stand_in(monkeypatch):
    """CUDA graphs as above. The first replays of each are compared with the eager pass over the same inputs
    and cache: to the bit. Returns what was captured and replayed, by shape.
    """
    STREAMS.all = [Stream()]
    seen = SimpleNamespace(captured=[], replayed=[])
    pool = itertools.cycle([Stream(), Stream()])  # torch has 32
    monkeypatch.setattr(graph_recorder, "_NUM_STREAMS", 2)
    graphs = {"graph_pool_handle": object, "CUDAGraph": Graph, "graph": capture}
    graphs |= {"Stream": lambda device: next(pool)}
    graphs |= {"current_stream": lambda device: STREAMS.all[-1], "stream": on_stream}
    for name, own in graphs.items():
        monkeypatch.setattr(f"torch.cuda.{name}", own)
    record = graph_recorder.GraphRecorder.__call__

    def checked(recorder, run):
        replay = record(recorder, run)
        layers, states, _ = run.args
        buffers, method = run.func.__self__.buffers, WeakMethod(run.func)
        shape, run_args = (len(layers), *states.shape[:2]), run.args
        del run  # graphs do not keep the passes that they belong to
        seen.captured.append(shape)
        number = itertools.count()

        def compared():
            seen.replayed.append(shape)
            if next(number) >= COMPARED:
                return replay()
            written = [states, *buffers.all()]
            before = [part.clone() for part in written]
            method()(*run_args)
            expected = [part.clone() for part in written]
            for part, content in zip(written, before, strict=True):
                part.copy_(content)
            replay()
            assert all(map(torch.equal, written, expected))

        return compared

    monkeypatch.setattr(graph_recorder.GraphRecorder, "__call__", checked)
    return seen
