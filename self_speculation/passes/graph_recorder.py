"""Captures functions as CUDA graphs."""

from collections.abc import Callable
from threading import Lock

import torch

_LOCK = Lock()  # torch captures one graph at a time in a process

Replay = Callable[[], None]


class GraphRecorder:
    """Captures functions on one side stream and in one memory pool.

    The functions leave nothing in the pool that another one reads, so graphs may be replayed in any order.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # one of 32, which torch hands out in turn
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None]) -> Replay:
        """Run it once, for kernels and workspaces that are made on first use; then capture it."""
        outer, graph = torch.cuda.current_stream(self._stream.device), torch.cuda.CUDAGraph()
        with _LOCK:
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
