"""Decoding passes captured as CUDA graphs: a replay is one call of the host instead of hundreds.

A graph is a range of layers over so many tokens of so many rows, both powers of two, or a whole step of a
greedy draft: from an id to the next one. Rows of any length replay it, since the kernels of attention read
positions on the device. Prompts run eagerly, and so do embedding and head of other passes. Cache and inputs
stay at one address.

All captured passes of a model share one cache. It serves one generation at a time: the latest one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from threading import Lock, Thread, current_thread
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from self_speculation.config import CacheDtypeName
from self_speculation.devices import padded, round_up
from self_speculation.families import AttentionType
from self_speculation.model_cache import cached, lock, peek
from self_speculation.passes.attention_context import AttentionTables
from self_speculation.passes.fused_layers import DecodeContext, FusedRunner
from self_speculation.passes.kv_cache import Buffers, KVCache
from self_speculation.passes.layers import PlainHead
from self_speculation.passes.model_runner import ModelRunner, run_through
from self_speculation.transfers import on_device

_STEP = 1024  # positions by which the cache grows
_STEPS = 8  # that a graph of draft steps has room for, at least
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
    """Replays passes over the buffers of `CapturedPasses`, except prompts, and passes by layers of
    transformers.
    """

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
            return self.fused_weights.token, passes.num_slots >= num_slots

        with lock(self.model):
            passes = cached(self.model, CapturedPasses, valid_for, lambda: CapturedPasses(self, num_slots))
            cache = KVCache(passes)
        cache.reserve(prompt_length, num_positions)
        return cache

    def run_rectangle(self, cache: KVCache, hidden: Tensor, start_layer: int, end_layer: int) -> Tensor:
        num_rows, width, _ = hidden.shape
        passes = cache.buffers
        if not isinstance(passes, CapturedPasses):
            return super().run_rectangle(cache, hidden, start_layer, end_layer)
        cache.check()
        if not self.decodes_by_kernels(cache, self.layers[start_layer:end_layer]):
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

    def draft_greedily(
        self, cache: KVCache, ids: Tensor, limits: Sequence[int], end_layer: int
    ) -> tuple[Tensor, Tensor] | None:
        passes = cache.buffers
        is_fused = not isinstance(self.head, PlainHead) and self.decodes_by_kernels(
            cache, self.layers[:end_layer]
        )
        if not (isinstance(passes, CapturedPasses) and is_fused and any(limits)):
            return None
        cache.check()
        num_rows = len(limits)
        num_steps = max(limits)
        lengths = cache.lengths(0)
        cache.make_room(0, end_layer, limits)
        replay, steps = passes.capture_step(self, end_layer, padded(num_rows), max(_STEPS, padded(num_steps)))
        steps.begin(ids, lengths, limits)
        for _ in range(num_steps):
            replay()
        cache.extend(0, end_layer, limits)
        return steps.drafted(limits)


class DraftSteps:
    """What a graph of a step of greedy drafts reads and writes: from the id of each row to the next one. The
    graph moves on to the next step.

    Args:
        like: of states.
        rows, longest: R and K, the most rows and steps.
    """

    def __init__(self, like: Tensor, rows: int, longest: int, hidden_size: int) -> None:
        numbers = torch.zeros(longest * rows + 1, dtype=torch.long, device=like.device)
        self._numbers = numbers
        self._positions = numbers[:-1].view(longest, rows)  # of each step; -1: the row has no such step
        self._number = numbers[-1:]  # [1] of this step
        self.positions = torch.zeros(rows, 1, dtype=torch.long, device=like.device)  # of this step
        self.ids = torch.zeros(rows, dtype=torch.long, device=like.device)
        self._tokens = torch.zeros(longest, rows, dtype=torch.long, device=like.device)
        self._states = like.new_zeros(longest, rows, hidden_size)

    def begin(self, ids: Tensor, lengths: Sequence[int], limits: Sequence[int]) -> None:
        """The next step is the first one of these rows, after so many positions."""
        longest, rows = self._positions.shape
        numbers = [-1] * (longest * rows)
        for row, (length, limit) in enumerate(zip(lengths, limits, strict=True)):
            numbers[row : limit * rows : rows] = range(length, length + limit)
        self._numbers.copy_(on_device([*numbers, 0], self.ids.device))
        self.ids[: len(limits)] = ids

    def read(self) -> None:
        """The positions of this step."""
        torch.index_select(self._positions, 0, self._number, out=self.positions.view(1, -1))

    def write(self, states: Tensor, logits: Tensor) -> None:
        """The results of this step, [R, H] and [R, V]."""
        torch.argmax(logits, -1, out=self.ids)
        self._states.index_copy_(0, self._number, states[None])
        self._tokens.index_copy_(0, self._number, self.ids[None])
        self._number.add_(1)

    def drafted(self, limits: Sequence[int]) -> tuple[Tensor, Tensor]:
        """[K] tokens and [K, H] states, row by row."""
        rows = len(self.ids)
        places = [step * rows + row for row, limit in enumerate(limits) for step in range(limit)]
        at = on_device(places, self.ids.device)
        return self._tokens.flatten()[at], self._states.flatten(0, 1)[at]


class CapturedPasses(Buffers):
    """The buffers of the latest cache, and captured passes of a model over them."""

    def __init__(self, runner: CapturedRunner, num_slots: int) -> None:
        super().__init__(runner.devices, runner.key_shape, runner.dtype, num_slots)
        self.grows = False
        # Graphs read them, and they only grow here.
        self._tables = AttentionTables(runner.model, runner.dtype)
        self._drop_replays()
        self.inputs = dict[tuple[int, int], tuple[Tensor, Tensor]]()  # [B, T, H] states, [B, T] positions
        self._steps = dict[tuple[int, int], DraftSteps]()  # by rows and the most steps

    def _drop_replays(self) -> None:
        """All graphs of a stream use one cuBLAS workspace. Destroying one of them frees it (pytorch issue
        193402), and an exception may keep one for long. So all go together, and the stream with them.
        """
        # (whether a copy runs, start_layer, end_layer, rows, width) -> replay; of a step: (whether a copy
        # runs, end_layer, rows, most steps) -> replay.
        self.replays = dict[tuple[int, ...], Replay]()
        self._threads = set[Thread]()  # that have captured
        vars(self).pop("_recorder", None)  # a stream is free now
        self._recorder = GraphRecorder(self._tables.device)

    def reserve(self, num_positions: int, least: int) -> None:
        """Make buffers of so many positions, or as many as fit. Larger ones end all captured passes."""
        before = self.capacity
        if num_positions > before:
            super().reserve(round_up(num_positions, _STEP), least)
        if self.capacity > before:
            try:
                self._drop_replays()
                self._tables.reserve(self.capacity)
                for layer in range(self.num_layers):
                    self.with_room(layer, self.capacity)
            except BaseException:  # no layer may grow once a pass is captured
                self.capacity = self.capacity_of_all
                raise

    def capture(self, runner: ModelRunner, start_layer: int, end_layer: int, rows: int, width: int) -> Replay:
        """The replay of a pass over `inputs[rows, width]`."""
        if (rows, width) not in self.inputs:
            states = self._tables.like.new_zeros(rows, width, runner.config.hidden_size)
            self.inputs[rows, width] = states, torch.zeros_like(states[..., 0], dtype=torch.long)
        states, positions = self.inputs[rows, width]
        layers = runner.typed_layers(start_layer, end_layer)
        run = partial(self._run, layers, states, positions)
        return self._captured(
            (runner.is_copy, start_layer, end_layer, rows, width), run, partial(positions.fill_, -1)
        )

    def capture_step(
        self, runner: ModelRunner, end_layer: int, rows: int, longest: int
    ) -> tuple[Replay, DraftSteps]:
        """The replay of a step of greedy drafts by layers [:end_layer], and what it reads and writes."""
        if (rows, longest) not in self._steps:
            size = runner.config.hidden_size
            self._steps[rows, longest] = DraftSteps(self._tables.like, rows, longest, size)
        steps = self._steps[rows, longest]

        def run() -> None:
            steps.read()
            states = runner.embed(steps.ids)
            self._run(runner.typed_layers(0, end_layer), states[:, None], steps.positions)
            steps.write(states, runner.logits(states))

        no_rows = partial(steps.begin, steps.ids[:0], (), ())  # and the first step: there is room for two
        return self._captured((runner.is_copy, end_layer, rows, longest), run, no_rows), steps

    def _captured(self, key: tuple[int, ...], run: Callable[[], None], clear: Callable[[], object]) -> Replay:
        """The replay of a function over static tensors. `clear` makes them those of no row: the function runs
        before it is captured. If a capture fails, all are captured anew; also if a thread has ended that has
        captured: workspaces of cuBLAS may go with it (pytorch issue 192061).
        """
        if not all(thread.is_alive() for thread in self._threads):
            self._drop_replays()
        if key not in self.replays:
            clear()
            self._threads.add(current_thread())
            try:
                self.replays[key] = self._recorder(run)
            except BaseException:
                self._drop_replays()
                raise
        return self.replays[key]

    def _run(self, layers: Sequence[tuple[Any, AttentionType]], states: Tensor, positions: Tensor) -> None:
        """Layers over states [B, T, H], in place."""
        make = partial(DecodeContext, self._tables, self.by_layer, positions)
        states.copy_(run_through(layers, make, states))  # fused layers work in place: then nothing is copied


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
