"""Weights in fewer bits than a checkpoint's: copies of layers in four bits, for cheap drafts, and `quantize`,
which rounds the model itself.

A copy of a layer that is not fused is transformers' own layer with other products in place of each
`nn.Linear`. Each copy stays with the `Linear` that it was made of.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from self_speculation.config import DraftWeights
from self_speculation.devices import free_memory
from self_speculation.model_cache import lock
from self_speculation.passes.fused_layers import FusedHead, plain_linear
from self_speculation.passes.model_runner import (
    Layer,
    ModelRunner,
    PlainHead,
    PlainLayer,
    forward_early,
)
from self_speculation.passes.unsupported_hooks import difference
from self_speculation.progress import progress
from self_speculation.threads import most_threads, one_thread
from self_speculation.weights.experts import experts_per_token
from self_speculation.weights.few_bits import FewBitsLinear, eight_bits, mean_bytes_per_weight
from self_speculation.weights.int4_linear import (
    BYTES_PER_WEIGHT,
    copy_bytes,
    four_bits,
    has_kernel,
    int4_copy,
)
from self_speculation.weights.kernels import cpu_operators
from self_speculation.weights.linear import Linear, Product

# Tokens that the size of inputs is learnt from.
_TOKENS_TO_LEARN = 16

# Logits of a copied head that are computed again. Four bits rarely rank the best one lower.
_COMPUTED_AGAIN = 8

# Weights of fewer bits draft no faster by a copy: in eight bits its gain was 1.01.
_FEWEST_BITS = 10

# Bytes that CUDA reads while torch's kernel multiplies by a weight in four bits. A whole model in four and in
# 16 bits gave 187 and 95 tokens/s (A100, groups of 32; pytorch/ao, pull request 880).
_INT4_ON_CUDA = 2.0 * 95 / 187


def copy_bytes_per_weight(model: PreTrainedModel) -> float:
    """Bytes of each weight of a copy, or those that memory reads in the time of its product.

    Raises ValueError if there are no kernels for copies.
    """
    if not has_kernel(model.device, model.dtype):
        raise ValueError(
            f"draft_weights int4: there are no kernels for it with {model.dtype} on {model.device}"
        )
    return _INT4_ON_CUDA if model.device.type == "cuda" else BYTES_PER_WEIGHT


def why_no_copies(model: PreTrainedModel) -> str | None:
    """None, if copies in four bits take clearly fewer bytes than the model's own layers."""
    bits = 8 * mean_bytes_per_weight(model.base_model.layers[0])
    return None if bits >= _FEWEST_BITS else f"the model's weights take {bits:.1f} bits already"


@torch.no_grad()
def quantize(model: PreTrainedModel, bits: int) -> None:
    """Round the weights of a model on a CPU in place, to four or eight bits; its head to eight.

    Raises:
        ValueError: layers or head with hooks, adapters or quantised weights, or experts; no operators; inputs
            that are not finite, which weigh errors of four bits.
    """
    title, operators = f"quantization int{bits}", cpu_operators()
    if operators.variant is None:
        raise ValueError(f"{title}: there are no operators ({operators.why_not}), which it needs")
    if experts_per_token(model.config) is not None:
        raise ValueError(f"{title}: experts of a {model.config.model_type} model are not rounded")
    runner, head = ModelRunner(model), model.get_output_embeddings()
    _check_plain(runner, runner.layers, title)
    by_linear = _input_squares(runner, runner.layers) if bits == 4 else {}
    squares = {p: by_linear[linear] for linear in by_linear for p in linear.projections}
    found = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    for name, module in found.items():
        if module in squares and not squares[module].isfinite().all():
            why = "weights are not, or numbers do not fit in its dtype: try float32"
            raise ValueError(f"{title}: inputs of {name} in {model.dtype} are not finite: {why}")

    def rounded(module: nn.Linear) -> FewBitsLinear:
        weight, bias = module.weight.data, None if module.bias is None else module.bias.data
        is_whole = bits == 8 or module is head
        made = eight_bits(weight) if is_whole else four_bits(weight, squares[module])
        return FewBitsLinear(made, len(weight), weight.shape[1], bias)

    num_bytes, pool = sum(module.weight.nbytes for module in found.values()), ThreadPoolExecutor
    with progress(title, num_bytes) as advance, pool(torch.get_num_threads()) as threads:
        for (name, module), made in zip(found.items(), threads.map(rounded, found.values()), strict=True):
            model.set_submodule(name, made)
            advance(module.weight.nbytes)


