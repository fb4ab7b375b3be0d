"""Layers in four bits, made from the model's own: for cheap drafts, never for the target.

A copy of a layer that is not fused is transformers' own layer with other products in place of each
`nn.Linear`. A head in four bits costs most agreement, so it gets more: float16 in a float32 model on a CPU,
else it is the model's own. Each copy stays with the `Linear` that it was made of, see `Linear.cached_copy`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from self_speculation.config import DraftWeights
from self_speculation.model.devices import free_memory, num_ranks
from self_speculation.model.families import FAMILIES
from self_speculation.model.fused_layers import FusedHead, FusedLayer, difference, linears_made, plain_linear
from self_speculation.model.int4_layer import Int4Layer
from self_speculation.model.int4_linear import Int4Linear
from self_speculation.model.kernels import int4_kernel
from self_speculation.model.kv_cache import Appendable
from self_speculation.model.linear import Float16Linear, Linear, replace_linears, works
from self_speculation.model.made import lock
from self_speculation.model.model_runner import ModelRunner, PlainLayer, forward_early
from self_speculation.model.progress import progress
from self_speculation.model.short_head import ShortHead

# Tokens that the size of inputs is learnt from.
_TOKENS_TO_LEARN = 64

# Bytes that CUDA reads while torch's kernel multiplies by a weight in four bits. A whole model in four and in
# 16 bits gave 187 and 95 tokens/s (A100, groups of 32; pytorch/ao, pull request 880).
_INT4_ON_CUDA = 2.0 * 95 / 187

Format = type[Int4Linear] | type[Float16Linear]


def head_format(device: torch.device, dtype: torch.dtype) -> type[Float16Linear] | None:
    """The format of the head beside layers in four bits, for weights of this dtype; None: the model's own.
    Raises ValueError if there are no kernels for layers in four bits.
    """
    if not works(Int4Linear, device, dtype):
        raise ValueError(f"draft_weights int4: there are no kernels for it with {dtype} on {device}")
    has_float16 = device.type == "cpu" and dtype == torch.float32 and works(Float16Linear, device, dtype)
    return Float16Linear if has_float16 else None


def bytes_per_weight(model: PreTrainedModel, draft_weights: DraftWeights) -> tuple[float, float]:
    """Bytes by weight of a draft's layers, and of its head, that memory reads in the time of its products.
    Raises ValueError if there are no kernels for layers in four bits.
    """
    own = float(model.dtype.itemsize)
    if draft_weights == "exact":
        return own, own
    head_kind = head_format(model.device, model.dtype)
    layer_bytes = _INT4_ON_CUDA if model.device.type == "cuda" else Int4Linear.bytes_per_weight
    return layer_bytes, own if head_kind is None else head_kind.bytes_per_weight


def kernel_of_copies(model: PreTrainedModel) -> str | None:
    """What multiplies the copies in four bits that a model has; None without, and on a GPU."""
    has_copies = any(Int4Linear in linear.copies for linear in linears_made(model))
    return str(int4_kernel()) if has_copies and model.device.type == "cpu" else None


def check_family(draft_weights: DraftWeights, config: Any) -> None:
    """Raises ValueError, before any weight is read, if there are no copies of a model with this config."""
    if draft_weights != "exact" and not FAMILIES[config.model_type].has_copies:
        kind = f"{config.model_type} model: its verifications read more experts than a copy saves"
        raise ValueError(f"draft_weights {draft_weights}: there are no copies of a {kind}; it must be exact")


def quantized(runner: ModelRunner, num_layers: int, short_head: ShortHead | None = None) -> ModelRunner:
    """A runner of the first layers in four bits and a head. Each copy is made once.

    Args:
        short_head: replaces the head.

    Raises:
        ValueError: a mixture of experts, layers or head with hooks, adapters or quantised weights, no
            kernels, or no memory for the copies.
    """
    check_family("int4", runner.config)
    layers = [_with_linears(runner, f"layer {i}", part) for i, part in enumerate(runner.layers[:num_layers])]
    head = _with_linears(runner, "head", runner.head)
    head_kind: Format | None = head_format(runner.rotary.device, runner.model.dtype)
    head_kind = head_kind if short_head is None else Int4Linear  # its best few are computed in 16
    formats: dict[Linear, Format] = {linear: Int4Linear for layer in layers for linear in layer.linears}
    head = short_head or head
    formats |= {} if head_kind is None else dict.fromkeys(head.linears, head_kind)
    with lock(runner.model):
        copied = _make_copies(runner, layers, formats)
    copies = [replace_linears(layer, copied) for layer in layers]
    if runner.dtype == torch.float32:  # of activations, as the kernel takes them
        copies = [Int4Layer(layer) if Int4Layer.fits(layer) else layer for layer in copies]
    return runner.with_layers(copies, runner.head if head_kind is None else replace_linears(head, copied))


def _with_linears(runner: ModelRunner, name: str, part: Any) -> Any:
    """A layer or head with a `Linear` for each product. Raises ValueError if it is not plain."""
    if isinstance(part, FusedLayer | FusedHead):
        return part
    modules = (part.module,) if isinstance(part, PlainLayer) else part.modules
    if (why := difference(runner.model, *modules)) is not None:
        only = "only layers and a head without hooks, adapters and quantised weights are copied"
        raise ValueError(f"draft_weights int4: {name}: {why}; {only}")
    if isinstance(part, PlainLayer):
        return _UnfusedLayer(runner.model, part)
    return FusedHead(part.norm, plain_linear(runner.model, part.modules[1]))


class _UnfusedLayer:
    """A layer of transformers whose `nn.Linear` are replaced; all other modules are its own."""

    def __init__(self, model: PreTrainedModel, layer: PlainLayer) -> None:
        self._layer = layer
        self._replaced = [module for module in layer.module.modules() if type(module) is nn.Linear]
        self.linears = tuple(plain_linear(model, module) for module in self._replaced)

    @property
    def linears(self) -> tuple[Any, ...]:
        return self._linears

    @linears.setter
    def linears(self, linears: tuple[Any, ...]) -> None:
        self._linears, self._run = linears, copy.copy(self._layer)
        products: dict[nn.Module, nn.Module] = dict(zip(self._replaced, map(_Product, linears), strict=True))
        self._run.module = _with_modules(self._layer.module, products)

    def __call__(self, hidden: Tensor, context: Any, cache: Appendable) -> Tensor:
        return self._run(hidden, context, cache)


class _Product(nn.Module):
    """A `Linear`, or a copy of one, in place of a `nn.Linear`."""

    def __init__(self, linear: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self._linear(x.flatten(0, -2)).view(*x.shape[:-1], -1)


def _with_modules(module: nn.Module, others: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """A copy with some of its modules replaced. It shares all parameters and buffers."""
    if module in others:
        return others[module]
    copied = copy.copy(module)
    copied._modules = {
        name: None if child is None else _with_modules(child, others)
        for name, child in module._modules.items()
    }
    return copied


def _make_copies(
    runner: ModelRunner, layers: Sequence[Any], formats: Mapping[Linear, Format]
) -> Callable[[Linear], Int4Linear | Float16Linear]:
    """Make what is missing on all threads. Returns a function that finds the copy of a `Linear`."""
    missing = [linear for linear, kind in formats.items() if kind not in linear.copies]
    num_bytes = sum(formats[linear].copy_bytes(linear.shape) for linear in missing)
    if missing and num_bytes > (free := free_memory(runner.rotary.device, num_ranks(runner.model))):
        raise ValueError(
            f"draft_weights int4: takes {num_bytes / 2**30:.2f} GiB more than the model, and "
            f"{free / 2**30:.2f} GiB are free; fewer layers (exit_layer) take less"
        )
    squares = _input_squares(runner, layers) if missing else {}

    def copied(linear: Linear) -> Int4Linear | Float16Linear:
        kind: Any = formats[linear]
        learnt = {"squares": squares.get(linear)} if kind is Int4Linear else {}
        return linear.cached_copy(kind, lambda: kind(linear.weight, bias=linear.bias, **learnt))

    # On a CPU one thread makes each copy: our own kernel, or many short operations of torch.
    num_threads = torch.get_num_threads() if runner.rotary.device.type == "cpu" else 1
    with progress("copies for drafts, int4", num_bytes) as advance, ThreadPoolExecutor(num_threads) as pool:
        for made in pool.map(copied, missing):
            advance(made.num_bytes)
    return copied


class _SquaresSummed:
    """A `Linear` that adds up the squares of its inputs."""

    def __init__(self, squares: MutableMapping[Linear, Tensor], linear: Linear) -> None:
        self._squares, self._linear = squares, linear

    def __call__(self, x: Tensor) -> Tensor:
        sums = x.float().square().sum(0)
        self._squares[self._linear] = self._squares.get(self._linear, 0) + sums
        return self._linear(x)

    matmul_bf16 = __call__


@torch.no_grad()
def _input_squares(runner: ModelRunner, layers: Sequence[Any]) -> Mapping[Linear, Tensor]:
    """[in] for every `Linear` of these layers, summed over some tokens.

    Layers decide which inputs are large, more than the text does: tokens from all over the vocabulary show it
    as well as texts, without a tokenizer.
    """
    squares: dict[Linear, Tensor] = {}
    summed = [replace_linears(layer, partial(_SquaresSummed, squares)) for layer in layers]
    summing = runner.with_layers(summed, runner.head)
    vocabulary = runner.config.vocab_size
    tokens = torch.arange(_TOKENS_TO_LEARN, device=runner.rotary.device) * vocabulary // _TOKENS_TO_LEARN
    ids = tokens.view(16, -1).T.reshape(1, -1)  # neighbours are not alike
    cache = ModelRunner.new_cache(summing, _TOKENS_TO_LEARN, _TOKENS_TO_LEARN)  # not that of captured passes
    forward_early(summing, cache, ids, len(layers), num_logits=0)
    return squares
