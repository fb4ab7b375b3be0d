"""Supported models and the length of their context, by their config alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Family(NamedTuple):
    """A kind of models. Early exits and n-grams draft for all of them."""

    name: str  # on pages
    is_fused: bool = False  # its layers run as fused layers, and have copies in four bits


# By `config.model_type`: decoders with a stack of residual layers between an unscaled embedding and a plain
# `lm_head(norm(x))`. tests/test_llama_model_utils.py compares each with its own `model(...)`.
FAMILIES: Mapping[str, Family] = {
    "llama": Family("Llama", is_fused=True),
    "mistral": Family("Mistral", is_fused=True),
    "ministral": Family("Ministral", is_fused=True),
    "qwen2": Family("Qwen2", is_fused=True),
    "qwen3": Family("Qwen3", is_fused=True),
    "seed_oss": Family("Seed-OSS", is_fused=True),
    "arcee": Family("Arcee"),
    "ernie4_5": Family("ERNIE 4.5"),
    "exaone4": Family("EXAONE 4"),
    "gemma": Family("Gemma"),
    "glm": Family("GLM"),
    "glm4": Family("GLM-4"),
    "helium": Family("Helium"),
    "hunyuan_v1_dense": Family("Hunyuan"),
    "olmo": Family("OLMo"),
    "olmo2": Family("OLMo 2"),
    "phi3": Family("Phi-3"),
    "smollm3": Family("SmolLM3"),
    "stablelm": Family("StableLM"),
    "starcoder2": Family("StarCoder2"),
}

SUPPORTED_ATTENTION = ("sdpa", "eager")


class AttentionType(NamedTuple):
    """What the attention of some layers has in common."""

    window: int | None = None  # positions that a token sees, its own included; None: all up to its own
    rotation: str | None = None  # the layer type that the rotary embedding is asked for; None: it has one


def check_supported(config: Any) -> None:
    """Raises ValueError that names the model type or attention, and lists the supported ones."""
    attention = getattr(config, "_attn_implementation", None) or "sdpa"
    for what, value, supported in (
        ("model type", config.model_type, FAMILIES),
        ("attn_implementation", attention, SUPPORTED_ATTENTION),
    ):
        if value not in supported:
            raise ValueError(f"{what} {value!r} is not supported; supported are {', '.join(supported)}")


def has_fused_layers(config: Any) -> bool:
    """Whether plain layers of this kind of model run as fused layers."""
    family = FAMILIES.get(config.model_type)
    return family is not None and family.is_fused


def context_length(config: Any) -> int:
    """Positions of the model, for prompt and output together."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # Beyond its original context it rotates the whole past by other frequencies; cached keys are rotated.
        return rope.get("original_max_position_embeddings", config.max_position_embeddings)
    return config.max_position_embeddings


def attention_types(config: Any) -> list[AttentionType]:
    """[L] of each layer."""
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    window, rope = getattr(config, "sliding_window", None), getattr(config, "rope_parameters", None) or {}
    return [
        AttentionType(window if kind == "sliding_attention" else None, kind if kind in rope else None)
        for kind in types
    ]
