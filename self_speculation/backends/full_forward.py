"""Hidden states of every layer over whole texts, without a cache, for training and log-likelihoods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from self_speculation.backends.torch_attention import causal_mask, cos_and_sin
from self_speculation.machine.transfers import on_device
from self_speculation.models.families import AttentionType, attention_types

if TYPE_CHECKING:  # the library does not need it
    import numpy


def hidden_after_each_layer(
    model: PreTrainedModel, input_ids: Tensor, kept: numpy.ndarray | None = None
) -> Iterator[Tensor]:
    """[B, T, H] after every layer.

    Args:
        input_ids: [B, T], padding only on the right, where no real token attends to it.
        kept: bool [L, B], the samples that run through each layer. A layer without samples runs on one and
            changes nothing: ranks that share the weights must all call it, forwards and backwards, and layers
            of transformers fail on an empty batch.
    """
    base = model.base_model
    hidden = base.embed_tokens(input_ids)
    types = attention_types(model.config)
    arguments = {kind: _attention_arguments(model, kind, hidden) for kind in set(types)}
    runs = [None] * len(base.layers) if kept is None else _rows(kept, hidden.device)
    for index, (layer, kind, rows) in enumerate(zip(base.layers, types, runs, strict=True)):
        if rows is None:
            hidden = layer(hidden, **arguments[kind])
        else:
            before = hidden[rows]
            after = layer(before, **arguments[kind]).to(hidden.dtype)
            if kept is not None and not kept[index].any():
                after = torch.where(torch.zeros_like(after, dtype=torch.bool), after, before)
            hidden = hidden.index_copy(0, rows, after)
        yield hidden


def _attention_arguments(model: PreTrainedModel, kind: AttentionType, hidden: Tensor) -> Mapping[str, object]:
    """The arguments of a layer beside [B, T, H] hidden states."""
    width = hidden.shape[1]
    mask = None
    positions = torch.arange(width, device=hidden.device)
    window = kind.window if kind.window is not None and width > kind.window else None
    if window is not None or model.config._attn_implementation == "eager":  # else sdpa masks by itself
        mask = causal_mask(positions, positions, window, hidden.dtype)[None, None]
    rotary = cos_and_sin(model.base_model.rotary_emb, hidden, positions[None], kind.rotation)
    return {"attention_mask": mask, "position_embeddings": rotary}


def _rows(kept: numpy.ndarray, device: torch.device) -> list[Tensor | None]:
    """The samples that each layer runs on; None: all. One copy to the device, without waiting."""
    by_layer = [row.nonzero()[0].tolist() or [0] for row in kept]
    together = on_device([sample for rows in by_layer for sample in rows], device)
    parts = together.split([len(rows) for rows in by_layer])
    return [None if row.all() else part for row, part in zip(kept, parts, strict=True)]
