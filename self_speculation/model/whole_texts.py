"""Every layer's states over whole texts, without a cache: what training and log-likelihoods look at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

if TYPE_CHECKING:  # the library itself does without
    import numpy


def hidden_after_each_layer(
    model: PreTrainedModel, input_ids: Tensor, kept: numpy.ndarray | None = None
) -> Iterator[Tensor]:
    """[B, T, H] after every layer, without a cache: what training looks at.

    Args:
        input_ids: [B, T], padding only on the right, where no real token attends to it.
        kept: bool [L, B], the samples that each layer is run on; the others skip it at no cost. A layer that
            all of them skip is run on one of them, which changes nothing: other processes may share its
            weights and gradients, and all of them must call it, forwards and backwards. (On no sample would
            do, but transformers' layers fail on an empty batch.)
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
        run = range(len(hidden)) if kept is None else kept[index].nonzero()[0]
        if len(run) == len(hidden):
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        else:
            rows = torch.as_tensor(run if len(run) else [0], device=hidden.device)
            before = hidden[rows]
            after = layer(before, attention_mask=mask, position_embeddings=rotary).to(hidden.dtype)
            if not len(run):
                after = torch.where(torch.zeros_like(after, dtype=torch.bool), after, before)
            hidden = hidden.index_copy(0, rows, after)
        yield hidden


def exit_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """[..., H] after any layer -> [..., V] by the model's own norm and head."""
    return model.get_output_embeddings()(model.base_model.norm(hidden))
