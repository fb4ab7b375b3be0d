"""Narrow passes over one row on a CPU as single calls of TorchScript.

The products of a narrow pass are surrounded by hundreds of small operations, which cost Python more time than
the processor. One fused layer is traced with widths and lengths as sizes of its inputs, so one graph serves
every step and every layer like it; a range is one call of these graphs, one after the other. Weights, or
copies of them, are attributes. Changed ones get another call with the same graphs, which are valid for all
weights of these shapes. TorchScript is in maintenance mode: only this module uses it.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from self_speculation.model.attention_context import AttentionContext
from self_speculation.model.families import AttentionType
from self_speculation.model.fingerprint import structure
from self_speculation.model.fused_layers import FusedLayer
from self_speculation.model.int4_linear import Int4Linear
from self_speculation.model.kv_cache import Appendable, KVCache, SeenFrom
from self_speculation.model.linear import NARROW, Float16Linear, Linear
from self_speculation.model.made import state
from self_speculation.model.model_runner import ModelRunner

# Passes of a range before it is traced: tracing pays back after about six.
_PASSES_BEFORE = 4
# Traces of a model. TorchScript never frees a graph: a tenth of a megabyte for each layer.
_TRACES_AT_MOST = 128

# Of all models, since `torch.jit.trace` has global variables. Its owner takes no model's lock.
_TRACING = Lock()


@dataclass
class _Trace:
    """A range of fused layers as one call."""

    graph: torch.jit.ScriptModule  # calls those of the layers
    layers: list[torch.jit.ScriptModule]  # without weights
    constants: list[Hashable]  # that they are valid for
    # The same with weights. Nothing in it changes, since other threads may run it.
    bound: torch.jit.ScriptModule | None = None
    reads: list[Any] = field(default_factory=list)  # what these weights belong to

    def with_weights(self, layers: Sequence[FusedLayer], reads: list[Any]) -> torch.jit.ScriptModule:
        """A call over the weights of these layers, by the same graphs."""
        if self.bound is None or self.reads != reads:
            self.bound = _with(self.graph, _named(map(_with, self.layers, map(_parts, layers))))
            self.reads = reads
        return self.bound


@dataclass
class _Traces:
    """Of one model; by range, width and format."""

    passes_before: float = _PASSES_BEFORE
    num_made: int = 0  # including those that were replaced
    made: dict[Hashable, _Trace] = field(default_factory=dict)
    of_layers: dict[Hashable, torch.jit.ScriptModule] = field(default_factory=dict)  # without weights
    num_passes: Counter[Hashable] = field(default_factory=Counter)  # that ran without a trace

    def has(self, kind: Hashable, constants: list[Hashable]) -> bool:
        trace = self.made.get(kind)
        return trace is not None and trace.constants == constants


def trace_after(model: PreTrainedModel, num_passes: float) -> None:
    """Trace a range after so many passes: 0 for measurements, which warm up."""
    state(model, _Traces).passes_before = num_passes


def num_traces(model: PreTrainedModel) -> int:
    """Traces made so far. A pass that makes one takes ten times as long."""
    return state(model, _Traces).num_made


class TracedRunner(ModelRunner):
    """Runs passes over at most NARROW tokens of one row by traced layers, all others as `ModelRunner`."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._found: dict[Hashable, Callable[..., Tensor]] = {}  # traces of this generation
        linears = _linears([layer for layer in self.layers if isinstance(layer, FusedLayer)])
        current = {id(part) for linear in linears for part in (linear, *[*linear.copies.values()])}
        with _TRACING:
            for trace in state(self.model, _Traces).made.values():
                if not all(id(part) in current for part in trace.reads):  # free weights that have changed
                    trace.bound, trace.reads = None, []

    def with_layers(self, layers: list[Any], head: Callable[[Tensor], Tensor]) -> ModelRunner:
        other: Any = super().with_layers(layers, head)
        other._found = {}
        return other

    def run_layers(self, cache: KVCache, hidden: Tensor, first: int, last: int) -> Tensor:
        rows, width, _ = hidden.shape
        if rows > 1 or width > NARROW or cache.length(first) == 0:
            return super().run_layers(cache, hidden, first, last)
        key = (first, last, width)
        if key not in self._found and not self._find(key, cache, hidden):
            return super().run_layers(cache, hidden, first, last)
        with torch.jit.optimized_execution(False):  # it gains nothing and makes two runs slow
            states = self._found[key](hidden[0], *self._inputs(cache, first, last, width))
        cache.advance(first, last, width)
        return states[None]

    def _find(self, key: tuple[int, int, int], cache: KVCache, hidden: Tensor) -> bool:
        """Get a trace of this range, or make one if it has run often enough. One trace is for a single token,
        one for all other widths.
        """
        first, last, width = key
        layers: list[Any] = self.layers[first:last]
        if not all(_can_be_traced(layer, index, width) for index, layer in enumerate(layers, first)):
            return False
        linears, traces = _linears(layers), state(self.model, _Traces)
        kind = (first, last, width == 1, type(linears[0]))
        if kind not in traces.made:  # to compare constants of all layers takes most of a millisecond
            traces.num_passes[kind] += 1
            if traces.num_passes[kind] <= traces.passes_before or traces.num_made >= _TRACES_AT_MOST:
                return False
        reads = [part for linear in linears for part in (linear, linear.packed_copy) if part is not None]
        attention = self.attention_types[first:last]
        pairs = zip(layers, attention, strict=True)
        constants = [_constants(layer, of_layer, self.dtype) for layer, of_layer in pairs]
        with _TRACING:
            if not traces.has(kind, constants):  # another thread may have made it meanwhile
                if traces.num_made >= _TRACES_AT_MOST:
                    return False
                traces.num_made += 1
                traces.made[kind] = self._trace(cache, layers, constants, hidden, first)
            self._found[key] = traces.made[kind].with_weights(layers, reads)
        return True

    def _trace(
        self, cache: KVCache, layers: list[Any], constants: list[Hashable], hidden: Tensor, first: int
    ) -> _Trace:
        width, graphs = hidden.shape[1], state(self.model, _Traces).of_layers
        attention = self.attention_types[first : first + len(layers)]
        inputs = (hidden[0].clone(), *self._inputs(cache, first, first + len(layers), width))
        # Sizes that become constants are those of the model. `catch_warnings` is not for threads: one could
        # leave the filters of another one in place for ever.
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning, module=r"self_speculation\.")
        warnings.filterwarnings("ignore", r"`torch\.jit\.trace", DeprecationWarning)
        with torch.jit.optimized_execution(False):
            for index, (layer, own) in enumerate(zip(layers, constants, strict=True), first):
                if (own, width == 1) not in graphs:
                    alone = (hidden[0].clone(), *self._inputs(cache, index, index + 1, width))
                    graph = torch.jit.trace(_Layer(layer, attention[index - first]), alone, check_trace=False)
                    graphs[own, width == 1] = _with(graph, _without_weights(layer))
            of_layers = [graphs[own, width == 1] for own in constants]
            called = _Range([*map(_with, of_layers, map(_parts, layers))], attention)
            graph = torch.jit.trace(called, inputs, check_trace=False)
        return _Trace(_with(graph, _named(of_layers)), of_layers, constants)

    def _inputs(self, cache: KVCache, first: int, last: int, width: int) -> list[Any]:
        """Inputs of a range's graph after the hidden states."""
        past = self.rotary.new_empty(cache.length(first), 0)
        inputs: list[Any] = [past]
        for kind in dict.fromkeys(self.attention_types[first:last]):
            context = AttentionContext.uniform(self, kind, 1, len(past), width)
            mask = context.mask(self.layers[first].groups)
            inputs += context.rotations, past if mask is None else mask, past[: context.first_key]
        return [*inputs, *(part for pair in cache.with_room(first, last, width) for part in pair)]


