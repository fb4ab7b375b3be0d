"""Decoder layers with fewer and faster kernels, over the very weights of the layers that they stand for.

Of transformers this knows the layout that Llama's relatives share. A model stays what it is: projections
that read the same input are laid side by side in memory, and that is all. Its own `forward`, and whatever
saves, trains or moves it, go on as before.

A lean form is valid for the modules and the tensors that it was made of. Where these are others by the time
a generation begins, it is made anew; where there is a hook or an adapter, there is none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from self_speculation.model.devices import free_memory
from self_speculation.model.fingerprint import structure
from self_speculation.model.kv_cache import Appendable
from self_speculation.model.overrides import replaced_forward
from self_speculation.model.products import NARROW, InFloat16, Packed, Product, follow_weights

# `config.model_type` of those whose layers are all
#   x + o(attention(rotate(norm(q)), rotate(norm(k)), v)) and x + down(act(gate) * up), of rms-normed inputs,
# with or without biases and norms of q and k.
LEAN_MODEL_TYPES = ("llama", "mistral", "ministral", "qwen2", "qwen3", "seed_oss")

# Whose classes are called as they are, whichever it is.
_ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation")

# Packed copies may take so much of the memory that is free.
_SHARE_OF_ROOM = 1 / 3


@dataclass
class _Fused:
    """
    Args:
        widens: weights in 16 bits are to be multiplied in float32.
        num_calls: of `fuse`; each has all forms made anew.
        forms: of one model, by the layer or the head that they stand for.
    """

    widens: bool = False
    num_calls: int = 0
    forms: dict[nn.Module, Lean] = field(default_factory=dict)


_FUSED: WeakKeyDictionary[nn.Module, _Fused] = WeakKeyDictionary()


def fuse(model: Any, widen: bool | None = None) -> int:
    """From now on decode this model by lean layers, as far as it is recognised: plain layers of
    LEAN_MODEL_TYPES with sdpa attention. Quantised, adapter-wrapped, offloaded or hooked modules are left as
    they are. Whatever was made of the model before is made anew: needed after changes that no fingerprint
    sees, which are single elements written through `.data`.

    Args:
        widen: on a CPU, for a model in 16 bits: multiply its weights in float32, and have everything else in
            float32, while all layers and the head are lean. Its text is then that of a model in float32.
            None: as it was, at first not.

    Returns:
        How many layers are lean now.

    Raises:
        ValueError: to widen, there is no kernel, a part that is not lean, or a weight that float16
            cannot hold.
    """
    fused = _FUSED.setdefault(model, _Fused())
    fused.widens = fused.widens if widen is None else widen
    fused.num_calls += 1
    fused.forms.clear()
    try:
        forms = lean_forms(model)
        if widen and forms.dtype != torch.float32:
            raise ValueError("weights in 16 bits: those of this model cannot be multiplied in float32")
    except ValueError:
        fused.widens = False
        raise
    return sum(layer is not None for layer in forms.layers)


def computes_in(model: Any) -> torch.dtype:
    """The format of activations, keys and values, and logits. Raises what `lean_forms` does."""
    return lean_forms(model).dtype


class Forms(NamedTuple):
    """The lean forms of a model's layers, and of its final norm and head; None of what has none."""

    layers: Sequence[LeanLayer | None]
    head: LeanHead | None
    dtype: torch.dtype  # of activations, keys and values, logits


def lean_forms(model: Any) -> Forms:
    """To be called when a generation begins: what has changed by then is made anew.

    Raises:
        ValueError: a weight that is widened is by now one that float16 cannot hold.
    """
    base, head = model.base_model, model.get_output_embeddings()
    fused = _FUSED.get(model)
    if fused is None or not (
        model.config.model_type in LEAN_MODEL_TYPES and model.config._attn_implementation == "sdpa"
    ):
        return Forms([None] * len(base.layers), None, model.dtype)
    parts = {layer: (layer,) for layer in base.layers} | {head: (base.norm, head)}
    family = f"transformers.models.{model.config.model_type}."
    of_now = {key: structure(*modules) for key, modules in parts.items()}
    same = {key for key, form in fused.forms.items() if form.structure == of_now.get(key)}
    plain = {key for key, modules in parts.items() if key in same or _is_plain(family, *modules)}
    is_widened = fused.widens and len(plain) == len(parts) and _can_be_widened(model)
    # What is out of date must not be kept alive while another is made.
    fused.forms = {
        key: form for key, form in fused.forms.items() if key in same and form.is_widened == is_widened
    }
    new = [key for key in parts if key in plain and key not in fused.forms]
    for key in new:
        # Not in inference mode: parameters become parts of what is made here, and must stay trainable.
        with torch.inference_mode(False), torch.no_grad():
            kind: Any = LeanHead if key is head else LeanLayer
            fused.forms[key] = kind(*parts[key], is_widened)
    packable = [product for key in new for product in fused.forms[key].products if product.can_be_packed]
    if sum(product.num_bytes for product in packable) <= _SHARE_OF_ROOM * free_memory(torch.device("cpu")):
        for product in packable:
            product.may_be_packed = True
    follow_weights([product for form in fused.forms.values() for product in form.products])
    lean: Any = [fused.forms.get(key) for key in parts]
    return Forms(lean[:-1], lean[-1], torch.float32 if is_widened else model.dtype)


