"""Fused layers: decoder layers with fewer kernels, over the model's own weights.

This module knows the layout that Llama's relatives share in transformers: layers that compute
x + o(attention(rotate(norm(q)), rotate(norm(k)), v)) and x + down(act(gate) * up) of rms-normed inputs, with
or without biases and norms of q and k. On a GPU `fuse` lays projections of the same input side by side in
memory. On a CPU it makes nothing: `InPlaceRunner` reads weights where they lie, and activations are float32
whatever format weights have. The model's own `forward`, saving, training and moving work as before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from self_speculation.families import FUSED_FAMILIES, check_supported
from self_speculation.model_cache import cached, lock, peek, release, singleton, weights_key
from self_speculation.passes.attention import AttentionKernel, attend, attend_to_past
from self_speculation.passes.attention_context import AttentionContext
from self_speculation.passes.decode_attention import DecodeContext
from self_speculation.passes.unsupported_hooks import check_followed, difference
from self_speculation.weights.kernels import GELU_TANH, SILU, cpu_operators, operator_activation
from self_speculation.weights.linear import Linear, Product, RMSNorm

# Tokens of a long pass that go through an MLP at a time on a CPU: larger intermediate results, of which each
# layer allocates new ones, are new pages of memory each time.
_MLP_PIECE = 512

# Queries of a group become queries of one head in passes over up to so many tokens.
_MOST_GROUPED = 16


@dataclass
class Settings:
    """How a model decodes, as callers have set it."""

    is_fused: bool = False
    is_captured: bool = False


class Parts:
    """What is made of a model's layers and head, valid for one `weights_key`.

    Attributes:
        fused: by decoder layer; of the final norm and head by `lm_head`.
        dtype: of activations, keys, values and logits.
        counts_writes: whether torch counts writes to all weights.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        settings, config = singleton(model, Settings), model.config
        self.fused: dict[nn.Module, Fused] = {}
        self.plain: dict[nn.Module, Linear] = {}  # see `plain_linear`
        self.dtype = model.dtype
        self.counts_writes = not any(parameter.is_inference() for parameter in model.parameters())
        is_known = config.model_type in FUSED_FAMILIES and config._attn_implementation == "sdpa"
        if settings.is_fused and is_known:
            self._fuse(model)

    def _fuse(self, model: PreTrainedModel) -> None:
        base, head = model.base_model, model.get_output_embeddings()
        modules = {layer: (layer,) for layer in base.layers} | {head: (base.norm, head)}
        plain = [key for key, parts in modules.items() if difference(model, *parts) is None]
        if model.device.type == "cpu" and model.dtype.itemsize == 2:
            embed = base.embed_tokens  # `ModelRunner.embed` scales by itself
            is_as_built = not hasattr(embed, "scalar_embed_scale") or difference(model, embed) is None
            if len(plain) < len(modules) or not is_as_built or cpu_operators().variant is None:
                return  # no torch kernel multiplies float32 by 16 bits, and no layer would take the other's
            self.dtype = torch.float32
        # Not in inference mode: parameters point at tensors that are made here, and must stay trainable.
        with torch.inference_mode(False), torch.no_grad():
            for key in plain:
                is_head = key is head
                self.fused[key] = FusedHead(RMSNorm(base.norm), Linear(head)) if is_head else FusedLayer(key)

    def linears(self) -> list[Linear]:
        """Of all fused parts, and of plain modules."""
        parts = (linear for part in self.fused.values() for linear in part.linears)
        fused = [linear for linear in parts if isinstance(linear, Linear)]
        return [*fused, *self.plain.copy().values()]  # a copy: another thread may add one


def fuse(model: PreTrainedModel) -> int:
    """Decode this model by fused layers from now on, as it is now.

    Plain layers of fused families with sdpa attention are fused; quantised, offloaded, hooked and
    adapter-wrapped modules are not. On a CPU a model in 16 bits is fused as a whole or not at all, and its
    output is that of a float32 model.

    Call it again after a change that `weights_key` does not see: a write through `.data`, a hook, another
    `forward`, activation, buffer or number. What was made of the model is then made anew. For a model that is
    not to be fused, `release` does the same.

    Returns:
        The number of fused layers.

    Raises:
        ValueError: the model is not supported, or has code around its layers, which passes do not follow.
    """
    check_followed(model)
    check_supported(model.config)
    with lock(model):
        singleton(model, Settings).is_fused = True
        release(model)
        parts = parts_of(model)
    return sum(layer in parts.fused for layer in model.base_model.layers)


