"""Decoding with compiled passes: static shapes, one compilation for all prompts, CUDA graphs on a GPU.

The passes are those of `Decoder`, traced over a cache of fixed size. Positions are data: they say where keys
and values are written and what is masked, so nothing about a pass depends on how long the output has become.

There are passes of a few widths, powers of two, and tokens between are padded to the next. The padding is
written after the last position, where it is masked, and later overwritten. On a GPU it costs next to
nothing, since a narrow pass takes the time of reading the weights. Where computing takes the time, as on a
CPU, a verification takes up to as much as one of twice as many tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from self_speculation.model.decoder import Decoder, ForwardResult, StaticSpan, round_up
from self_speculation.model.families import context_length
from self_speculation.model.kv_cache import StaticKVCache, WrittenAt
from self_speculation.model.lean_layers import Lean
from self_speculation.model.prepared import prepared

# The cache holds at least so many positions, and twice as many whenever a generation needs more.
_SMALLEST_CAPACITY = 1024

# Positions after the last one, for padding; of no longer drafts the capacity does not depend.
_ROOM = 64

# Every range of layers and width is a pass of its own, and a sweep has hundreds; the compiler's own limits
# are 8, and 256 of all programs together.
_PASSES_AT_MOST = 4096

# A pass is compiled when it runs first and recorded when it runs again; from then on it is replayed.
RUNS_TO_WARM_UP = 3


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
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, _PASSES_AT_MOST)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, _PASSES_AT_MOST)
    prepared(model).passes = {}


def is_compiled(model: PreTrainedModel) -> bool:
    """Whether `make_decoder` compiles for it."""
    return prepared(model).passes is not None


def make_decoder(
    model: PreTrainedModel, prompt_length: int, num_positions: int, max_width: int = 1
) -> Decoder:
    """The decoder of one generation.

    Args:
        model, prompt_length, num_positions: as for `Decoder`.
        max_width: the most tokens that a pass after the prompt is given.
    """
    if not is_compiled(model):
        return Decoder(model, prompt_length, num_positions)
    return CompiledDecoder(model, prompt_length, num_positions, max_width)


class CompiledDecoder(Decoder):
    """Runs passes over at most `max_width` tokens compiled; those of a prompt as `Decoder`."""

    def __init__(
        self, model: PreTrainedModel, prompt_length: int, num_positions: int, max_width: int
    ) -> None:
        super().__init__(model, prompt_length, num_positions)
        self._max_width = max_width
        self._passes = _passes(model, num_positions, max(padded(max_width), _ROOM))
        self.cache = self._passes.cache
        self.cache.clear()

    def over(self, layers: list, head: Callable[[Tensor], Tensor]) -> Decoder:  # noqa: ARG002
        """What is compiled is this model's own layers."""
        raise ValueError("draft_weights int8: not together with compile True")

    def run(self, inputs: Tensor, first: int, last: int, num_logits: int) -> ForwardResult:
        width = inputs.shape[1]
        # A prompt's passes read no logits, or those of the last position.
        if width > 1 and not num_logits == width <= self._max_width:
            return super().run(inputs, first, last, num_logits)
        return self._passes(inputs, self.cache.length(first), first, last, num_logits > 0)


def padded(width: int) -> int:
    """To the next power of two."""
    return 1 << (width - 1).bit_length()


def _passes(model: PreTrainedModel, num_positions: int, room: int) -> Passes:
    """Those there are, unless their cache is too small for so many positions and padding."""
    by_capacity = prepared(model).passes
    assert by_capacity is not None
    if num_positions + room > max(by_capacity, default=0):
        most = round_up(context_length(model.config) + room, 8)
        capacity = min(max(_SMALLEST_CAPACITY, padded(num_positions + room)), most)
        by_capacity.clear()  # one cache at a time
        by_capacity[capacity] = Passes(Decoder(model, 1, capacity), capacity)
    return by_capacity[max(by_capacity)]


# inputs ([T] ids or [T, H] hidden states) and positions [T] -> logits [1, T or 0, V] and hidden [1, T, H]
Pass = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Passes:
    """Compiled passes of one model over one static cache."""

    def __init__(self, decoder: Decoder, capacity: int) -> None:
        self._decoder = decoder
        config, like = decoder.config, decoder.rotary
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.cache = StaticKVCache(len(decoder.layers), capacity, config.num_key_value_heads, head_dim, like)
        self._positions = torch.arange(capacity, device=like.device)
        self._compiled: dict[tuple[int, int, bool], Pass] = {}
        # CUDA graphs copy their inputs before each replay, but for those that stay where they are. Weights of
        # modules are known to.
        lean = [part for part in (*decoder.layers, decoder.head) if isinstance(part, Lean)]
        of_parts = (tensor for part in lean for tensor in part.tensors())
        for tensor in (decoder.rotary, *of_parts, *(part for pair in self.cache.buffers for part in pair)):
            torch._dynamo.mark_static_address(tensor)

    def __call__(
        self, inputs: Tensor, start: int, first: int, last: int, reads_logits: bool
    ) -> ForwardResult:
        """See `Decoder.run`; `start` is the position of the first of the inputs [1, T] or [1, T, H].

        The logits, of all T positions or of none, are valid until the next pass.
        """
        key, width = (first, last, reads_logits), inputs.shape[1]
        if key not in self._compiled:
            self._compiled[key] = self._compile(*key)
        # Without the batch, since the strides of a view of all ids would change from prompt to prompt.
        inputs, padding = inputs[0], padded(width) - width
        if padding:
            inputs = torch.cat((inputs, inputs.new_zeros(padding, *inputs.shape[1:])))
        logits, hidden = self._compiled[key](inputs, self._positions[start : start + width + padding])
        self.cache.advance(first, last, width)
        # A CUDA graph writes to the same place when it runs again; hidden states are kept until then.
        return ForwardResult(logits[:, :width], hidden[:, :width].clone())

    def _compile(self, first: int, last: int, reads_logits: bool) -> Pass:
        decoder, buffers, capacity = self._decoder, self.cache.buffers, self.cache.capacity

        def run(inputs: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
            span = StaticSpan(decoder, positions, capacity)
            cache = WrittenAt(buffers, positions)
            hidden = inputs.clone() if first else decoder.embed(inputs)  # [T, H]
            for layer in decoder.layers[first:last]:
                hidden = layer(hidden, span, cache)
            return decoder.logits(hidden[None], len(positions) if reads_logits else 0), hidden[None]

        mode = "reduce-overhead" if self._positions.device.type == "cuda" else "default"
        return torch.compile(run, fullgraph=True, dynamic=False, mode=mode)
