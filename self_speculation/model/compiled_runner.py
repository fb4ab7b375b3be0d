"""Decoding with compiled passes: static shapes, one compilation for all prompts, CUDA graphs on a GPU.

The passes are those of `ModelRunner`, over a cache of fixed size. Positions are inputs: they say where keys
and values are written and what is masked, so a pass does not depend on the length of the output.

Widths are padded to powers of two. The padding is written after the last position, where it is masked and
later overwritten.

Each batch size has passes of its own, over as many rows as the batch may have; results of missing rows are
discarded. Passes of one batch size share one cache, and so serve one generation at a time; another one that
goes on raises an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel

from self_speculation.model.attention_context import AttentionContext
from self_speculation.model.families import context_length
from self_speculation.model.fused_layers import Fused, activation_dtype
from self_speculation.model.kv_cache import ALIGNMENT, StaticKVCache, WrittenAt, round_up
from self_speculation.model.model_runner import ForwardResult, ModelRunner
from self_speculation.model.traced_runner import TracedRunner

# The cache holds at least so many positions, and twice as many whenever a generation needs more.
_SMALLEST_CAPACITY = 1024

# Positions after the last one, for padding; of no longer drafts the capacity does not depend.
_ROOM = 64

# Every range of layers and width is a pass of its own, and a sweep has hundreds; the compiler's own limits
# are 8, and 256 of all programs together.
_PASSES_AT_MOST = 4096

# A pass is compiled when it runs first and recorded when it runs again; from then on it is replayed.
RUNS_TO_WARM_UP = 3


# Of each model that is to be compiled, its passes by the rows of their batch.
_PASSES: WeakKeyDictionary[nn.Module, dict[int, Passes]] = WeakKeyDictionary()


def compile_decoding(model: PreTrainedModel) -> None:
    """From now on `make_runner` compiles for this model. The first passes take from seconds to minutes.

    Raises:
        ValueError: there is no compiler, or weights in 16 bits are multiplied in float32.
    """
    if activation_dtype(model) != model.dtype:
        raise ValueError("compile True: not with weights in 16 bits that are multiplied in float32")
    from torch._inductor.cpp_builder import get_cpp_compiler  # slow to import
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ValueError("compile True: needs a C++ compiler, such as g++, and there is none") from error
    compiler = torch._dynamo.config
    compiler.recompile_limit = max(compiler.recompile_limit, _PASSES_AT_MOST)
    compiler.accumulated_recompile_limit = max(compiler.accumulated_recompile_limit, _PASSES_AT_MOST)
    compiler.skip_nnmodule_hook_guards = False  # or hooks that are put on later would be passed over
    _PASSES[model] = {}


def decode_eagerly(model: PreTrainedModel) -> None:
    """From now on nothing is compiled for this model."""
    _PASSES.pop(model, None)


def is_compiled(model: PreTrainedModel) -> bool:
    """Whether `make_runner` compiles for it."""
    return model in _PASSES


def make_runner(
    model: PreTrainedModel, prompt_length: int, num_positions: int, max_width: int = 1, num_rows: int = 1
) -> ModelRunner:
    """The decoder of one generation, or of one batch.

    Args:
        model, prompt_length, num_positions, num_rows: as for `ModelRunner`.
        max_width: the most tokens that a pass after the prompt is given, of each row.
    """
    if not is_compiled(model):
        return TracedRunner(model, prompt_length, num_positions, num_rows)
    return CompiledRunner(model, prompt_length, num_positions, max_width, num_rows)


class CompiledRunner(ModelRunner):
    """Runs passes over at most `max_width` tokens compiled; those of a prompt as `ModelRunner`."""

    _passes: Passes | None = None
    _layers_of: CompiledRunner | None = None  # whose passes this one's are, up to another head

    def __init__(
        self, model: PreTrainedModel, prompt_length: int, num_positions: int, max_width: int, num_rows: int
    ) -> None:
        super().__init__(model, prompt_length, num_positions, num_rows)
        self._max_width = max_width
        self._generation = object()
        self._use(self._find_passes(num_positions))
        self.cache.clear()

    def reserve(self, prompt_length: int, num_positions: int) -> None:
        """See `ModelRunner`. If the static cache is too small, its content moves to a larger one."""
        if self._passes is None:
            super().reserve(prompt_length, num_positions)
            return
        self._rotary.reserve(num_positions)
        self._check_turn(self._passes)
        if (larger := self._find_passes(num_positions)) is not self._passes:
            larger.cache.take_over(self._passes.cache)
            self._use(larger)

    def for_row(self, row: int, length: int = 0) -> ModelRunner:
        """See `ModelRunner`. Nothing is compiled for it: passes go by the cache of all rows."""
        other = super().for_row(row, length)
        assert isinstance(other, CompiledRunner)
        other._passes = None
        return other

    def _find_passes(self, num_positions: int) -> Passes:
        """The passes of this batch size; new ones where the model has changed, or where their cache has no
        room for so many positions and padding.
        """
        made, room = _PASSES[self.model], max(padded(self._max_width), _ROOM)
        num_positions = min(num_positions, context_length(self.config))  # beyond it there is padding alone
        passes = made.get(self._num_rows)
        if (
            passes is None
            or passes.valid_for != self.fingerprint
            or num_positions + room > passes.cache.capacity
        ):
            most = round_up(context_length(self.config) + room, ALIGNMENT)
            capacity = min(max(_SMALLEST_CAPACITY, padded(num_positions + room)), most)
            made.pop(self._num_rows, None)  # so that there is room for the next
            made[self._num_rows] = Passes(ModelRunner(self.model, 1, capacity), capacity, self._num_rows)
        return made[self._num_rows]

    def _use(self, passes: Passes) -> None:
        self._passes, self.cache, passes.generation = passes, passes.cache, self._generation

    def _check_turn(self, passes: Passes) -> None:
        if passes.generation is not self._generation:
            raise RuntimeError(
                "compile True: another generation has this one's cache; let one end before the next begins"
            )

    @property
    def has_its_cache(self) -> bool:
        return self._passes is None or self._passes.generation is self._generation

    def remove_row(self, row: int, damaged: bool, keep: bool) -> None:
        """See `ModelRunner`. Where another generation has the cache by now, the row is in there no more."""
        if self.has_its_cache:
            super().remove_row(row, damaged, keep)

    def over(self, layers: list, head: Callable[[Tensor], Tensor]) -> ModelRunner:
        """See `ModelRunner`. What is compiled is this model's own layers; another head is not."""
        if layers is not self.layers:
            raise ValueError("draft_weights: no copies of layers with compile True")
        other = super().over(layers, head)
        assert isinstance(other, CompiledRunner)
        other._layers_of = self
        return other

    def run(self, inputs: Tensor, first: int, last: int, num_logits: int) -> ForwardResult:
        if self._layers_of is not None:
            hidden = self._layers_of.run(inputs, first, last, 0).hidden
            return ForwardResult(self.logits(hidden, num_logits), hidden)
        width = inputs.shape[1]
        # A prompt's passes read no logits, or those of the last position.
        of_prompt = width > 1 and not num_logits == width <= self._max_width
        if self._passes is not None:
            self._check_turn(self._passes)
        if self._passes is None or of_prompt:
            return super().run(inputs, first, last, num_logits)
        return self._passes(inputs, first, last, num_logits > 0)


