"""Weights in fewer bits than a checkpoint's: copies of layers in four bits, for cheap drafts, and `quantize`,
which rounds the model itself. Each copy is kept with the parts of the model.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from self_speculation.backends.card_runner import JointLinear
from self_speculation.backends.layers import Head, PlainHead, PlainLayer
from self_speculation.backends.runner import ModelRunner
from self_speculation.backends.runners import eager_runner
from self_speculation.backends.unsupported_hooks import why_not_plain
from self_speculation.config import DraftWeights
from self_speculation.machine.devices import free_memory
from self_speculation.machine.progress import progress
from self_speculation.machine.threads import most_threads, one_thread
from self_speculation.models.families import experts_per_token
from self_speculation.models.model_cache import lock
from self_speculation.weights.few_bits import FewBitsLinear, apply_linear, eight_bits, mean_bytes_per_weight
from self_speculation.weights.int4_linear import (
    BYTES_PER_WEIGHT,
    copy_bytes,
    four_bits,
    has_kernel,
    int4_copy,
)

# Tokens that the size of inputs is learnt from.
_TOKENS_TO_LEARN = 16

# Logits of a copied head that are computed again. Four bits rarely rank the best one lower.
_COMPUTED_AGAIN = 8

# Weights of fewer bits draft no faster by a copy: a copy of eight bits gained 1.01.
_FEWEST_BITS = 10

# Bytes that a GPU reads while torch's kernel multiplies by a weight in four bits. A whole model in four and
# in 16 bits gave 187 and 95 tokens/s (A100, groups of 32; pytorch/ao, pull request 880).
_INT4_ON_A_GPU = 2.0 * 95 / 187


def copy_bytes_per_weight(model: PreTrainedModel) -> float:
    """Bytes per weight of a copy. On a GPU: bytes that memory delivers while the kernel runs."""
    return BYTES_PER_WEIGHT if model.device.type == "cpu" else _INT4_ON_A_GPU


def why_no_copies(model: PreTrainedModel) -> str | None:
    """None, if copies in four bits can be made, and take clearly fewer bytes than the model's layers."""
    if not has_kernel(model.device, model.dtype):
        return f"there are no kernels for it with {model.dtype} on {model.device}"
    bits = 8 * mean_bytes_per_weight(model.base_model.layers[0])
    few = f"the model's weights take {bits:.1f} bits already; with dtype float16 it has copies"
    return None if bits >= _FEWEST_BITS else few


@torch.no_grad()
def quantize(model: PreTrainedModel, bits: int) -> None:
    """Round the weights of a model on a CPU in place, to four or eight bits, for our operators; the head to
    eight.

    Raises:
        ValueError: layers or head with hooks, adapters or quantised weights, or experts; inputs that are not
            finite, which weigh errors of four bits.
    """
    title = f"quantization int{bits}"
    if experts_per_token(model.config) is not None:
        raise ValueError(f"{title}: experts of a {model.config.model_type} model are not rounded")
    runner = eager_runner(model)
    head = model.get_output_embeddings()
    num_layers = len(runner.layers)
    _check_plain(runner, num_layers, title)
    squares = _input_squares(runner, num_layers) if bits == 4 else {}
    found = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    for name, module in found.items():
        if module in squares and not squares[module].isfinite().all():
            why = "weights are not, or numbers do not fit in its dtype: try float32"
            raise ValueError(f"{title}: inputs of {name} in {model.dtype} are not finite: {why}")

    def rounded(module: nn.Linear) -> FewBitsLinear:
        weight = module.weight.data
        bias = None if module.bias is None else module.bias.data
        is_whole = bits == 8 or module is head
        made = eight_bits(weight) if is_whole else four_bits(weight, squares[module])
        return FewBitsLinear(made, len(weight), weight.shape[1], bias)

    num_bytes = sum(module.weight.nbytes for module in found.values())
    num_threads = torch.get_num_threads()
    with progress(title, num_bytes) as advance, ThreadPoolExecutor(num_threads) as threads:
        for (name, module), made in zip(found.items(), threads.map(rounded, found.values()), strict=True):
            model.set_submodule(name, made)
            advance(module.weight.nbytes)


def check_family(draft_weights: DraftWeights, config: PretrainedConfig) -> None:
    """Raises ValueError, before any weight is read, if there are no copies of a model with this config."""
    if draft_weights != "exact" and experts_per_token(config) is not None:
        kind = f"{config.model_type} model: its verifications read more experts than a copy saves"
        raise ValueError(f"draft_weights {draft_weights}: there are no copies of a {kind}; it must be exact")


def int4_draft_runner(runner: ModelRunner, num_layers: int) -> ModelRunner:
    """A runner of the first layers and the head in four bits. Each copy is made once.

    Raises:
        ValueError: a mixture of experts, layers or head with hooks, adapters or quantised weights, weights
            that a copy hardly makes smaller, no kernels, or no memory for the copies.
    """
    check_family("int4", runner.config)
    if (why := why_no_copies(runner.model)) is not None:
        raise ValueError(f"draft_weights int4: {why}")
    _check_plain(runner, num_layers, "draft_weights int4")
    layers = runner.layers[:num_layers]
    head = runner.head
    copies = runner.fused_weights.copies
    with lock(runner.model):
        linears = [*(linear for layer in layers for linear in layer.linears), head.linear]
        _make_copies(runner, num_layers, [linear for linear in linears if linear not in copies])
    copied = [layer.with_linears(copies) for layer in layers]
    draft_runner = runner.with_layers(copied, CopiedHead(head, copies[head.linear]))
    draft_runner.layers_key = "int4"
    return draft_runner


