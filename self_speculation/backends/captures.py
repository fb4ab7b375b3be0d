"""Decoding passes captured as CUDA graphs: a replay is one call of the host instead of hundreds.

A graph is a step of a draft, from an id to the next one, or a verification, from ids or kept states to the
number of accepted tokens, see `RoundTensors`. For rows whose logits or drafts the host looks at, it is a
range of layers. Graphs are made for powers of two of rows and tokens. Rows of any length replay them, since
the kernels of attention read positions on the device. Prompts run eagerly. Cache and inputs stay at one
address.

All captured passes of a model share one cache. It serves one generation at a time: the latest one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from threading import Lock, RLock, Thread, current_thread
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from self_speculation.backends.buffers import Buffers
from self_speculation.backends.card_runner import DecodeContext, FusedRunner
from self_speculation.backends.kv_cache import KVCache
from self_speculation.backends.layers import PlainHead
from self_speculation.backends.round_tensors import RoundTensors
from self_speculation.backends.runner import ModelRunner, run_through
from self_speculation.backends.torch_attention import RotaryTables
from self_speculation.config import CacheDtypeName
from self_speculation.machine.devices import padded, round_up
from self_speculation.models.model_cache import cached, lock, peek

_STEP = 1024  # positions by which the cache grows
_WIDTH = 8  # tokens of a round that `RoundTensors` have room for, at least
_LOCK = Lock()  # torch captures one graph at a time in a process

# torch hands out so many streams of a device in turn. These are the streams of recorders and their graphs.
_NUM_STREAMS = 32
_STREAMS: WeakKeyDictionary[object, torch.cuda.Stream] = WeakKeyDictionary()

Replay = Callable[[], None]


def num_captures(model: PreTrainedModel) -> int:
    """Captured passes that are kept now."""
    passes = peek(model, CapturedPasses)
    return len(passes.replays) if passes else 0


class CapturedRunner(FusedRunner):
    """Replays captured passes, except prompts, and passes by layers of transformers."""

    def new_cache(
        self,
        prompt_length: int,
        num_positions: int,
        num_slots: int = 1,
        dtype: CacheDtypeName = "auto",
    ) -> KVCache:
        """The one cache of the model's captured passes; earlier generations lose it."""
        self.cache_dtype(dtype)

        def valid_for(passes: CapturedPasses) -> Hashable:
            return self.fused_weights.identity, passes.buffers.num_slots >= num_slots

        with lock(self.model):
            passes = cached(self.model, CapturedPasses, valid_for, lambda: CapturedPasses(self, num_slots))
        with passes.buffers.lock:
            cache = KVCache(passes.buffers)
        cache.reserve(prompt_length, num_positions)
        return cache

    def passes_of(self, cache: KVCache) -> CapturedPasses | None:
        """The captured passes over the buffers of a cache; None: there are none."""
        passes: CapturedPasses | None = peek(self.model, CapturedPasses)
        return None if passes is None or passes.buffers is not cache.buffers else passes

    def run_layers(
        self, cache: KVCache, hidden: Tensor, query_lengths: Sequence[int], start_layer: int, end_layer: int
    ) -> Tensor:
        with cache.buffers.lock:
            cache.check()
            return super().run_layers(cache, hidden, query_lengths, start_layer, end_layer)

    def run_rectangle(self, cache: KVCache, hidden: Tensor, start_layer: int, end_layer: int) -> Tensor:
        num_rows, width, _ = hidden.shape
        passes = self.passes_of(cache)
        if passes is None or not self.decodes_by_kernels(cache, self.layers[start_layer:end_layer]):
            return super().run_rectangle(cache, hidden, start_layer, end_layer)
        shape = (padded(num_rows), padded(width))
        new_positions = cache.positions(start_layer, width, self.device)
        cache.make_room(start_layer, end_layer, [width] * num_rows)
        replay = passes.capture(self, start_layer, end_layer, *shape)
        states, positions = passes.inputs[shape]
        if shape != (num_rows, width):
            positions.fill_(-1)
        states[:num_rows, :width] = hidden
        positions[:num_rows, :width] = new_positions
        replay()
        return states[:num_rows, :width].clone()

    def captures_rounds(self, cache: KVCache, end_layer: int) -> bool:
        """Whether embedding, layers [:end_layer] and head can be in one graph."""
        layers = self.layers[:end_layer]
        return not isinstance(self.head, PlainHead) and self.decodes_by_kernels(cache, layers)


class FixedBuffers(Buffers):
    """Buffers of all layers and tables of rotation, at one address until `num_allocations` rises."""

    def __init__(self, runner: ModelRunner, num_slots: int) -> None:
        super().__init__(runner.devices, runner.key_shape, runner.dtype, num_slots)
        self.grows = False
        self.lock = RLock()
        self.tables = RotaryTables(runner.model, runner.dtype)
        self.num_allocations = 0

    def reserve(self, num_positions: int, least: int) -> None:
        """Allocate `num_positions`, or as many as fit, in all layers at once."""
        before = self.capacity
        if num_positions > before:
            super().reserve(round_up(num_positions, _STEP), least)
        if self.capacity > before:
            self.num_allocations += 1
            try:
                self.tables.reserve(self.capacity)
                for layer in range(self.num_layers):
                    self.with_room(layer, self.capacity)
            except BaseException:  # no layer may grow once a pass is captured
                self.capacity = self.capacity_of_all
                raise