def activation_dtype(model: PreTrainedModel) -> torch.dtype:
    """Of activations, keys, values and logits."""
    return parts_of(model).dtype


def parts_of(model: PreTrainedModel) -> Parts:
    """Those of the model's current weights."""
    return cached(model, Parts, lambda _: weights_key(model), lambda: Parts(model))


def bytes_made(model: PreTrainedModel) -> int:
    """Bytes of all copies of a model's weights, which draft."""
    linears = parts.linears() if (parts := peek(model, Parts)) else []
    return sum(linear.copy.num_bytes for linear in linears if linear.copy is not None)


def plain_linear(model: PreTrainedModel, module: nn.Module) -> Linear:
    """A `Linear` of a plain module that is in no fused part, for a runner of this model. It is kept with the
    fused parts.
    """
    with lock(model):
        plain = peek(model, Parts).plain
        if module not in plain:
            plain[module] = Linear(module)
        return plain[module]


class FusedLayer:
    """A decoder layer of queries, keys and values in one product, and of gates and what they gate in one."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.index, self._head_dim = attention.layer_idx, attention.head_dim
        self.groups, self._scaling = attention.num_key_value_groups, attention.scaling
        self._num_heads, self._kv_heads = (
            projection.out_features // self._head_dim for projection in (attention.q_proj, attention.k_proj)
        )
        self._num_rotated = self._num_heads + self._kv_heads
        self.linears: tuple[Product, ...] = (
            Linear(attention.q_proj, attention.k_proj, attention.v_proj),
            Linear(attention.o_proj),
            Linear(mlp.gate_proj, mlp.up_proj),
            Linear(mlp.down_proj),
        )
        self._activation: Callable[[Tensor], Tensor] = mlp.act_fn.forward  # `difference`: there are no hooks
        self._kind = operator_activation(mlp.act_fn)
        self._width = mlp.gate_proj.out_features
        # Some families norm the results of attention and MLP, too: there this name is that of attention's.
        before_mlp, after = getattr(layer, "pre_feedforward_layernorm", None), layer.post_attention_layernorm
        norms = {
            "input": layer.input_layernorm,
            "query": getattr(attention, "q_norm", None),
            "key": getattr(attention, "k_norm", None),
            "attended": None if before_mlp is None else after,
            "mlp": after if before_mlp is None else before_mlp,
            "output": getattr(layer, "post_feedforward_layernorm", None),
        }
        # In the order of the operator.
        self._norms: Mapping[str, Any] = {
            name: None if module is None else RMSNorm(module) for name, module in norms.items()
        }

    def __call__(self, hidden: Tensor, context: AttentionContext | DecodeContext) -> Tensor:
        """[B * T, H] -> [B * T, H], in place; appends keys and values to the cache."""
        norms = self._norms
        joint = self.linears[0](norms["input"](hidden))
        if isinstance(context, DecodeContext):
            attended = context.attend(joint, self.index, norms["query"], norms["key"], self._scaling)
        else:
            attended = self._attended(joint, context)
        _, out, gate_up, down = self.linears
        hidden = self._add(hidden, out, attended, norms["attended"])
        is_long = hidden.shape[0] > _MLP_PIECE and hidden.device.type == "cpu"
        for piece in hidden.split(_MLP_PIECE) if is_long else (hidden,):
            joint = gate_up(norms["mlp"](piece))
            if isinstance(context, DecodeContext) and self._kind in (SILU, GELU_TANH):
                product = torch.ops.self_speculation.gated.default(joint, self._kind == GELU_TANH)
            else:
                gate, up = joint.split_with_sizes((self._width, self._width), 1)
                product = self._activation(gate).mul_(up)
            self._add(piece, down, product, norms["output"])
        return hidden

    def _attended(self, joint: Tensor, context: AttentionContext) -> Tensor:
        """[B * T, (heads + 2 kv_heads) * head_dim] -> [B * T, heads * head_dim], by kernels of torch."""
        norms, heads = self._norms, joint.view(len(joint), -1, self._head_dim)
        # [B * T, heads + kv_heads, head_dim] and [B * T, kv_heads, head_dim]
        queries_keys, values = heads.split_with_sizes((self._num_rotated, self._kv_heads), 1)
        if norms["query"] is not None:
            queries, keys = queries_keys.split_with_sizes((self._num_heads, self._kv_heads), 1)
            queries_keys = torch.cat((norms["query"](queries), norms["key"](keys)), 1)
        rotated = context.rotate(queries_keys)
        queries, keys = rotated.split_with_sizes((self._num_heads, self._kv_heads), 1)
        all_keys, all_values = context.append(keys, values, self.index)
        return self._attend(queries, all_keys, all_values, context)

    def _add(self, hidden: Tensor, linear: Product, x: Tensor, norm: RMSNorm | None) -> Tensor:
        """hidden + norm(linear(x)), in place; None: without a norm."""
        if norm is not None:
            return hidden.add_(norm(linear(x)))
        return linear.add_to(hidden, x) if isinstance(linear, Linear) else hidden.add_(linear(x))

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, context: AttentionContext) -> Tensor:
        """[B * T, heads, head_dim] queries, keys and values of the cache -> [B * T, heads * head_dim].

        Query heads that share keys become more queries of one head: no fast kernel takes grouped heads with
        a mask. In wide passes over rows of one length, each key head of each row is a row of its batch.
        """
        rows, width, kernel, scale = context.rows, context.width, context.kernel, self._scaling
        if width == 1:
            heads = queries.reshape(*keys.shape[:2], self.groups, self._head_dim)
            return self._attend_by_group(heads, keys, values, context).reshape(rows, -1)
        if kernel is AttentionKernel.FLASH:  # it takes grouped heads
            heads = queries.view(rows, width, self._num_heads, -1).transpose(1, 2)
            attended = attend(kernel, heads, keys, values, None, scale, is_causal=True)
            return attended.transpose(1, 2).reshape(rows * width, -1)
        # [B, kv_heads, groups, T, head_dim]
        grouped = queries.view(rows, width, self._kv_heads, self.groups, -1).permute(0, 2, 3, 1, 4)
        is_wide = width > _MOST_GROUPED and context.is_uniform
        to_past = is_wide and context.window is None and keys.device.type == "cpu"
        mask = None if to_past else context.mask(1 if is_wide else self.groups)
        if is_wide or mask is None:
            heads = grouped.flatten(0, 1)
            keys, values = (
                shared.flatten(0, 1)[:, None].expand(-1, self.groups, -1, -1) for shared in (keys, values)
            )
            if to_past:
                attended = attend_to_past(heads, keys, values, scale)
            else:
                attended = attend(kernel, heads, keys, values, mask, scale, is_causal=mask is None)
        else:
            heads = grouped.reshape(*keys.shape[:2], -1, self._head_dim)
            attended = self._attend_by_group(heads, keys, values, context)
        attended = attended.view(grouped.shape)
        return attended.permute(0, 3, 1, 2, 4).reshape(rows * width, -1)

    def _attend_by_group(
        self, heads: Tensor, keys: Tensor, values: Tensor, context: AttentionContext
    ) -> Tensor:
        """Queries of a group of heads, [N, heads, groups * T, head_dim], over the keys that they share."""
        mask = context.mask(self.groups)
        return attend(context.kernel, heads, keys, values, mask, self._scaling)

    @property
    def is_in_place(self) -> bool:
        """Whether the operator can multiply by its weights."""
        return len(self._in_place) == len(self.linears)

    @property
    def _in_place(self) -> list[Linear]:
        return [linear for linear in self.linears if isinstance(linear, Linear) and linear.is_in_place]

    def tensors(self) -> list[Tensor]:
        """All that the operator reads, in its order."""
        norms = [norm.weight for norm in self._norms.values() if norm is not None]
        return norms + [tensor for linear in self._in_place for tensor in linear.tensors]

    def description(self, window: int | None, rotation: int) -> tuple[list[int | None], list[float]]:
        """What the operator is told of it, see `Layer` of cpp/layers.cpp.

        Args:
            rotation: the number of its tables.
        """
        options = [has_bias for linear in self._in_place for has_bias in linear.has_biases]
        options += [self._norms[name] is not None for name in ("query", "attended", "output")]
        options += [self._norms["input"].is_centred]
        has = sum(is_there << bit for bit, is_there in enumerate(options))
        numbers = [has, self._num_heads, self._kv_heads, self._width, window or 0, rotation, self._kind]
        return numbers, [self._scaling, *(norm.epsilon if norm else 0.0 for norm in self._norms.values())]

    @property
    def key_shape(self) -> tuple[int, int]:
        """[kv_heads, head_dim]"""
        return self._kv_heads, self._head_dim


class FusedHead:
    """Final norm and head, [T, H] -> [T, V]."""

    def __init__(self, norm: RMSNorm, linear: Linear) -> None:
        self.norm = norm
        self.linears = (linear,)

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.linears[0].logits(hidden, self.norm)


Fused = FusedLayer | FusedHead
