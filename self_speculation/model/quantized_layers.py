"""Weights in fewer bits than a checkpoint's: copies of layers in four bits, for cheap drafts, and `quantize`,
which rounds the model itself.

A copy of a layer that is not fused is transformers' own layer with other products in place of each
`nn.Linear`. A head in four bits costs most agreement, so it is the model's own, unless it is a short one.
Each copy stays with the `Linear` that it was made of, see `Linear.cached_copy`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from self_speculation.config import DraftWeights
from self_speculation.model.attention_context import AttentionContext
from self_speculation.model.devices import free_memory, num_ranks
from self_speculation.model.families import FAMILIES
from self_speculation.model.few_bits import FewBitsLinear, eight_bits, is_in_few_bits, mean_bytes_per_weight
from self_speculation.model.fused_layers import FusedHead, FusedLayer, difference, plain_linear
from self_speculation.model.int4_linear import Int4Linear, four_bits
from self_speculation.model.linear import Linear, has_kernel, replace_linears
from self_speculation.model.model_cache import lock
from self_speculation.model.model_runner import ModelRunner, PlainLayer, forward_early
from self_speculation.model.progress import progress
from self_speculation.model.short_head import ShortHead

# Tokens that the size of inputs is learnt from.
_TOKENS_TO_LEARN = 64

# A copy that takes hardly fewer bytes than the model's own layers drafts no faster.
_CLEARLY_MORE = 1.25

# Bytes that CUDA reads while torch's kernel multiplies by a weight in four bits. A whole model in four and in
# 16 bits gave 187 and 95 tokens/s (A100, groups of 32; pytorch/ao, pull request 880).
_INT4_ON_CUDA = 2.0 * 95 / 187


def bytes_per_weight(model: PreTrainedModel, draft_weights: DraftWeights) -> tuple[float, float]:
    """Bytes by weight of a draft's layers, and of its head, that memory reads in the time of its products.
    Raises ValueError if there are no kernels for layers in four bits.
    """
    own = mean_bytes_per_weight(model.base_model.layers[0])
    of_head = mean_bytes_per_weight(model.get_output_embeddings())
    if draft_weights == "exact":
        return own, of_head
    if not _has_kernel(model.device, model.dtype):
        raise ValueError(
            f"draft_weights int4: there are no kernels for it with {model.dtype} on {model.device}"
        )
    return _INT4_ON_CUDA if model.device.type == "cuda" else Int4Linear.bytes_per_weight, of_head


def _has_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    def copied(weight: Tensor) -> Int4Linear:
        return Int4Linear(Linear(SimpleNamespace(weight=weight, bias=None)))

    return has_kernel(copied, device, dtype)


def copies_are_smaller(model: PreTrainedModel) -> bool:
    """Whether copies in four bits take clearly fewer bytes than the model's own layers."""
    own = mean_bytes_per_weight(model.base_model.layers[0])
    return not is_in_few_bits(model) or own > _CLEARLY_MORE * Int4Linear.bytes_per_weight