def padded(width: int) -> int:
    """To the next power of two."""
    return 1 << (width - 1).bit_length()


# inputs ([B, T] ids or [B, T, H] states) and positions [B, T] -> logits [B, T or 0, V], hidden [B, T, H]
Pass = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Passes:
    """Compiled passes of one model over one static cache, by a decoder that is theirs from now on."""

    def __init__(self, runner: ModelRunner, capacity: int, num_rows: int) -> None:
        self._runner, self._num_rows = runner, num_rows
        del runner.model  # which these passes are kept for: it would never be freed
        self.valid_for = runner.fingerprint
        self.generation: object = None  # whose keys and values the cache holds
        config, like = runner.config, runner.rotary
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        like = like.new_empty(num_rows, config.num_key_value_heads, head_dim)
        self.cache = StaticKVCache(len(runner.layers), capacity, like)
        self._compiled: dict[tuple[int, int, bool], Pass] = {}
        # CUDA graphs copy their inputs before each replay, but for those that stay where they are. Weights of
        # modules are known to.
        fused = [part for part in (*runner.layers, runner.head) if isinstance(part, Fused)]
        of_parts = (tensor for part in fused for tensor in part.tensors())
        in_cache = (part for pair in self.cache.buffers.of_layers for part in pair or ())
        for tensor in (runner.rotary, *of_parts, *in_cache):
            torch._dynamo.mark_static_address(tensor)

    def __call__(self, inputs: Tensor, first: int, last: int, reads_logits: bool) -> ForwardResult:
        """See `ModelRunner.run`. The logits, of all T positions or of none, are valid until the next pass."""
        key, (rows, width) = (first, last, reads_logits), inputs.shape[:2]
        if key not in self._compiled:
            self._compiled[key] = self._compile(*key)
        positions = self.cache.positions(first, padded(width), inputs.device)
        inputs = _filled(inputs, self._num_rows, padded(width))
        # Rows that there are not are written where there is never anything but padding.
        positions = _filled(positions, self._num_rows, padded(width), self.cache.capacity - 1)
        logits, hidden = self._compiled[key](inputs, positions)
        self.cache.advance(first, last, width)
        # A CUDA graph writes to the same place when it runs again; hidden states are kept until then.
        return ForwardResult(logits[:rows, :width], hidden[:rows, :width].clone())

    def _compile(self, first: int, last: int, reads_logits: bool) -> Pass:
        runner, buffers, capacity = self._runner, self.cache.buffers.of_layers, self.cache.capacity

        def run(inputs: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
            rows, width = positions.shape
            context = AttentionContext.ragged(runner, positions, capacity, is_compiled=True)
            cache = WrittenAt(buffers, positions, capacity)
            states = (inputs.clone() if first else runner.embed(inputs)).flatten(0, 1)  # [B * T, H]
            for layer in runner.layers[first:last]:
                states = layer(states, context, cache)
            hidden = states.view(rows, width, -1)
            return runner.logits(hidden, width if reads_logits else 0), hidden

        mode = "reduce-overhead" if runner.rotary.device.type == "cuda" else "default"
        return torch.compile(run, fullgraph=True, dynamic=False, mode=mode)


def _filled(inputs: Tensor, rows: int, width: int, value: int = 0) -> Tensor:
    """[b, t, ...] -> [rows, width, ...], with `value` after what there is. Always of the same strides."""
    missing = (rows - inputs.shape[0], width - inputs.shape[1])
    if not any(missing):  # what has one row passes for contiguous, whatever the stride from row to row
        strides = [math.prod(inputs.shape[i + 1 :]) for i in range(inputs.dim())]
        return inputs.contiguous().as_strided(inputs.shape, strides)
    return pad(inputs, (*(0, 0) * (inputs.dim() - 2), 0, missing[1], 0, missing[0]), value=value)
