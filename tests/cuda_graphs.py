"""Stands in for CUDA graphs on a CPU: a capture records calls, and a replay makes them again over the same
tensors.

As on a GPU, results are in a pool whose content is lost when another graph runs. All graphs of a stream use
one workspace, which is freed when one of them fails or is destroyed. A failed capture leaves the stream the
current one. A process captures one graph at a time. What else a capture refuses is seen on the fake GPU.
"""

import itertools
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.fake_gpu import storage, tensors_of
from self_speculation.backends import captures
from self_speculation.backends.captures import CapturedPasses
from self_speculation.models.model_cache import kept


class CaptureError(Exception):
    """CUDA would end the capture."""


class Graph(TorchDispatchMode):
    """In the place of `torch.cuda.CUDAGraph`."""

    def __init__(self):
        super().__init__()
        self._calls = []
        self._stream = None

    def begin(self, stream):
        self._stream = stream
        self._workspace = stream.workspace

    def __del__(self):
        if self._stream is not None:
            self._stream.workspace = object()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {*map(storage, tensors_of((args, kwargs)))}
        made = {i: part for i, part in enumerate(tensors_of(result)) if storage(part) not in given}
        self._calls.append((function, args, kwargs or {}, made))
        return result

    def replay(self):
        assert self._workspace is self._stream.workspace, "another graph has freed the workspace"
        for function, args, kwargs, made in self._calls:
            new = tensors_of(function(*args, **kwargs))
            for i, old in made.items():
                old.copy_(new[i])
        self.lose_pool()

    def lose_pool(self):
        for *_, made in self._calls:
            for part in made.values():
                part.fill_(torch.nan if part.is_floating_point() else 1)


class Stream:
    def __init__(self):
        self.device = None
        self.workspace = object()

    def wait_stream(self, stream):
        assert isinstance(stream, Stream)


class Streams(threading.local):
    def __init__(self):
        self.all = [Stream()]  # the last one is current


STREAMS = Streams()
CAPTURING = threading.Lock()


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
        graph.lose_pool()
        CAPTURING.release()
    STREAMS.all.pop()


def decode_eagerly(model):
    """From now on nothing is captured for this model."""
    kept(model)["is_captured"] = False


def stand_in(monkeypatch):
    """CUDA graphs as above. Returns the keys of what was captured and replayed."""
    STREAMS.all = [Stream()]
    seen = SimpleNamespace(captured=[], replayed=[], num_graphs=0)

    def graph():
        seen.num_graphs += 1
        return Graph()

    pool = itertools.cycle([Stream(), Stream()])  # torch has 32
    monkeypatch.setattr(captures, "_NUM_STREAMS", 2)
    graphs = {"graph_pool_handle": object, "CUDAGraph": graph, "graph": capture}
    graphs |= {"Stream": lambda device: next(pool)}
    graphs |= {"current_stream": lambda device: STREAMS.all[-1], "stream": on_stream}
    for name, stand_in in graphs.items():
        monkeypatch.setattr(f"torch.cuda.{name}", stand_in)
    own_capture = CapturedPasses._captured

    def seen_capture(passes, key, *calls):
        before = seen.num_graphs
        replay = own_capture(passes, key, *calls)
        seen.captured += [key] * (seen.num_graphs > before)

        def seen_replay():
            seen.replayed.append(key)
            replay()

        return seen_replay

    monkeypatch.setattr(CapturedPasses, "_captured", seen_capture)
    return seen
