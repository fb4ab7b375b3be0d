"""Decoding passes captured as CUDA graphs: a replay is one call of the host instead of hundreds.

A graph is a range of layers over so many tokens of so many rows, both powers of two. Rows of any length
replay it, since the kernels of attention read positions on the device. Embedding, head and prompts run
eagerly. Cache and inputs stay at one address.

All captured passes of a model share one cache. It serves one generation at a time: the latest one.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Hashable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from self_speculation.devices import free_memory, padded, round_up
from self_speculation.families import AttentionType
from self_speculation.model_cache import cached, lock, peek
from self_speculation.passes.attention_context import AttentionTables
from self_speculation.passes.decode_attention import DecodeContext
from self_speculation.passes.fused_layers import FusedRunner
from self_speculation.passes.graph_recorder import GraphRecorder, Replay
from self_speculation.passes.kv_cache import Buffers, KVCache
from self_speculation.passes.layers import Head, Layer
from self_speculation.passes.model_runner import PassRange, run_through
from self_speculation.progress import progress

# The cache grows by so many positions, and passes over more tokens of a row are eager.
_STEP, _WIDEST = 1024, 64
# Bytes of a graph for each layer (11 kernels of some 10 kB), and by logit of a round while it is sampled by
# top-p. A cache takes this share of what they leave free; prompts need the rest.
_LAYER_BYTES, _SAMPLING_BYTES, _SHARE = 200_000, 48, 0.9


def num_captures(model: PreTrainedModel) -> int:
    """Captured passes that are kept now."""
    passes = peek(model, CapturedPasses)
    return len(passes.replays) if passes else 0


class CapturedRunner(FusedRunner):
    """Replays passes over a `CapturedCache`, except prompts, and passes that are wide or by layers of
    transformers.
    """

    copies: tuple[weakref.ref, ...] = ()  # products of copied layers; part of the key of a graph

    def _replace(self, layers: Sequence[Layer], head: Head) -> None:
        if layers is not self.layers:
            self.copies = tuple(weakref.ref(linear) for layer in layers for linear in layer.products)
        super()._replace(layers, head)

    def new_cache(self, prompt_length: int, num_positions: int, num_slots: int = 1) -> KVCache:
        """The one cache of the model's captured passes; earlier generations lose it."""

        def valid_for(passes: CapturedPasses) -> Hashable:
            return self.parts, passes.buffers.num_slots >= num_slots

        with lock(self.model):
            passes = cached(self.model, CapturedPasses, valid_for, lambda: CapturedPasses(self, num_slots))
            cache = CapturedCache(passes)
        cache.reserve(prompt_length, num_positions)
        return cache

    def run_layers(self, cache: KVCache, hidden: Tensor, first: int, last: int) -> Tensor:
        num_rows, width, _ = hidden.shape
        if not isinstance(cache, CapturedCache):
            return super().run_layers(cache, hidden, first, last)
        cache.check()
        if width > _WIDEST or not self.decodes_by_kernels(cache, self.layers[first:last]):
            return super().run_layers(cache, hidden, first, last)
        shape = padded(num_rows), padded(width)
        replay = cache.passes.capture(self, first, last, *shape)
        states, positions = cache.passes.inputs[shape]
        if shape != (num_rows, width):
            positions.fill_(-1)
        states[:num_rows, :width] = hidden
        positions[:num_rows, :width] = cache.positions(first, width, positions.device)
        cache.extend(first, last, width)
        replay()
        return states[:num_rows, :width].clone()

    def capture(
        self, cache: KVCache, passes: Iterable[PassRange], num_rows: int, num_positions: int, longest: int
    ) -> None:
        assert isinstance(cache, CapturedCache)
        passes, captured = [*passes], cache.passes
        shapes = [
            (runner, first, last, rows, width)
            for runner, first, last, widest in passes
            for rows in _powers(num_rows)
            for width in _powers(min(widest, _WIDEST))
        ]
        logits = num_rows * max(widest for *_, widest in passes) * self.config.vocab_size
        graphs = sum(_LAYER_BYTES * (last - first) for _, first, last, *_ in shapes)
        free = free_memory(self.device) - graphs - logits * _SAMPLING_BYTES
        fitting = int(_SHARE * free / captured.bytes_of_position) // _STEP * _STEP
        cache.reserve(1, max(num_positions, min(longest, fitting)))
        with progress("capturing passes", len(shapes), "passes") as advance:
            for runner, *shape in shapes:
                assert isinstance(runner, CapturedRunner)
                captured.capture(runner, *shape)
                advance(1)