def _can_be_widened(model: Any) -> bool:
    """Whether all weights are such as `InFloat16` takes."""
    return all(
        w.device.type == "cpu" and w.dtype in (torch.bfloat16, torch.float16) for w in model.parameters()
    )


def bytes_made(model: Any, for_drafts: bool = True) -> int:
    """Bytes of all copies that were made of a model's weights.

    Args:
        for_drafts: count those that only drafts read, too, such as those in fewer bits.
    """
    forms = _FUSED[model].forms.values() if model in _FUSED else ()
    copies = (copy for form in forms for product in form.products for copy in product.all_derived)
    return sum(copy.num_bytes for copy in copies if for_drafts or isinstance(copy, InFloat16 | Packed))


def how_fused(model: Any) -> Hashable:
    """Changes when `fuse` is called."""
    fused = _FUSED.get(model)
    return None if fused is None else (fused.widens, fused.num_calls)


def plain_product(head: nn.Module) -> Product | None:
    """That of a head which is not lean, unless its weight is in parts, quantised or elsewhere."""
    return Product(head) if type(head) is nn.Linear and _is_plain("", head) else None


class Norm:
    """The rms norm of a module, over its weight; [..., n] -> [..., n]."""

    def __init__(self, module: Any) -> None:
        self.weight, self._epsilon = module.weight.data, module.variance_epsilon
        self._shape = self.weight.shape
        self._on_cpu = self.weight.device.type == "cpu"
        self._root = len(self.weight) ** 0.5
        self._zero, self._least = torch.tensor([0.0, self._root * self._epsilon**0.5]).unbind()

    def __call__(self, hidden: Tensor) -> Tensor:
        if not self._on_cpu:
            return torch.rms_norm(hidden, self._shape, self.weight, self._epsilon)  # one kernel
        # On a CPU that is a sequence of kernels, twice as many as these.
        is_exact = hidden.dtype == torch.float32
        exact = hidden if is_exact else hidden.float()
        norms = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
        norms = torch.hypot(norms, self._least)  # sqrt(|x|^2 + n epsilon)
        scaled = torch.addcdiv(self._zero, exact, norms, value=self._root)
        return (scaled if is_exact else scaled.type_as(hidden)).mul_(self.weight)

    def tensors(self) -> list[Tensor]:
        """As those of `Product`."""
        return [self.weight, self._zero, self._least]