@torch.no_grad()
def quantize(model: PreTrainedModel, bits: int) -> None:
    """Round the weights of a model on a CPU in place, to four or eight bits; its head to eight.

    Raises:
        ValueError: layers or head with hooks, adapters or quantised weights, or experts.
    """
    name = f"quantization int{bits}"
    if not FAMILIES[model.config.model_type].has_copies:
        raise ValueError(f"{name}: experts of a {model.config.model_type} model are not rounded")
    runner, head = ModelRunner(model), model.get_output_embeddings()
    layers = [_with_linears(runner, f"layer {i}", part, name) for i, part in enumerate(runner.layers)]
    _with_linears(runner, "head", runner.head, name)
    by_linear = _input_squares(runner, layers) if bits == 4 else {}
    squares = {id(p): by_linear[linear] for linear in by_linear for p in linear.projections}
    found = [
        (parent, child, module)
        for parent in (*model.base_model.layers.modules(), model)
        for child, module in parent.named_children()
        if type(module) is nn.Linear
    ]

    def rounded(found: tuple[nn.Module, str, nn.Linear]) -> FewBitsLinear:
        module, is_whole = found[2], bits == 8 or found[2] is head
        weight, bias = module.weight.data, None if module.bias is None else module.bias.data
        made = eight_bits(weight) if is_whole else four_bits(weight, squares[id(module)])
        return FewBitsLinear(made, len(weight), weight.shape[1], bias)

    num_bytes, pool = sum(module.weight.nbytes for _, _, module in found), ThreadPoolExecutor
    with progress(name, num_bytes) as advance, pool(torch.get_num_threads()) as threads:
        for (parent, child, module), made in zip(found, threads.map(rounded, found), strict=True):
            setattr(parent, child, made)
            advance(module.weight.nbytes)


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
        ValueError: a mixture of experts, layers or head with hooks, adapters or quantised weights, weights
            that a copy hardly makes smaller, no kernels, or no memory for the copies.
    """
    check_family("int4", runner.config)
    if not copies_are_smaller(runner.model):
        own = mean_bytes_per_weight(runner.model.base_model.layers[0])
        raise ValueError(
            f"draft_weights int4: the model's weights take {8 * own:.1f} bits already; it must be exact"
        )
    layers = [_with_linears(runner, f"layer {i}", part) for i, part in enumerate(runner.layers[:num_layers])]
    _with_linears(runner, "head", runner.head)
    bytes_per_weight(runner.model, "int4")  # raises ValueError without kernels
    parts = layers if short_head is None else [*layers, short_head]  # its best few are computed again
    with lock(runner.model):
        copied = _make_copies(runner, layers, [linear for part in parts for linear in part.linears])
    copies = [replace_linears(layer, copied) for layer in layers]
    head = runner.head if short_head is None else replace_linears(short_head, copied)
    return runner.with_layers(copies, head)


def _with_linears(runner: ModelRunner, name: str, part: Any, flag: str = "draft_weights int4") -> Any:
    """A layer or head with a `Linear` for each product. Raises ValueError if it is not plain."""
    if isinstance(part, FusedLayer | FusedHead):
        return part
    modules = (part.module,) if isinstance(part, PlainLayer) else part.modules
    if (why := difference(runner.model, *modules)) is not None:
        only = "only layers and a head without hooks, adapters and quantised weights are rounded"
        raise ValueError(f"{flag}: {name}: {why}; {only}")
    if isinstance(part, PlainLayer):
        return _UnfusedLayer(runner.model, part)
    return FusedHead(part.norm, plain_linear(runner.model, part.modules[1]))


class _UnfusedLayer:
    """A layer of transformers whose `nn.Linear` are replaced; all other modules are its own."""

    def __init__(self, model: PreTrainedModel, layer: PlainLayer) -> None:
        self._layer = layer
        self._replaced = [
            module for module in layer.module.modules() if type(module) in (nn.Linear, FewBitsLinear)
        ]
        self.linears = tuple(plain_linear(model, module) for module in self._replaced)

    @property
    def linears(self) -> tuple[Any, ...]:
        return self._linears

    @linears.setter
    def linears(self, linears: tuple[Any, ...]) -> None:
        self._linears, self._run = linears, copy.copy(self._layer)
        products: dict[nn.Module, nn.Module] = dict(zip(self._replaced, map(_Product, linears), strict=True))
        self._run.module = _with_modules(self._layer.module, products)

    def __call__(self, hidden: Tensor, context: AttentionContext) -> Tensor:
        return self._run(hidden, context)


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
    runner: ModelRunner, layers: Sequence[Any], linears: Sequence[Linear]
) -> Callable[[Linear], Int4Linear]:
    """Make what is missing on all threads. Returns a function that finds the copy of a `Linear`."""
    missing = [linear for linear in linears if Int4Linear not in linear.copies]
    num_bytes = sum(Int4Linear.copy_bytes(linear.shape) for linear in missing)
    if missing and num_bytes > (free := free_memory(runner.device, num_ranks(runner.model))):
        raise ValueError(
            f"draft_weights int4: takes {num_bytes / 2**30:.2f} GiB more than the model, and "
            f"{free / 2**30:.2f} GiB are free; fewer layers (exit_layer) take less"
        )
    squares = _input_squares(runner, layers) if missing else {}

    def copied(linear: Linear) -> Int4Linear:
        return linear.cached_copy(Int4Linear, lambda: Int4Linear(linear, squares.get(linear)))

    # On a CPU one thread makes each copy: our own kernel, or many short operations of torch.
    num_threads = torch.get_num_threads() if runner.device.type == "cpu" else 1
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

    matmul_native = __call__


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
    tokens = torch.arange(_TOKENS_TO_LEARN, device=runner.device) * vocabulary // _TOKENS_TO_LEARN
    ids = tokens.view(16, -1).T.reshape(1, -1)  # neighbours are not alike
    cache = ModelRunner.new_cache(summing, _TOKENS_TO_LEARN, _TOKENS_TO_LEARN)  # not that of captured passes
    forward_early(summing, cache, ids, len(layers), num_logits=0)
    return squares