class CapturedCache(KVCache):
    """The cache that captured passes read and write."""

    def __init__(self, passes: CapturedPasses) -> None:
        self.passes, passes.buffers = passes, copy.copy(passes.buffers)
        super().__init__(passes.buffers)

    @property
    def is_valid(self) -> bool:
        return self.passes.buffers is self.buffers

    def check(self) -> None:
        """Raises RuntimeError if a later generation has the cache."""
        if not self.is_valid:
            why = "another generation has this one's cache; let one end before the next begins"
            raise RuntimeError(f"compile True: {why}")

    def reserve(self, prompt_length: int, num_positions: int) -> None:  # noqa: ARG002
        self.check()
        self.passes.reserve(num_positions)


def _powers(most: int) -> Iterable[int]:
    """The powers of two, the last one at least `most`."""
    return (1 << power for power in range(padded(most).bit_length()))


class CapturedPasses:
    """Captured passes of a model, and the buffers of the latest `CapturedCache`."""

    def __init__(self, runner: CapturedRunner, num_slots: int) -> None:
        self._tables = AttentionTables(
            runner.model, runner.dtype
        )  # graphs read them, and they only grow here
        self.buffers, self._capacity = Buffers([runner.device] * len(runner.layers), num_slots), 0
        self._keys = self._tables.like.new_empty(1, *runner.key_shape)  # of a position
        self.bytes_of_position = 2 * num_slots * len(runner.layers) * self._keys.nbytes
        self._drop_replays()
        self.inputs: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # [B, T, H] states, [B, T] positions

    def _drop_replays(self) -> None:
        """All graphs of a stream use one cuBLAS workspace. Destroying one of them frees it (pytorch issue
        193402), and an exception may keep one for long. So all go together, and the stream with them.
        """
        # By copies, first and last layer, rows and width.
        self.replays: dict[tuple[tuple[weakref.ref, ...], int, int, int, int], Replay] = {}
        self._recorder: GraphRecorder | None = None  # frees its stream first
        self._recorder = GraphRecorder(self._tables.device)

    def reserve(self, num_positions: int) -> None:
        """Make room for so many positions. A larger cache ends all captured passes."""
        if num_positions > self._capacity:
            self._drop_replays()
            needed = self.buffers.capacity = round_up(num_positions, _STEP)
            self._tables.reserve(needed)
            for layer in range(self.buffers.num_layers):
                self.buffers.with_room(layer, needed, self._keys)
            self._capacity = needed

    def capture(self, runner: CapturedRunner, first: int, last: int, rows: int, width: int) -> Replay:
        """The replay of a pass over `inputs[rows, width]`. If one fails, all are captured anew."""
        key = (runner.copies, first, last, rows, width)
        if key not in self.replays:
            if (rows, width) not in self.inputs:
                states = self._tables.like.new_empty(rows, width, runner.config.hidden_size)
                self.inputs[rows, width] = states, torch.empty_like(states[..., 0], dtype=torch.long)
            states, positions = self.inputs[rows, width]
            states.zero_()
            positions.fill_(-1)
            layers = runner.typed_layers(first, last)
            assert self._recorder is not None
            try:
                self.replays[key] = self._recorder(partial(self._run, layers, states, positions))
            except BaseException:
                self._drop_replays()
                raise
        return self.replays[key]

    def _run(self, layers: Sequence[tuple[Any, AttentionType]], states: Tensor, positions: Tensor) -> None:
        """The pass that is captured."""
        make = partial(DecodeContext, self._tables, self.buffers.of_layers, positions)
        states.copy_(run_through(layers, make, states))  # fused layers work in place: then nothing is copied
