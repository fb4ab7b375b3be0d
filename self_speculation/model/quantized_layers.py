"""Lean layers over weights of eight bits, made from the model's own: for cheap drafts, never for the target.

Weight-only: a row of a weight is stored in 127 steps of its largest element, activations are bfloat16, and
the product is torch's own `_weight_int8pack_mm`. Of what torch has (dynamic quantisation by fbgemm and oneDNN
besides), it is as fast as any for one token on two cores, the most exact, and keeps its weights as a plain
tensor: one byte for each element of the layers and of the head, beside the model's own.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from self_speculation.model.decoder import Decoder
from self_speculation.model.lean_layers import Lean, Product


class Int8Product:
    """As `Product`, over a copy of its weight."""

    def __init__(self, product: Product) -> None:
        weight = product.weight.float()
        scales = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        self._weight = (weight / scales).round().to(torch.int8)  # [out, in]
        self._scales = scales[:, 0].to(torch.bfloat16)
        self._bias = product.bias

    def __call__(self, x: Tensor) -> Tensor:
        product = torch._weight_int8pack_mm(x.to(torch.bfloat16), self._weight, self._scales).to(x.dtype)
        return product if self._bias is None else product.add_(self._bias)

    def add_to(self, hidden: Tensor, x: Tensor) -> Tensor:
        return hidden.add_(self(x))


def quantized(decoder: Decoder, num_layers: int) -> Decoder:
    """The first layers and the head of a decoder in eight bits, over its own cache. Each copy is made once.

    Raises:
        ValueError: layers that are not lean, or a device without the kernel.
    """
    parts = [*decoder.layers[:num_layers], decoder.head]
    lean = [part for part in parts if isinstance(part, Lean)]
    if len(lean) < len(parts):
        raise ValueError("draft_weights int8: needs lean layers (of a known family, plain, fuse True)")
    *layers, head = (_quantized(part, decoder.prepared.copies) for part in lean)
    return decoder.over(layers, head)


def _quantized(part: Lean, copies: MutableMapping[Lean, Lean]) -> Any:
    if part not in copies:
        copy = part.over(Int8Product)
        weight = part.products[0].weight
        try:
            copy.products[0](weight.new_zeros(1, weight.shape[1]))
        except (NotImplementedError, RuntimeError) as error:
            raise ValueError("draft_weights int8: this device has no kernel for it") from error
        copies[part] = copy
    return copies[part]
