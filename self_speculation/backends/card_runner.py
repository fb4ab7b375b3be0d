"""Passes on a GPU: layers of Llama's layout with fewer kernels than in transformers, since weights of the
same input lie side by side in memory. They decode by our kernels where a card has them.
"""

import importlib.util
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from self_speculation.backends.buffers import Buffers
from self_speculation.backends.kv_cache import KVCache
from self_speculation.backends.layers import FusedWeights, Head, Layer, LlamaLayer, RMSNorm
from self_speculation.backends.runner import ModelRunner, run_through
from self_speculation.backends.torch_attention import AttentionContext, RotaryTables
from self_speculation.backends.unsupported_hooks import why_not_plain
from self_speculation.machine.devices import is_lost_device
from self_speculation.models.families import AttentionType

_SIZES = (64, 96, 128, 256)  # of a head, that our kernels take


@cache
def why_no_kernels(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why card_kernels.py cannot compute attention while this device decodes.

    None: it can, and torch's flash attention computes the attention of prompts.
    The first call launches a kernel, since triton builds what launches it by a compiler.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return "they are for NVIDIA's cards"
    if (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"the card has compute capability {'.'.join(map(str, capability))}, below 8.0"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"activations are {dtype}, not in 16 bits"
    if head_dim not in _SIZES:
        return f"a head has {head_dim} elements, not one of {', '.join(map(str, _SIZES))}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    try:
        importlib.import_module("self_speculation.backends.card_kernels").try_out(device, dtype)
    except Exception as error:
        if is_lost_device(error) or isinstance(error, torch.OutOfMemoryError):
            raise
        why = " ".join(str(error).split())
        return f"triton cannot launch kernels here ({type(error).__name__}: {why})"
    return None


class DecodeContext:
    """As `AttentionContext`, for a pass by kernels: fused layers call `attend`.

    Args:
        buffers: row i of the pass is slot i.
        positions: [B, T] of the tokens; negative: padding.
    """

    def __init__(
        self, tables: RotaryTables, buffers: Buffers, positions: Tensor, kind: AttentionType
    ) -> None:
        self._buffers = buffers
        self._positions = positions
        self._window = kind.window
        self._cos, self._sin = tables.cos_sin(kind.rotation, 1).unbind()

    def attend(
        self, qkv: Tensor, layer: int, query_norm: RMSNorm | None, key_norm: RMSNorm | None, scale: float
    ) -> Tensor:
        """[B * T, (heads + 2 kv_heads) * head_dim], overwritten -> [B * T, heads * head_dim]"""
        norms: tuple[Tensor | None, Tensor | None, float, bool] = None, None, 0.0, False
        if query_norm is not None and key_norm is not None:
            norms = query_norm.weight, key_norm.weight, query_norm.epsilon, query_norm.is_centred
        return torch.ops.self_speculation.decode_attention.default(
            qkv,
            *norms,
            self._cos,
            self._sin,
            *self._buffers.by_layer[layer],
            self._positions,
            self._buffers.prefix_reads,
            scale,
            self._window,
        )


class JointLinear:
    """x [T, in] -> x W^T + b [T, out], for projections of the same input, whose weights become one tensor.

    Attributes:
        modules: the projections.
        weight, bias: [out, in] and [out] of all of them; None: none has a bias.
    """

    def __init__(self, *modules: Any) -> None:
        self.modules = modules
        self.bias = None
        self.weight = _side_by_side([each.weight for each in modules])
        if any(each.bias is not None for each in modules):
            zeros = [self.weight.new_zeros(each.out_features) for each in modules]
            pairs = zip(modules, zeros, strict=True)
            self.bias = _side_by_side([zero if each.bias is None else each.bias for each, zero in pairs])
        self._transposed = self.weight.t()  # once: `t()` is a call
        self.out_features, self.in_features = self.weight.shape

    def __call__(self, x: Tensor) -> Tensor:
        outputs = torch.mm(x, self._transposed)
        return outputs if self.bias is None else outputs.add_(self.bias)

    def add_to(self, hidden: Tensor, x: Tensor) -> Tensor:
        """hidden += x W^T + b"""
        hidden = hidden.addmm_(x, self._transposed)
        return hidden if self.bias is None else hidden.add_(self.bias)


def _side_by_side(parameters: Sequence[Tensor]) -> Tensor:
    """Concatenate parameters into one tensor, and point each parameter at a part of the joint memory.

    Each part is a separate storage, not a view: code that saves or shards a model skips parameters that
    share a storage.
    """
    if len(parameters) == 1:
        return parameters[0].data
    joint = torch.cat([parameter.data for parameter in parameters])
    with torch.cuda.device_of(joint):  # the only GPU that `from_dlpack` takes tensors of
        for parameter, part in zip(parameters, joint.split([len(p) for p in parameters]), strict=True):
            parameter.data = torch.from_dlpack(part)
    return joint


class FusedLayer(LlamaLayer):
    """A decoder layer with one joint linear of queries, keys and values, and one of gates and ups."""

    def __init__(self, layer: Any) -> None:
        super().__init__(layer)
        attention = layer.self_attn
        mlp = layer.mlp
        weight = attention.q_proj.weight
        self._has_flash = why_no_kernels(weight.device, weight.dtype, self.head_dim) is None
        self._num_rotated = self.num_heads + self.num_kv_heads
        self.linears = (
            JointLinear(attention.q_proj, attention.k_proj, attention.v_proj),
            JointLinear(attention.o_proj),
            JointLinear(mlp.gate_proj, mlp.up_proj),
            JointLinear(mlp.down_proj),
        )
        self._activate: Callable[[Tensor], Tensor] = mlp.act_fn.forward  # `difference`: there are no hooks

    def __call__(self, hidden: Tensor, context: AttentionContext | DecodeContext) -> Tensor:
        """[B * T, H] -> [B * T, H], in place; appends keys and values to the cache."""
        norms = self.norms
        qkv, out, gate_up, down = self.linears
        joint = qkv(norms["input"](hidden))
        if isinstance(context, DecodeContext):
            attended = context.attend(joint, self.index, norms["query"], norms["key"], self.scaling)
        else:
            attended = self._attended(joint, context)
        hidden = _add(hidden, out, attended, norms["attended"])
        joint = gate_up(norms["mlp"](hidden))
        if isinstance(context, DecodeContext) and self.is_gelu is not None:
            gated = torch.ops.self_speculation.gated.default(joint, self.is_gelu)
        else:
            gate, up = joint.split_with_sizes((self.intermediate_size, self.intermediate_size), 1)
            gated = self._activate(gate).mul_(up)
        return _add(hidden, down, gated, norms["output"])

    def _attended(self, joint: Tensor, context: AttentionContext) -> Tensor:
        """[B * T, (heads + 2 kv_heads) * head_dim] -> [B * T, heads * head_dim], by kernels of torch."""
        norms = self.norms
        heads = joint.view(len(joint), -1, self.head_dim)
        # [B * T, heads + kv_heads, head_dim] and [B * T, kv_heads, head_dim]
        queries_keys, values = heads.split_with_sizes((self._num_rotated, self.num_kv_heads), 1)
        if norms["query"] is not None:
            queries, keys = queries_keys.split_with_sizes((self.num_heads, self.num_kv_heads), 1)
            queries_keys = torch.cat((norms["query"](queries), norms["key"](keys)), 1)
        rotated = context.rotate(queries_keys)
        queries, keys = rotated.split_with_sizes((self.num_heads, self.num_kv_heads), 1)
        all_keys, all_values = context.append(keys, values, self.index)
        return self._attend(queries, all_keys, all_values, context)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, context: AttentionContext) -> Tensor:
        """[B * T, heads, head_dim] queries, keys and values of the cache -> [B * T, heads * head_dim]."""
        rows = context.num_rows
        width = context.width
        scale = self.scaling
        heads = queries.view(rows, width, self.num_heads, -1).transpose(1, 2)
        if self._has_flash and context.sees_all:
            attended = flash_attention(heads, keys, values, scale)
        else:  # no fast kernel takes grouped heads with a mask
            groups = self.num_heads // self.num_kv_heads
            mask = context.mask
            keys, values = (part.repeat_interleave(groups, 1) for part in (keys, values))
            is_causal = mask is None and width > 1
            attended = scaled_dot_product_attention(heads, keys, values, mask, 0.0, is_causal, scale=scale)
        return attended.transpose(1, 2).reshape(rows * width, -1)


def flash_attention(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """[B, heads, T, head_dim] queries of the last T of S positions over [B, kv_heads, S, head_dim] keys and
    values: a token sees no later position. `scaled_dot_product_attention` needs a mask for that, since
    `is_causal` there aligns the first token and the first key.
    """
    attend = torch.ops.aten._scaled_dot_product_flash_attention.default
    return attend(queries, keys, values, 0.0, True, scale=scale)[0]


def _add(hidden: Tensor, linear: Any, x: Tensor, norm: RMSNorm | None) -> Tensor:
    """hidden + norm(linear(x)), in place; None: without a norm."""
    if norm is not None:
        return hidden.add_(norm(linear(x)))
    return linear.add_to(hidden, x) if isinstance(linear, JointLinear) else hidden.add_(linear(x))


class JointWeights(FusedWeights):
    """Plain layers and a plain head are fused."""

    def replace(self, model: PreTrainedModel) -> None:
        base = model.base_model
        head = model.get_output_embeddings()
        layers = [layer for layer in base.layers if why_not_plain(model, layer) is None]
        self.replaced = {layer: FusedLayer(layer) for layer in layers}
        if why_not_plain(model, base.norm, head) is None:
            self.replaced[head] = Head(RMSNorm(base.norm), JointLinear(head))


class FusedRunner(ModelRunner):
    """Runs layers one by one.

    Attributes:
        why_no_kernels: None: the layers decode by our kernels.
    """

    weights_kind = JointWeights

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        _, head_dim = self.key_shape
        if len({*self.devices, self.device}) > 1:
            self.why_no_kernels: str | None = "the model is on several devices"
        elif not any(isinstance(layer, FusedLayer) for layer in self.layers):
            self.why_no_kernels = "its layers are not fused"
        else:
            self.why_no_kernels = why_no_kernels(self.device, self.dtype, head_dim)
        if self.device.type == "cuda":
            # In this process. torch prefers it on Hopper and newer, and it makes a plan, for tens of
            # milliseconds, for every new number of keys: in decoding, for every token.
            torch.backends.cuda.enable_cudnn_sdp(False)
            # Products in 16 bits are summed in float32: near-ties are fewer.
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

    def run_rectangle(self, cache: KVCache, hidden: Tensor, start_layer: int, end_layer: int) -> Tensor:
        if not self.decodes_by_kernels(cache, self.layers[start_layer:end_layer]):
            return super().run_rectangle(cache, hidden, start_layer, end_layer)
        width = hidden.shape[1]
        lengths = cache.lengths(start_layer)
        positions = cache.positions(start_layer, width, self.device)
        cache.make_room(start_layer, end_layer, [width] * len(lengths))
        self.tables.reserve(max(lengths) + width)
        make = partial(DecodeContext, self.tables, cache.buffers, positions)
        return run_through(self.typed_layers(start_layer, end_layer), make, hidden)

    def decodes_by_kernels(self, cache: KVCache, layers: Sequence[Layer]) -> bool:
        """Whether layers decode by the kernels of a card. Prompts are read by torch's."""
        are_fused = all(isinstance(layer, FusedLayer) for layer in layers)
        return are_fused and not cache.is_prompt and self.why_no_kernels is None
