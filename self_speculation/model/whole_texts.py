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
    runs = [None] * len(base.layers) if kept is None else _rows(kept, hidden.device)
    for index, (layer, rows) in enumerate(zip(base.layers, runs, strict=True)):
        if rows is None:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        else:
            before = hidden[rows]
            after = layer(before, attention_mask=mask, position_embeddings=rotary).to(hidden.dtype)
            if kept is not None and not kept[index].any():
                after = torch.where(torch.zeros_like(after, dtype=torch.bool), after, before)
            hidden = hidden.index_copy(0, rows, after)
        yield hidden


def _rows(kept: numpy.ndarray, device: torch.device) -> list[Tensor | None]:
    """What each layer is run on; None: on all samples. One copy to the device, which nobody waits for."""
    by_layer = [row.nonzero()[0].tolist() or [0] for row in kept]
    together = torch.tensor([sample for rows in by_layer for sample in rows])
    if device.type == "cuda":
        together = together.pin_memory().to(device, non_blocking=True)
    parts = together.to(device).split([len(rows) for rows in by_layer])
    return [None if row.all() else part for row, part in zip(kept, parts, strict=True)]


def exit_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """[..., H] after any layer -> [..., V] by the model's own norm and head."""
    return model.get_output_embeddings()(model.base_model.norm(hidden))