def _linears(layers: Sequence[FusedLayer]) -> list[Any]:
    return [linear for layer in layers for linear in layer.linears]


def _can_be_traced(layer: Any, index: int, width: int) -> bool:
    """Whether it is a fused layer, at its own index, over copies that TorchScript takes."""
    return (
        isinstance(layer, FusedLayer)
        and layer.index == index
        and all(isinstance(linear, Linear | Int4Linear) for linear in layer.linears)
        and not any(linear.is_packed(width) for linear in layer.linears if isinstance(linear, Linear))
    )


def _parts(layer: FusedLayer) -> dict[str, Any]:
    """All that a pass over this layer reads, by its attribute of the graph."""
    copies = [linear.packed_copy for linear in layer.linears]
    packed = [piece for copy in copies if isinstance(copy, Float16Linear) for piece in copy.packed]
    return {f"part{index}": part for index, part in enumerate((*layer.tensors(), *packed))}


def _without_weights(layer: FusedLayer) -> dict[str, Any]:
    """A placeholder for each part."""
    no_weight, not_packed = torch.empty(0), Float16Linear(torch.zeros(1, 1)).packed[0]
    parts = _parts(layer).items()
    return {name: no_weight if isinstance(part, Tensor) else not_packed for name, part in parts}


def _named(layers: Iterable[torch.jit.ScriptModule]) -> dict[str, Any]:
    """Graphs of layers, by their attributes of a range's graph."""
    return {f"layer{index}": layer for index, layer in enumerate(layers)}


