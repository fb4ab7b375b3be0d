"""Every layer's states over whole texts, without a cache: what training and log-likelihoods look at."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel


def hidden_after_each_layer(
    model: PreTrainedModel, input_ids: Tensor, kept: Tensor | None = None
) -> Iterator[Tensor]:
    """[B, T, H] after every layer, without a cache: what training looks at.

    Args:
        input_ids: [B, T], padding only on the right, where no real token attends to it.
        kept: [L, B] on the CPU, the samples that each layer is run on; the others skip it at no cost.
    """
    base = model.base_model
    hidden = base.embed_tokens(input_ids)
    width = input_ids.shape[1]
    rotary = base.rotary_emb(hidden, position_ids=torch.arange(width, device=hidden.device)[None])
    mask = None  # sdpa masks by itself
    if model.config._attn_implementation == "eager":
        lowest = torch.finfo(hidden.dtype).min
        mask = torch.full((1, 1, width, width), lowest, dtype=hidden.dtype, device=hidden.device).triu(1)
    for index, layer in enumerate(base.layers):
        if kept is None or kept[index].all():
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        elif kept[index].any():
            rows = kept[index].nonzero().squeeze(1).to(hidden.device)
            changed = layer(hidden[rows], attention_mask=mask, position_embeddings=rotary)
            hidden = hidden.index_copy(0, rows, changed.to(hidden.dtype))
        yield hidden


def exit_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """[..., H] after any layer -> [..., V] by the model's own norm and head."""
    return model.get_output_embeddings()(model.base_model.norm(hidden))
