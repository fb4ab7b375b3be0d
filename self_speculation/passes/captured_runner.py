"""Decoding passes captured as CUDA graphs: a replay is one call of the host instead of hundreds.

A pass is a range of layers over so many tokens of so many rows, which reads so many keys. Tokens and rows are
powers of two, and so are keys up to 1,024; beyond, steps are 512 and more, and keys are read in chunks.
Embedding, head and prompts run eagerly. The cache and the inputs stay at one address: positions are an input
and decide where keys are written and what is masked. Padding tokens are written after a row's last token,
padding rows at the end of the cache.

All captured passes of a model share one cache. It serves one generation at a time: the latest one.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import partial
from threading import Lock
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from self_speculation.devices import free_memory, round_up
from self_speculation.families import AttentionType, context_length
from self_speculation.model_cache import cached, evict, lock, peek, singleton
from self_speculation.passes.attention import CHUNK
from self_speculation.passes.attention_context import AttentionContext, AttentionTables
from self_speculation.passes.fused_layers import Settings
from self_speculation.passes.in_place_runner import InPlaceRunner
from self_speculation.passes.kv_cache import Buffers, KVCache, ScatteredCache
from self_speculation.passes.model_runner import Head, Layer, ModelRunner, PassRange, run_through
from self_speculation.progress import progress
from self_speculation.weights.experts import experts_per_token

# The cache grows by so many positions. It has this many positions for padding, so wider passes are eager.
_STEP, _PADDING = 1024, 64
# The fewest keys that a pass may read, and the most that are not split.
_LEAST_KEYS, _UNSPLIT_KEYS = 256, 1024
# Bytes of a graph for each layer: 12 to 17 kernels of some 10 kB.
_LAYER_BYTES = 200_000
_SHARE = 0.9  # of free memory; prompts need the rest
# Bytes by logit of a round while it is sampled by top-p: probabilities, their order, sums in float64, noise
# by integers of 64 bits, and what sorting takes.
_SAMPLING_BYTES = 48
# torch hands out so many streams of a device in turn. Graphs of a stream share a workspace, see
# `_drop_replays`. These are the streams of recorders and their graphs.
_NUM_STREAMS = 32
_STREAMS: WeakKeyDictionary[object, torch.cuda.Stream] = WeakKeyDictionary()
_LOCK = Lock()


def capture_decoding(model: PreTrainedModel) -> None:
    """From now on `make_runner` captures for this model.

    Raises:
        ValueError: the model is on several devices, or a mixture of experts.
    """
    check_can_be_captured(model.config)
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise ValueError("compile True: needs the whole model on one GPU")
    singleton(model, Settings).is_captured = True
    evict(model, _Passes)


def check_can_be_captured(config: PretrainedConfig) -> None:
    """Raises ValueError for quantised weights and for experts, whose kernels depend on what tokens choose."""
    if experts_per_token(config) is not None:
        raise ValueError(f"compile True: not with a mixture of experts ({config.model_type})")
    quantized = getattr(config, "quantization_config", None) or {}
    settings = quantized if isinstance(quantized, dict) else vars(quantized)
    if (method := settings.get("quant_method", "gguf")) != "gguf":  # whose weights are in 16 bits here
        raise ValueError(f"compile True: not with quantised weights ({getattr(method, 'value', method)})")


def is_captured(model: PreTrainedModel) -> bool:
    return singleton(model, Settings).is_captured


def num_captures(model: PreTrainedModel) -> int:
    """Captured passes that are kept now."""
    passes = peek(model, _Passes)
    return len(passes.replays) if passes else 0


class CapturedRunner(ModelRunner):
    """Replays passes over a `CapturedCache`, except prompts and passes over more than _PADDING tokens."""

    copies: tuple[weakref.ref, ...] = ()  # products of copied layers; part of the key of a graph

    def _replace(self, layers: Sequence[Layer], head: Head) -> None:
        if layers is not self.layers:
            self.copies = tuple(weakref.ref(linear) for layer in layers for linear in layer.linears)
        super()._replace(layers, head)

    def new_cache(self, prompt_length: int, num_positions: int, num_slots: int = 1) -> KVCache:
        """The one cache of the model's captured passes; earlier generations lose it."""

        def valid_for(passes: _Passes) -> Hashable:
            return self.parts, passes.num_slots >= num_slots

        with lock(self.model):
            passes = cached(self.model, _Passes, valid_for, lambda: _Passes(self, num_slots))
            cache = CapturedCache(passes)
        cache.reserve(prompt_length, num_positions)
        return cache

    def run_layers(self, cache: KVCache, hidden: Tensor, first: int, last: int) -> Tensor:
        if not isinstance(cache, CapturedCache):
            return super().run_layers(cache, hidden, first, last)
        cache.check()
        num_rows, width, _ = hidden.shape
        if cache.is_prompt or width > _PADDING:
            return super().run_layers(cache, hidden, first, last)
        passes, num_keys = cache.passes, keys_read(max(cache.lengths(first)) + width)
        shape = padded(num_rows), padded(width)
        replay = passes.capture(self, first, last, *shape, num_keys)
        states, positions = passes.inputs[shape]
        if states.shape[:2] != (num_rows, width):
            states.zero_()  # padding must be numbers: no mask keeps NaN out
            positions.fill_(passes.capacity - 1)
        states[:num_rows, :width] = hidden
        positions[:num_rows] = cache.positions(first, positions.shape[1], positions.device)
        cache.extend(first, last, width)
        replay()
        return states[:num_rows, :width].clone()