class CapturedPasses:
    """Captured passes of a model over the buffers of the latest cache."""

    def __init__(self, runner: CapturedRunner, num_slots: int) -> None:
        self.buffers = FixedBuffers(runner, num_slots)
        self._drop_replays()
        self.inputs = dict[tuple[int, int], tuple[Tensor, Tensor]]()  # [B, T, H] states, [B, T] positions
        self._hidden_size = runner.config.hidden_size
        self._rounds = dict[tuple[int, int], RoundTensors]()  # by rows and tokens

    def _drop_replays(self) -> None:
        """Drop all captures, and take a new stream. Graphs of a stream share a cuBLAS workspace, which the
        first destroyed graph frees (pytorch issue 193402), and an exception may keep an old graph alive.
        """
        # By kind, `layers_key`, rows, tokens, and what else a graph depends on.
        self._replays = dict[tuple[Hashable, ...], Replay]()
        self._threads = set[Thread]()  # that have captured
        self._allocation = self.buffers.num_allocations
        vars(self).pop("_recorder", None)  # a stream is free now
        self._recorder = GraphRecorder(self.buffers.tables.device)

    @property
    def replays(self) -> dict[tuple[Hashable, ...], Replay]:
        """The valid captures. All are dropped if the buffers have moved, or if a thread that captured has
        ended: cuBLAS may free its workspaces (pytorch issue 192061).
        """
        are_alive = all(thread.is_alive() for thread in self._threads)
        if not are_alive or self._allocation != self.buffers.num_allocations:
            self._drop_replays()
        return self._replays

    def capture(self, runner: ModelRunner, start_layer: int, end_layer: int, rows: int, width: int) -> Replay:
        """The replay of a pass over `inputs[rows, width]`."""
        if (rows, width) not in self.inputs:
            states = self.buffers.tables.like.new_zeros(rows, width, runner.config.hidden_size)
            self.inputs[rows, width] = states, torch.zeros_like(states[..., 0], dtype=torch.long)
        states, positions = self.inputs[rows, width]
        run = partial(self._run, runner, start_layer, end_layer, states, positions)
        key = ("layers", runner.layers_key, rows, width, start_layer, end_layer)
        return self._captured(key, run, partial(positions.fill_, -1))

    def round_tensors(self, rows: int, width: int) -> RoundTensors:
        """The tensors of rounds of so many rows and tokens. Their content is another round's."""
        shape = padded(rows), max(_WIDTH, padded(width))
        if shape not in self._rounds:
            self._rounds[shape] = RoundTensors(self.buffers.tables.like, *shape, self._hidden_size)
        return self._rounds[shape]

    def capture_part(
        self, part: Callable[..., None], tensors: RoundTensors, runner: ModelRunner, *rest: Hashable
    ) -> Replay:
        """The replay of `RoundTensors.draft` or `RoundTensors.verify`. A capture overwrites `tensors`.

        Args:
            rest: what the part takes after the runner.
        """
        key = (part.__name__, runner.layers_key, tensors.rows, tensors.width, *rest)
        return self._captured(key, partial(part, self._run, runner, *rest), partial(tensors.begin, ()))

    def _captured(
        self, key: tuple[Hashable, ...], run: Callable[[], object], clear: Callable[[], object]
    ) -> Replay:
        """The replay of a function over static tensors. `clear` makes them those of no row: the function runs
        before it is captured. If a capture fails, all are captured anew.
        """
        replays = self.replays  # another thread may drop them during a capture
        if key not in replays:
            clear()
            self._threads.add(current_thread())
            try:
                replays[key] = self._recorder(run)
            except BaseException:
                self._drop_replays()
                raise
        return replays[key]

    def _run(
        self, runner: ModelRunner, start_layer: int, end_layer: int, states: Tensor, positions: Tensor
    ) -> Tensor:
        """Layers [start_layer:end_layer] over states [B, T, H], in place."""
        make = partial(DecodeContext, self.buffers.tables, self.buffers, positions)
        after = run_through(runner.typed_layers(start_layer, end_layer), make, states)
        return states.copy_(after)  # fused layers work in place: then nothing is copied


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

    def __call__(self, run: Callable[[], object]) -> Replay:
        """Run it once, for kernels and workspaces that are made on first use; then capture it."""
        outer = torch.cuda.current_stream(self._stream.device)
        graph = torch.cuda.CUDAGraph()
        with _LOCK:
            _STREAMS[graph] = self._stream
            self._stream.wait_stream(outer)
            try:
                # If a capture fails, `torch.cuda.graph` leaves the side stream the current one. The outer
                # context restores the stream before.
                with torch.cuda.stream(self._stream):
                    run()
                    # Other threads, such as a server's, may use the device meanwhile.
                    with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                        run()
            finally:
                outer.wait_stream(self._stream)
        return graph.replay
