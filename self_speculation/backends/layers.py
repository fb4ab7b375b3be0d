"""Decoder layers and the head, as a `ModelRunner` has them. All read the weights of the model, so
`forward`, saving, training and moving work as before.

This module knows the layout that Llama's relatives share in transformers: layers that compute
x + o(attention(rotate(norm(q)), rotate(norm(k)), v)) and x + down(act(gate) * up) of rms-normed inputs, with
or without biases and norms of q and k.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from self_speculation.backends.torch_attention import AttentionContext
from self_speculation.models.families import LLAMA_LAYOUT
from self_speculation.models.model_cache import cached, counts_writes, kept, weights_key
from self_speculation.weights.few_bits import FewBitsLinear

T = TypeVar("T", bound="FusedWeights")

# Norms that multiply by 1 + weight, in float32.
_CENTRED_NORMS = ("Gemma3RMSNorm",)


class Layer:
    """A decoder layer.

    Attributes:
        linears: modules that compute x W^T + b, each with `weight` and `bias`.
    """

    linears: Sequence[Any]

    def with_linears(self, replacements: Mapping[Any, Any]) -> Layer:
        """A copy of this layer with `replacements[linear]` in place of each linear module."""
        copied = copy.copy(self)
        copied.linears = [replacements[linear] for linear in self.linears]
        return copied


class Head:
    """Final norm and head: [T, H] -> [T, V]."""

    def __init__(self, norm: Callable[[Tensor], Tensor], linear: Any) -> None:
        self.norm = norm
        self.linear = linear

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.linear(self.norm(hidden))


class PlainHead(Head):
    """Final norm and head of transformers, whose hooks see a batch."""

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.linear(self.norm(hidden[None]))[0]


class PlainLayer(Layer):
    """A decoder layer of transformers."""

    def __init__(self, layer: nn.Module) -> None:
        self.module = layer
        self.linears = [module for module in layer.modules() if type(module) in (nn.Linear, FewBitsLinear)]

    def __call__(self, hidden: Tensor, context: AttentionContext) -> Tensor:
        """[B * T, H] -> [B * T, H]; appends keys and values to the cache of the pass."""
        return self.module(
            hidden.view(context.num_rows, context.width, -1),
            attention_mask=context.mask,
            position_embeddings=context.rotary,
            cache=context,  # for `update`
            use_cache=True,
        ).flatten(0, 1)

    def with_linears(self, replacements: Mapping[Any, Any]) -> Layer:
        return PlainLayer(_with_modules(self.module, replacements))


def _with_modules(module: nn.Module, modules: Mapping[Hashable, nn.Module]) -> nn.Module:
    """A copy with `modules[child]` in place of a child. It shares all parameters and buffers."""
    if module in modules:
        return modules[module]
    copied = copy.copy(module)
    copied._modules = {
        name: None if child is None else _with_modules(child, modules)
        for name, child in module._modules.items()
    }
    return copied


class RMSNorm:
    """[..., n] -> [..., n], over the weight of a module."""

    def __init__(self, module: Any) -> None:
        self.is_centred = type(module).__name__ in _CENTRED_NORMS
        self.epsilon = module.eps if self.is_centred else module.variance_epsilon
        self.weight: Tensor = module.weight

    def __call__(self, hidden: Tensor) -> Tensor:
        weight = self.weight
        if self.is_centred:
            return torch.rms_norm(hidden.float(), weight.shape, weight.float() + 1, self.epsilon).to(
                hidden.dtype
            )
        if weight.dtype != hidden.dtype:
            weight = weight.to(hidden.dtype)
        return torch.rms_norm(hidden, weight.shape, weight, self.epsilon)


def _is_gelu(activation: nn.Module) -> bool | None:
    """True: GELU by tanh; False: SiLU; None: another activation, which no kernel of ours has."""
    name = f"{type(activation).__name__} {getattr(activation, 'approximate', '')}".strip()
    if name in ("SiLUActivation", "SiLU"):
        return False
    return True if name in ("GELUTanh", "NewGELUActivation", "GELU tanh") else None


class LlamaLayer(Layer):
    """Shapes and norms of a decoder layer of Llama's layout. Subclasses compute it."""

    def __init__(self, layer: Any) -> None:
        attention = layer.self_attn
        mlp = layer.mlp
        self.index = attention.layer_idx
        self.head_dim = attention.head_dim
        self.scaling = attention.scaling
        self.num_heads, self.num_kv_heads = (
            projection.out_features // self.head_dim for projection in (attention.q_proj, attention.k_proj)
        )
        self.intermediate_size = mlp.gate_proj.out_features
        self.is_gelu = _is_gelu(mlp.act_fn)
        # A family that norms results of attention and MLP, too, has this name for the norm of attention.
        before_mlp = getattr(layer, "pre_feedforward_layernorm", None)
        after = layer.post_attention_layernorm
        norms = {
            "input": layer.input_layernorm,
            "query": getattr(attention, "q_norm", None),
            "key": getattr(attention, "k_norm", None),
            "attended": None if before_mlp is None else after,
            "mlp": after if before_mlp is None else before_mlp,
            "output": getattr(layer, "post_feedforward_layernorm", None),
        }
        # The operator reads norms in this order.
        self.norms: Mapping[str, Any] = {
            name: None if module is None else RMSNorm(module) for name, module in norms.items()
        }


class FusedWeights:
    """The layers and head that decode in place of a model's modules, valid for one `weights_key`. This class
    replaces none.

    Attributes:
        identity: a unique object: no other weights have an equal one while something refers to it.
        replaced: module of the model -> layer or head of this library; `lm_head` -> head.
        dtype: of activations, keys, values and logits.
        copies: linear module -> the copy in four bits.
        counts_writes: whether torch counts writes to all weights.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config = model.config
        self.identity = object()
        self.replaced = dict[nn.Module, Any]()
        self.copies = dict[Hashable, Any]()
        self.dtype = model.dtype
        self.counts_writes = counts_writes(model)
        is_known = config.model_type in LLAMA_LAYOUT and config._attn_implementation == "sdpa"
        if is_known and kept(model).get("is_fused"):
            # Not in inference mode: parameters point at tensors that are made here, and must stay trainable.
            with torch.inference_mode(False), torch.no_grad():
                self.replace(model)

    def replace(self, model: PreTrainedModel) -> None:
        """Make layers and head in place of plain ones."""

    @classmethod
    def of(cls: type[T], model: PreTrainedModel) -> T:
        """What is made of the model's current weights. A model has one kind at a time."""

        def valid_for(weights: FusedWeights) -> Hashable:
            return type(weights) is cls, weights_key(model)

        return cached(model, FusedWeights, valid_for, lambda: cls(model))
