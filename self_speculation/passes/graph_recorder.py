"""Captures functions as CUDA graphs."""

from collections.abc import Callable
from threading import Lock
from weakref import WeakKeyDictionary

import torch

# torch hands out so many streams of a device in turn. Graphs of a stream share a cuBLAS workspace. These are
# the streams of recorders and their graphs.
_NUM_STREAMS = 32
_STREAMS: WeakKeyDictionary[object, torch.cuda.Stream] = WeakKeyDictionary()
_LOCK = Lock()  # torch captures one graph at a time in a process

Replay = Callable[[], None]


class GraphRecorder:
    """Captures functions on one side stream and in one memory pool.

    The functions leave nothing in the pool that another one reads, so graphs may be replayed in any order.
    Raises RuntimeError if all streams have graphs.
    """

    def __init__(self, device: torch.device) -> None:
        with _LOCK:
            taken = {*_STREAMS.values()}
            streams = (torch.cuda.Stream(device) for _ in range(_NUM_STREAMS))
            stream = next((each for each in streams if each not in taken), None)
            if stream is None:
                raise RuntimeError(f"compile True: at most {_NUM_STREAMS} models of a process are captured")
            self._stream = _STREAMS[self] = stream
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None]) -> Replay:
        """Run it once, for kernels and workspaces that are made on first use; then capture it."""
        outer, graph = torch.cuda.current_stream(self._stream.device), torch.cuda.CUDAGraph()
        with _LOCK:
            _STREAMS[graph] = self._stream
            self._stream.wait_stream(outer)
            try:
                # If a capture fails, `torch.cuda.graph` leaves its stream the current one. This ends it.
                with torch.cuda.stream(self._stream):
                    run()
                    # Other threads, such as a server's, may use the device meanwhile.
                    with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                        run()
            finally:
                outer.wait_stream(self._stream)
        return graph.replay