class CopiedHead(Head):
    """Norm and a head in four bits.

    The best few logits are computed again by the model's weights: four bits alone take 1 to 11 % of the
    acceptance.
    """

    def __init__(self, exact: Head, copied: nn.Module) -> None:
        super().__init__(exact.norm, exact.linear)
        self._copied = copied

    def __call__(self, hidden: Tensor) -> Tensor:
        normed = self.norm(hidden)
        linear = self.linear
        logits = self._copied(normed)
        best = logits.topk(min(_COMPUTED_AGAIN, logits.shape[1]), sorted=False).indices  # [T, m]
        is_dense = not isinstance(linear, FewBitsLinear)
        rows = linear.weight[best] if is_dense else linear.rows(best.flatten()).view(*best.shape, -1)
        again = torch.bmm(rows.to(normed), normed[:, :, None])[:, :, 0]
        if linear.bias is not None:
            again += linear.bias[best].to(normed)
        return logits.scatter_(1, best, again)


def _check_plain(runner: ModelRunner, num_layers: int, flag: str) -> None:
    """Raises ValueError if one of the first layers or the head is not plain."""
    layers = runner.layers[:num_layers]
    asked = [
        (f"layer {i}", [layer.module]) for i, layer in enumerate(layers) if isinstance(layer, PlainLayer)
    ]
    if isinstance(runner.head, PlainHead):
        asked.append(("head", [runner.model.base_model.norm, runner.head.linear]))
    for name, modules in asked:
        if (why := why_not_plain(runner.model, *modules)) is not None:
            only = "only layers and a head without hooks, adapters and quantised weights are rounded"
            raise ValueError(f"{flag}: {name}: {why}; {only}")


def _make_copies(runner: ModelRunner, num_layers: int, linears: Sequence[Any]) -> None:
    """Copy each linear module, on all threads."""
    if not linears:
        return
    sizes = {linear: copy_bytes(linear) for linear in linears}
    if (num_bytes := sum(sizes.values())) > (free := free_memory(runner.device)):
        raise ValueError(
            f"draft_weights int4: takes {num_bytes / 2**30:.2f} GiB more than the model, and "
            f"{free / 2**30:.2f} GiB are free; fewer layers (exit_layer) take less"
        )
    squares = _input_squares(runner, num_layers)

    def make(linear: Any) -> None:
        module = linear.modules[0] if isinstance(linear, JointLinear) else linear
        runner.fused_weights.copies[linear] = int4_copy(linear, squares.get(module))

    # On a CPU one thread makes each copy. No thread waits for another, nor at the end for the head's.
    num_threads = most_threads(runner.model) if runner.device.type == "cpu" else 1
    largest_first = sorted(linears, key=sizes.__getitem__, reverse=True)
    with progress("copies for drafts, int4", num_bytes) as advance, ThreadPoolExecutor(num_threads) as pool:
        for linear, _ in zip(largest_first, pool.map(make, largest_first), strict=True):
            advance(sizes[linear])


class _Recorder(nn.Module):
    """In place of a module of a layer: sums the squares of the module's inputs."""

    def __init__(self, module: Any, squares: dict[nn.Module, Tensor]) -> None:
        super().__init__()
        self._replaced = [module]  # a list: `module` is no part of this one
        self._squares = squares

    def forward(self, x: Tensor) -> Tensor:
        (module,) = self._replaced
        self._squares[module] = self._squares.get(module, 0) + x.float().flatten(0, -2).square().sum(0)
        if isinstance(module, FewBitsLinear) or module.weight.dtype == x.dtype:
            return module(x)
        return apply_linear(x.flatten(0, -2), module).view(*x.shape[:-1], -1)


@torch.no_grad()
def _input_squares(runner: ModelRunner, num_layers: int) -> Mapping[nn.Module, Tensor]:
    """[in] for each module that multiplies in the first layers, summed over `_TOKENS_TO_LEARN` tokens.

    Layers decide which inputs are large, more than the text does: tokens from all over the vocabulary show it
    as well as texts, without a tokenizer.
    """
    squares: dict[nn.Module, Tensor] = {}
    layers = [PlainLayer(layer) for layer in runner.model.base_model.layers[:num_layers]]
    recorders = {module: _Recorder(module, squares) for layer in layers for module in layer.linears}
    plain = ModelRunner(runner.model, runner.fused_weights)
    recording = plain.with_layers([layer.with_linears(recorders) for layer in layers], runner.head)
    vocabulary = runner.config.vocab_size
    tokens = torch.arange(_TOKENS_TO_LEARN, device=runner.device) * vocabulary // _TOKENS_TO_LEARN
    ids = tokens.view(4, -1).T.reshape(1, -1)  # neighbours are not alike
    # A separate cache: captured passes share one, which a new one would replace.
    cache = ModelRunner.new_cache(recording, _TOKENS_TO_LEARN, _TOKENS_TO_LEARN)
    with one_thread():
        recording.run(cache, ids, 0, num_layers, num_logits=0)
    return squares