class CapturedCache(KVCache):
    """The cache that captured passes read and write."""

    def __init__(self, passes: _Passes) -> None:
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


def make_runner(model: PreTrainedModel) -> ModelRunner:
    """The runner with the least work for the host: captured passes, passes in place, or plain ones."""
    if is_captured(model):
        return CapturedRunner(model)
    return (InPlaceRunner if model.device.type == "cpu" else ModelRunner)(model)


def run_every_pass(
    cache: KVCache, passes: Iterable[PassRange], num_rows: int, num_positions: int, longest: int = 0
) -> None:
    """Capture these passes for up to so many rows and positions, if it is the cache of captured passes.

    Args:
        longest: positions that a later request can reach. The cache has as many of them as fit in memory
            with the graphs for them, so that such a request does not end the captured passes.
    """
    if not isinstance(cache, CapturedCache):
        return
    captured, passes = cache.passes, [*passes]
    kinds = [
        (runner, first, last, rows, width)
        for runner, first, last, max_width in passes
        for rows in _powers(num_rows)
        for width in _powers(min(max_width, _PADDING))
    ]
    shapes = [(*kind, num_keys) for kind in kinds for num_keys in _lengths(num_positions)]
    graph_bytes = _LAYER_BYTES * sum(last - first for _, first, last, *_ in kinds)  # for one number of keys
    logits = num_rows * max(max_width for *_, max_width in passes) * captured.config.vocab_size
    room = _SHARE * free_memory(captured.tables.device) - logits * _SAMPLING_BYTES

    def fits(number: int) -> bool:
        return captured.bytes_of(number + _STEP) + len(_lengths(number)) * graph_bytes <= room

    cache.reserve(1, next(filter(fits, range(longest, num_positions, -_STEP)), num_positions))
    with progress("capturing passes", len(shapes), "passes") as advance:
        for runner, *shape in shapes:
            assert isinstance(runner, CapturedRunner)
            captured.capture(runner, *shape)
            advance(1)


def padded(number: int) -> int:
    """To the next power of two."""
    return 1 << (number - 1).bit_length()