def check_family(draft_weights: DraftWeights, config: PretrainedConfig) -> None:
    """Raises ValueError, before any weight is read, if there are no copies of a model with this config."""
    if draft_weights != "exact" and experts_per_token(config) is not None:
        kind = f"{config.model_type} model: its verifications read more experts than a copy saves"
        raise ValueError(f"draft_weights {draft_weights}: there are no copies of a {kind}; it must be exact")


def quantized(runner: ModelRunner, num_layers: int) -> ModelRunner:
    """A runner of the first layers and the head in four bits. Each copy is made once.

    Raises:
        ValueError: a mixture of experts, layers or head with hooks, adapters or quantised weights, weights
            that a copy hardly makes smaller, no kernels, or no memory for the copies.
    """
    check_family("int4", runner.config)
    if (why := why_no_copies(runner.model)) is not None:
        raise ValueError(f"draft_weights int4: {why}; it must be exact, or the dtype float16")
    layers = runner.layers[:num_layers]
    _check_plain(runner, layers, "draft_weights int4")
    copy_bytes_per_weight(runner.model)  # raises ValueError without kernels
    linears = [linear for layer in layers for linear in _linears_of(runner.model, layer).values()]
    head = runner.head
    whole = (
        head.linears[0]
        if isinstance(head, FusedHead)
        else plain_linear(runner.model, runner.model.get_output_embeddings())
    )
    with lock(runner.model):
        _make_copies(runner, layers, [*linears, whole])
        copies = [_with_products(runner.model, layer, lambda linear: linear.copy) for layer in layers]
    return runner.with_layers(copies, CopiedHead(runner.head.norm, whole, whole.copy))


class CopiedHead:
    """Norm and head in four bits, [T, H] -> [T, V].

    The best few logits are computed again by the model's own weights: four bits alone take 1 to 11 % of the
    acceptance.
    """

    def __init__(self, norm: Callable[[Tensor], Tensor], exact: Linear, copied: Product) -> None:
        self.norm, self._exact, self._copied = norm, exact, copied

    def __call__(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden)
        logits = self._copied(normed).to(normed.dtype)
        best = logits.topk(min(_COMPUTED_AGAIN, logits.shape[1]), sorted=False).indices  # [T, m]
        again = torch.bmm(self._exact.rows(best).to(normed), normed[:, :, None])[:, :, 0]
        if (bias := self._exact.bias) is not None:
            again += bias[best].to(normed)
        return logits.scatter_(1, best, again)


def _check_plain(runner: ModelRunner, layers: Iterable[Layer], flag: str) -> None:
    """Raises ValueError if one of these layers, the first ones, or the head is not plain."""
    for name, part in [*((f"layer {i}", layer) for i, layer in enumerate(layers)), ("head", runner.head)]:
        if not isinstance(part, PlainLayer | PlainHead):
            continue  # fused parts are plain
        modules = (part.module,) if isinstance(part, PlainLayer) else part.modules
        if (why := difference(runner.model, *modules)) is not None:
            only = "only layers and a head without hooks, adapters and quantised weights are rounded"
            raise ValueError(f"{flag}: {name}: {why}; {only}")


def _linears_of(model: PreTrainedModel, layer: Layer) -> dict[Hashable, Linear]:
    """A `Linear` for each product of a layer, by the module of a layer of transformers."""
    if not isinstance(layer, PlainLayer):
        return {linear: linear for linear in layer.linears if isinstance(linear, Linear)}
    modules = (module for module in layer.module.modules() if type(module) in (nn.Linear, FewBitsLinear))
    return {module: plain_linear(model, module) for module in modules}


