"""Shapes of real Llamas, and random weights whose early exits agree with the model at a given rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from self_speculation.model.full_forward import hidden_after_each_layer

# Standard deviation of the logits: as peaked as a trained model, so sampled drafts are accepted about
# as often as greedy ones.
_LOGIT_SPREAD = 6.0
# Standard deviation of the embeddings. A smaller one makes outputs repeat a few tokens, since the next token
# hardly depends on the last one.
_EMBEDDING_SPREAD = 4.0
_POSITIONS, _HALVINGS = 512, 12  # compared positions; steps of the bisection


def llama(
    hidden: int, inside: int, layers: int, heads: int, kv_heads: int, vocabulary: int, tied: bool
) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=inside, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=tied,
        max_position_embeddings=8192,
    )  # fmt: skip


MODELS = {
    "Llama-3.2-1B": llama(2048, 8192, 16, 32, 8, 128256, True),
    "Llama-2-7B": llama(4096, 11008, 32, 32, 32, 32000, False),
    "Llama-3-8B": llama(4096, 14336, 32, 32, 8, 128256, False),
    "Llama-3-70B": llama(8192, 28672, 80, 64, 8, 128256, False),
}


@torch.no_grad()
def random_llama(
    config: LlamaConfig, exit_layer: int, agreement: float, device: torch.device, seed: int = 0
) -> tuple[PreTrainedModel, float]:
    """A bf16 model, made on the device, and the rate at which its exit picks the model's own token."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=_LOGIT_SPREAD / config.hidden_size**0.5)
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=_EMBEDDING_SPREAD)
    ids = torch.randint(config.vocab_size, (1, _POSITIONS), device=device)
    low, high, scale = 1e-4, 1e3, 1.0
    for _ in range(_HALVINGS):
        wanted = math.sqrt(low * high)
        scale_down(model, exit_layer, wanted / scale)
        scale = wanted
        is_low = (found := _agreement(model, exit_layer, ids)) < agreement
        low, high = (low, scale) if is_low else (scale, high)
    return model, found


def scale_down(model: Any, first: int, factor: float) -> None:
    """Scale the outputs of the layers from `first` on."""
    for layer in model.base_model.layers[first:]:
        layer.self_attn.o_proj.weight.data *= factor
        layer.mlp.down_proj.weight.data *= factor


def _agreement(model: PreTrainedModel, exit_layer: int, ids: torch.Tensor) -> float:
    head, norm = model.get_output_embeddings(), model.base_model.norm
    picked = [
        head(norm(hidden)).argmax(-1)
        for number, hidden in enumerate(hidden_after_each_layer(model, ids), 1)
        if number in (exit_layer, model.config.num_hidden_layers)
    ]
    return float((picked[0] == picked[1]).float().mean())