class LeanLayer:
    """A decoder layer; see the module."""

    def __init__(self, layer: Any, is_widened: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.index, self._head_dim = attention.layer_idx, attention.head_dim
        self._groups, self._scaling = attention.num_key_value_groups, attention.scaling
        self._num_heads, self._kv_heads = (
            projection.out_features // self._head_dim for projection in (attention.q_proj, attention.k_proj)
        )
        self._num_rotated = self._num_heads + self._kv_heads
        self._qkv = Product(attention.q_proj, attention.k_proj, attention.v_proj, is_widened=is_widened)
        self._out = Product(attention.o_proj, is_widened=is_widened)
        self._gate_up = Product(mlp.gate_proj, mlp.up_proj, is_widened=is_widened)
        self._down = Product(mlp.down_proj, is_widened=is_widened)
        self._activation: Callable[[Tensor], Tensor] = mlp.act_fn.forward  # hooks there are none
        self._width = mlp.gate_proj.out_features
        self._input_norm = Norm(layer.input_layernorm)
        self._mlp_norm = Norm(layer.post_attention_layernorm)
        self._query_norm = self._key_norm = None
        if hasattr(attention, "q_norm"):
            self._query_norm, self._key_norm = Norm(attention.q_norm), Norm(attention.k_norm)
        self.products = (self._qkv, self._out, self._gate_up, self._down)
        self.is_widened, self.structure = is_widened, structure(layer)

    @property
    def device(self) -> torch.device:
        return self._input_norm.weight.device

    def over(self, make: Callable[[Product], Any]) -> LeanLayer:
        """The same layer, its products replaced by what `make` makes of each."""
        other = copy.copy(self)
        other.products = tuple(make(product) for product in self.products)
        other._qkv, other._out, other._gate_up, other._down = other.products
        return other

    def __call__(self, hidden: Tensor, span: Any, cache: Appendable) -> Tensor:
        """[B * T, H] -> [B * T, H] for the T positions of `span` in each of B rows, in the place of `hidden`;
        their keys and values are in the cache then.
        """
        heads = self._qkv(self._input_norm(hidden)).view(hidden.shape[0], -1, self._head_dim)
        # [B * T, heads + kv_heads, head_dim] and [B * T, kv_heads, head_dim]
        queries_keys, values = heads.split_with_sizes((self._num_rotated, self._kv_heads), 1)
        if self._query_norm is not None and self._key_norm is not None:
            queries, keys = queries_keys.split_with_sizes((self._num_heads, self._kv_heads), 1)
            queries_keys = torch.cat((self._query_norm(queries), self._key_norm(keys)), 1)
        rotated = span.rotate(queries_keys)
        queries, keys = rotated.split_with_sizes((self._num_heads, self._kv_heads), 1)
        all_keys, all_values = cache.append(keys, values, self.index)
        hidden = self._out.add_to(hidden, self._attend(queries, all_keys, all_values, span))
        joint = self._gate_up.unconverted(self._mlp_norm(hidden))
        gate, up = joint.split_with_sizes((self._width, self._width), 1)
        return self._down.add_to(hidden, self._activation(gate).mul_(up))

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, span: Any) -> Tensor:
        """[B * T, heads, head_dim] queries, keys and values as the cache gives them -> [B * T, heads *
        head_dim].

        The heads that share keys are so many more queries of one head. The kernels need not know of them
        then: with a mask the fast ones do not. Where all rows have one length, a head of a row is one of a
        batch.
        """
        rows, width, attention = span.rows, span.width, scaled_dot_product_attention
        if width == 1:
            heads = queries.reshape(*keys.shape[:2], self._groups, self._head_dim)
            return attention(heads, keys, values, span.grouped_mask, scale=self._scaling).reshape(rows, -1)
        # [B, kv_heads, groups, T, head_dim]
        grouped = queries.view(rows, width, self._kv_heads, self._groups, -1).permute(0, 2, 3, 1, 4)
        is_wide = width > NARROW and keys.shape[1] == 1
        mask = span.mask if is_wide else span.grouped_mask
        if is_wide or mask is None:
            heads = grouped.reshape(keys.shape[0], self._groups, width, -1)
            keys, values = (shared.expand(-1, self._groups, -1, -1) for shared in (keys, values))
            attended = attention(heads, keys, values, mask, is_causal=mask is None, scale=self._scaling)
        else:
            heads = grouped.reshape(*keys.shape[:2], -1, self._head_dim)
            attended = attention(heads, keys, values, mask, scale=self._scaling)
        attended = attended.view(grouped.shape)
        return attended.permute(0, 3, 1, 2, 4).reshape(rows * width, -1)

    def tensors(self) -> list[Tensor]:
        """All that a pass reads."""
        norms = (self._input_norm, self._mlp_norm, self._query_norm, self._key_norm)
        return [t for part in (*self.products, *norms) if part is not None for t in part.tensors()]


class LeanHead:
    """Final norm and head, [T, H] -> [T, V]."""

    def __init__(self, norm: Any, head: nn.Linear, is_widened: bool) -> None:
        self.norm, self._head = Norm(norm), Product(head, is_widened=is_widened)
        self.products = (self._head,)
        self.is_widened, self.structure = is_widened, structure(norm, head)

    def over(self, make: Callable[[Product], Any]) -> LeanHead:
        """As that of `LeanLayer`."""
        other = copy.copy(self)
        other._head = make(self._head)
        other.products = (other._head,)
        return other

    def __call__(self, hidden: Tensor) -> Tensor:
        return self._head(self.norm(hidden))

    def tensors(self) -> list[Tensor]:
        """As those of `LeanLayer`."""
        return [*self._head.tensors(), *self.norm.tensors()]


Lean = LeanLayer | LeanHead


def _is_plain(family: str, *roots: nn.Module) -> bool:
    """Nothing but modules as a family of transformers has them, with weights of one kind in one place."""
    weights = [weight for root in roots for weight in root.parameters()]
    return (
        len({(weight.dtype, weight.device) for weight in weights}) == 1
        and weights[0].is_floating_point()
        and weights[0].device.type != "meta"
        and all(type(weight) is nn.Parameter for weight in weights)
        and all(_is_as_built(module, family) for root in roots for module in root.modules())
    )


def _is_as_built(module: nn.Module, family: str) -> bool:
    kind = type(module)
    known = kind is nn.Linear or kind.__module__.startswith((family, *_ACTIVATIONS))
    return known and not (module._forward_hooks or module._forward_pre_hooks or replaced_forward(module))