def keys_read(number: int) -> int:
    """Keys that a pass reads where there are so many. Beyond 4,096 steps grow: each is a graph more."""
    if number <= _UNSPLIT_KEYS:
        return padded(max(number, _LEAST_KEYS))
    return round_up(number, max(2 * CHUNK, padded(number) // 8))


def _lengths(num_positions: int) -> Sequence[int]:
    """The numbers of keys that passes over up to so many positions read."""
    return sorted({keys_read(n + 1) for n in range(0, num_positions, _LEAST_KEYS)})


def _powers(most: int) -> Iterable[int]:
    """The powers of two, the last one at least `most`."""
    return (1 << power for power in range(padded(most).bit_length()))


class _Passes:
    """Captured passes of a model, and the buffers of the latest `CapturedCache`."""

    def __init__(self, runner: CapturedRunner, num_slots: int) -> None:
        self.config = config = runner.config
        self.num_slots = num_slots
        self.tables = AttentionTables(runner.model, runner.dtype)  # graphs read them, and they only grow here
        devices = [self.tables.device] * len(runner.layers)
        self.buffers, self.capacity = Buffers(devices, num_slots), 0  # positions of a row
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._like = self.tables.unit.new_empty(1, config.num_key_value_heads, head_dim)  # keys of a position
        self._drop_replays()
        self.inputs: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # [B, T, H] states, [B, T] positions

    def _drop_replays(self) -> None:
        """All graphs of a stream use one cuBLAS workspace. Destroying one of them frees it (pytorch issue
        193402), and an exception may keep one for long. So all go together, and the stream with them.
        """
        # By copies, first and last layer, rows, width and number of keys.
        self.replays: dict[tuple[tuple[weakref.ref, ...], int, int, int, int, int], Callable[[], None]] = {}
        self._recorder: GraphRecorder | None = None  # frees its stream first
        self._recorder = GraphRecorder(self.tables.device)

    def bytes_of(self, num_positions: int) -> int:
        """Of keys and values of so many positions in all slots."""
        return 2 * self.buffers.num_layers * self.num_slots * self._like.nbytes * num_positions

    def reserve(self, num_positions: int) -> None:
        """Make room for so many positions and padding. A larger cache ends all captured passes."""
        # After the context there is padding, or what a wider pass rolls back.
        least = min(num_positions, context_length(self.config)) + _PADDING
        needed = round_up(max(least, num_positions), _STEP)
        if needed <= self.capacity:
            return
        self._drop_replays()
        self.buffers.capacity = needed
        self.tables.reserve(needed)
        for layer in range(self.buffers.num_layers):
            self.buffers.with_room(layer, needed, self._like)
        self.capacity = needed

    def capture(
        self, runner: CapturedRunner, first: int, last: int, rows: int, width: int, num_keys: int
    ) -> Callable[[], None]:
        """The replay of a pass over `inputs[rows, width]`. To capture it writes to padding alone. If that
        fails, all passes are captured anew.
        """
        key = (runner.copies, first, last, rows, width, num_keys)
        if key not in self.replays:
            copies = {copied for copies, *_ in self.replays for copied in copies}
            if any(copied() is None for copied in copies):  # one was replaced, and its graphs are large
                self._drop_replays()
            if (rows, width) not in self.inputs:
                states = self.tables.unit.new_empty(min(rows, self.num_slots), width, self.config.hidden_size)
                self.inputs[rows, width] = states, torch.empty_like(states[..., 0], dtype=torch.long)
            states, positions = self.inputs[rows, width]
            states.zero_()
            positions.fill_(self.capacity - 1)
            layers = [*zip(runner.layers, runner.attention_types, strict=False)][first:last]
            num_keys = min(num_keys, self.capacity)
            assert self._recorder is not None
            try:
                self.replays[key] = self._recorder(partial(self._run, layers, states, positions, num_keys))
            except BaseException:
                self._drop_replays()
                raise
        return self.replays[key]

    def _run(
        self, layers: Sequence[tuple[Layer, AttentionType]], states: Tensor, positions: Tensor, num_keys: int
    ) -> None:
        """The pass that is captured. Its mask hides what is out of a window: positions are data, shapes are
        not.
        """
        cache = ScatteredCache(self.buffers.of_layers, positions, num_keys)
        splits_keys = num_keys > _UNSPLIT_KEYS
        make = partial(AttentionContext, self.tables, cache, 0, states.shape[1], splits_keys=splits_keys)
        hidden = run_through(layers, make, states.flatten(0, 1))
        states.copy_(hidden.view_as(states))  # fused layers work in place: then nothing is copied


class GraphRecorder:
    """Captures functions as CUDA graphs, on one side stream and in one memory pool.

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

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
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