def _with(graph: torch.jit.ScriptModule, attributes: Mapping[str, Any]) -> torch.jit.ScriptModule:
    """The same graph with other attributes."""
    other = torch.jit._recursive.wrap_cpp_module(copy.copy(graph._c))
    for name, value in attributes.items():
        setattr(other, name, value)
    return other


def _constants(layer: FusedLayer, attention: AttentionType, dtype: torch.dtype) -> Hashable:
    """Equal only if one graph serves both layers, over hidden states of this dtype."""
    parts = _parts(layer).values()
    values = [value for name, value in vars(layer).items() if name != "index"]
    numbers = [value for value in values if isinstance(value, int | float)]
    # Each layer has an activation of its own: they are alike if all but the modules' `id` is.
    methods: list[Any] = [value for value in values if isinstance(value, MethodType)]
    activations = [(m.__func__, *(each[1:] for each in structure(m.__self__))) for m in methods]
    shapes = [(t.shape, t.stride(), t.dtype) for t in parts if isinstance(t, Tensor)]
    first: dict[int, int] = {}  # a part that is read twice is one attribute in the graph
    which = [first.setdefault(id(part), index) for index, part in enumerate(parts)]
    return dtype, attention, tuple(numbers), tuple(activations), tuple(shapes), tuple(which)


class _Layer(nn.Module):
    """A fused layer as a function of tensors."""

    def __init__(self, layer: FusedLayer, attention: AttentionType) -> None:
        super().__init__()
        self._layer, self._attention = layer, attention
        # TorchScript never frees the constants of a graph: weights must be attributes.
        for name, part in _parts(layer).items():
            if isinstance(part, Tensor):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, hidden: Tensor, past: Tensor, *others: Tensor) -> Tensor:
        """[T, H] -> [T, H]; see `_Range`. Sizes are traced, except that of a single token."""
        rotations, mask, before, keys, values = others
        width = 1 if len(rotations) == 1 else rotations.shape[0]
        of_width = None if width == 1 else mask
        context = AttentionContext(1, width, lambda _: of_width, rotations, first_key=before.shape[0])
        cache = _Cache(keys, values, past)
        seen = cache if self._attention.window is None else SeenFrom(cache, context.first_key)
        return self._layer(hidden, context, seen)


class _Range(nn.Module):
    """Calls of layers one after the other.

    Args:
        layers: graphs of `_Layer`.
        attention: of each.
    """

    def __init__(self, layers: Sequence[torch.jit.ScriptModule], attention: Sequence[AttentionType]) -> None:
        super().__init__()
        self._attention = attention
        for name, layer in _named(layers).items():
            setattr(self, name, layer)

    def forward(self, hidden: Tensor, past: Tensor, *others: Tensor) -> Tensor:
        """[T, H] -> [T, H]; keys and values are in the buffers.

        Args:
            past: [start, 0]: its size is the number of positions before these.
            others: for each type of attention, rotations [T, head_dim, head_dim], see `AttentionContext`,
                mask [G * T, S], not read if T is 1, and [first_key, 0]; then keys and values of each layer,
                [1 or more, kv_heads, capacity, head_dim].
        """
        inputs = iter(others)
        contexts = {kind: [*itertools.islice(inputs, 3)] for kind in dict.fromkeys(self._attention)}
        for layer, kind in zip(self.children(), self._attention, strict=True):
            hidden = layer(hidden, past, *contexts[kind], next(inputs), next(inputs))
        return hidden


class _Cache(Appendable):
    """Buffers of one layer that hold `start` positions, the size of `past` [start, 0]."""

    def __init__(self, keys: Tensor, values: Tensor, past: Tensor) -> None:
        self._buffers, self._past = (keys, values), past
        self.one_row = keys, values, past

    def append(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        start = self._past.shape[0]
        end = start + keys.shape[0]
        for buffer, new in zip(self._buffers, (keys, values), strict=True):
            buffer[0, :, start:end].copy_(new.transpose(0, 1))
        all_keys, all_values = (buffer[0, :, :end].unsqueeze(1) for buffer in self._buffers)
        return all_keys, all_values