def _with_products(model: PreTrainedModel, layer: Layer, make: Callable[[Linear], Product]) -> Layer:
    """A copy of a layer with `make(linear)` in place of each of its products. All else is its own."""
    products = {module: make(linear) for module, linear in _linears_of(model, layer).items()}
    if isinstance(layer, PlainLayer):
        others = {module: _Product(product) for module, product in products.items()}
        return PlainLayer(_with_modules(layer.module, others), tuple(products.values()))
    other: Any = copy.copy(layer)
    other.linears = tuple(products.values())
    return other


class _Product(nn.Module):
    """A `Linear`, or a copy of one, in place of a `nn.Linear`."""

    def __init__(self, linear: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._linear = linear

    def forward(self, x: Tensor) -> Tensor:
        return self._linear(x.flatten(0, -2)).view(*x.shape[:-1], -1).to(x.dtype)


def _with_modules(module: nn.Module, others: Mapping[Hashable, nn.Module]) -> nn.Module:
    """A copy with some of its modules replaced. It shares all parameters and buffers."""
    if module in others:
        return others[module]
    copied = copy.copy(module)
    copied._modules = {
        name: None if child is None else _with_modules(child, others)
        for name, child in module._modules.items()
    }
    return copied


def _make_copies(runner: ModelRunner, layers: Sequence[Layer], linears: Sequence[Linear]) -> None:
    """The copy of each `Linear` that has none, on all threads."""
    missing = {linear: copy_bytes(linear.shape) for linear in linears if linear.copy is None}
    if not missing:
        return
    num_bytes = sum(missing.values())
    if num_bytes > (free := free_memory(runner.device)):
        raise ValueError(
            f"draft_weights int4: takes {num_bytes / 2**30:.2f} GiB more than the model, and "
            f"{free / 2**30:.2f} GiB are free; fewer layers (exit_layer) take less"
        )
    squares = _input_squares(runner, layers)

    def make(linear: Linear) -> None:
        linear.copy = int4_copy(linear, squares.get(linear))

    # On a CPU one thread makes each copy, so none waits for another, nor at the end for that of the head.
    num_threads = most_threads(runner.model) if runner.device.type == "cpu" else 1
    largest_first = sorted(missing, key=missing.__getitem__, reverse=True)
    with progress("copies for drafts, int4", num_bytes) as advance, ThreadPoolExecutor(num_threads) as pool:
        for linear, _ in zip(largest_first, pool.map(make, largest_first), strict=True):
            advance(missing[linear])


@torch.no_grad()
def _input_squares(runner: ModelRunner, layers: Sequence[Layer]) -> Mapping[Linear, Tensor]:
    """[in] for every `Linear` of these layers, summed over some tokens.

    Layers decide which inputs are large, more than the text does: tokens from all over the vocabulary show it
    as well as texts, without a tokenizer.
    """
    squares: dict[Linear, Tensor] = {}

    def summing_squares(linear: Linear) -> Product:
        def multiply(x: Tensor) -> Tensor:
            squares[linear] = squares.get(linear, 0) + x.float().square().sum(0)
            return linear(x)

        return multiply

    summed = [_with_products(runner.model, layer, summing_squares) for layer in layers]
    summing = runner.with_layers(summed, runner.head)
    vocabulary = runner.config.vocab_size
    tokens = torch.arange(_TOKENS_TO_LEARN, device=runner.device) * vocabulary // _TOKENS_TO_LEARN
    ids = tokens.view(4, -1).T.reshape(1, -1)  # neighbours are not alike
    cache = ModelRunner.new_cache(summing, _TOKENS_TO_LEARN, _TOKENS_TO_LEARN)  # not that of captured passes
    with one_thread():
        forward_early(summing, cache, ids, len(layers), num_logits=0)
    return squares
