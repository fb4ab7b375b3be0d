"""Decoding with compiled passes: static shapes, one compilation for all prompts, CUDA graphs on a GPU.

The passes are those of `Decoder`, traced over a cache of fixed size. Positions are data: they say where keys
and values are written and what is masked, so nothing about a pass depends on how long the output has become.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from self_speculation.model.decoder import Decoder, ForwardResult, StaticSpan, context_length
from self_speculation.model.kv_cache import StaticKVCache, WrittenAt
from self_speculation.model.prepared import prepared

# The cache holds at least so many positions, and twice as many whenever a generation needs more.
_SMALLEST_CAPACITY = 1024

# Every exit layer and draft length is a pass of its own; a sweep has more than the default of eight.
_PASSES_AT_MOST = 1024


def compile_decoding(model: PreTrainedModel) -> None:
    """From now on `make_decoder` compiles for this model. The first passes take from seconds to minutes.

    Raises:
        ValueError: there is no compiler.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler  # slow to import
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ValueError("compile True: needs a C++ compiler, such as g++, and there is none") from error
    prepared(model).passes = {}


def is_compiled(model: PreTrainedModel) -> bool:
    """Whether `make_decoder` compiles for it."""
    return prepared(model).passes is not None


def make_decoder(
    model: PreTrainedModel, prompt_length: int, num_positions: int, max_width: int = 1
) -> Decoder:
    """The decoder of one generation; arguments as `Decoder`."""
    if not is_compiled(model):
        return Decoder(model, prompt_length, num_positions, max_width)
    return CompiledDecoder(model, prompt_length, num_positions, max_width)


class CompiledDecoder(Decoder):
    """Runs passes over one token and over `max_width` hidden states compiled, and all others as `Decoder`."""

    def __init__(
        self, model: PreTrainedModel, prompt_length: int, num_positions: int, max_width: int = 1
    ) -> None:
        super().__init__(model, prompt_length, num_positions, max_width)
        capacity = _SMALLEST_CAPACITY
        while capacity < num_positions:
            capacity *= 2
        capacity = min(capacity, context_length(model.config))
        by_capacity = prepared(model).passes
        assert by_capacity is not None
        if capacity not in by_capacity:
            by_capacity.clear()  # one cache at a time
            by_capacity[capacity] = Passes(Decoder(model, 1, capacity), capacity)
        self._passes = by_capacity[capacity]
        self.cache = self._passes.cache
        self._passes.cache.clear()
        self._max_width = max_width

    def over(self, layers: list, head: Callable[[Tensor], Tensor]) -> Decoder:  # noqa: ARG002
        """What is compiled is this model's own layers."""
        raise ValueError("draft_weights int8: not together with compile True")

    def run(self, inputs: Tensor, first: int, last: int, num_logits: int) -> ForwardResult:
        width = inputs.shape[1]
        if width != (self._max_width if first else 1):
            return super().run(inputs, first, last, num_logits)
        return self._passes(inputs, self.cache.length(first), first, last, num_logits)


class Passes:
    """Compiled passes of one model over one static cache."""

    def __init__(self, decoder: Decoder, capacity: int) -> None:
        self._decoder = decoder
        config, weight = decoder.config, decoder.rotary
        self.cache = StaticKVCache(
            len(decoder.layers), capacity, config.num_key_value_heads, weight.shape[2], weight
        )
        for keys, values in self.cache.buffers:
            torch._dynamo.mark_static_address(keys)
            torch._dynamo.mark_static_address(values)
        self._positions = torch.arange(capacity, device=weight.device)
        self._compiled: dict[tuple[int, int, int], Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {}

    def __call__(self, inputs: Tensor, start: int, first: int, last: int, num_logits: int) -> ForwardResult:
        """See `Decoder.run`; `start` is the position of the first of the inputs."""
        key = (first, last, num_logits)
        if key not in self._compiled:
            self._compiled[key] = self._compile(*key)
        width = inputs.shape[1]
        positions = self._positions[start : start + width]
        with torch._dynamo.config.patch(recompile_limit=_PASSES_AT_MOST):
            # Flat, since the strides of a view of all ids would change from prompt to prompt.
            logits, hidden = self._compiled[key](inputs.flatten(0, 1), positions)
        self.cache.advance(first, last, width)
        # A CUDA graph writes to the same place when it runs again; these are kept until the verification.
        return ForwardResult(logits, hidden.clone())

    def _compile(
        self, first: int, last: int, num_logits: int
    ) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        decoder, buffers, capacity = self._decoder, self.cache.buffers, self.cache.capacity

        def run(inputs: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
            span = StaticSpan(decoder, positions, capacity)
            cache = WrittenAt(buffers, positions)
            hidden = inputs if first else decoder.embed(inputs)  # [T, H]
            for layer in decoder.layers[first:last]:
                hidden = layer(hidden, span, cache)
            return decoder.logits(hidden[None], num_logits), hidden[None]

        mode = "reduce-overhead" if self._positions.device.type == "cuda" else "default"
        return torch.compile(run, fullgraph=True, dynamic=False, mode=mode)
