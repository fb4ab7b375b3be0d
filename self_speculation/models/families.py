"""Supported models and the length of their context, by their config alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PretrainedConfig


# By `config.model_type`, their names on pages: decoders with a stack of residual layers between an unscaled
# embedding and a plain `lm_head(norm(x))`. tests/test_llama_model_utils.py compares each with
# `model(...)`.
FAMILIES: Mapping[str, str] = {
    "llama": "Llama",
    "mistral": "Mistral",
    "ministral": "Ministral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "seed_oss": "Seed-OSS",
    "gemma3_text": "Gemma 3 (text)",
    "arcee": "Arcee",
    "ernie4_5": "ERNIE 4.5",
    "exaone4": "EXAONE 4",
    "gemma": "Gemma",
    "glm": "GLM",
    "glm4": "GLM-4",
    "helium": "Helium",
    "hunyuan_v1_dense": "Hunyuan",
    "mixtral": "Mixtral",
    "olmo": "OLMo",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "olmoe": "OLMoE",
    "phi3": "Phi-3",
    "qwen3_moe": "Qwen3 MoE",
    "smollm3": "SmolLM3",
    "stablelm": "StableLM",
    "starcoder2": "StarCoder2",
}

# Families with layers of Llama's layout, which backends/layers.py describes: the library has layers for them.
LLAMA_LAYOUT = ("llama", "mistral", "ministral", "qwen2", "qwen3", "seed_oss", "gemma3_text")

SUPPORTED_ATTENTION = ("sdpa", "eager")


class AttentionType(NamedTuple):
    """What the attention of several layers has in common."""

    # Positions that a token sees, the token's included; None: all up to the token's.
    window: int | None = None
    rotation: str | None = None  # the layer type that the rotary embedding is asked for; None: it has one


def check_supported(config: PretrainedConfig) -> None:
    """Raises ValueError that names the model type or attention, and lists the supported ones, or names a
    setting that no pass heeds.
    """
    attention = getattr(config, "_attn_implementation", None) or "sdpa"
    for what, value, supported in (
        ("model type", config.model_type, FAMILIES),
        ("attn_implementation", attention, SUPPORTED_ATTENTION),
    ):
        if value not in supported:
            raise ValueError(f"{what} {value!r} is not supported; supported are {', '.join(supported)}")
    for name in ("final_logit_softcapping", "use_bidirectional_attention"):
        if value := getattr(config, name, None):
            raise ValueError(f"{name} {value!r} of a {config.model_type} model is not supported, only none")


def key_shape(config: PretrainedConfig) -> tuple[int, int]:
    """kv_heads and head_dim"""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_key_value_heads, head_dim


def context_length(config: PretrainedConfig) -> int:
    """Positions of the model, for prompt and output together."""
    rope = _scaled_rotation(config)
    positions = config.max_position_embeddings
    original = rope.get("original_max_position_embeddings", positions)
    if rope.get("rope_type") == "longrope":
        # Beyond the original context it rotates the whole past by other frequencies; cached keys are rotated.
        return original
    if rope.get("rope_type") == "yarn":  # model cards add it and leave max_position_embeddings as it was
        return max(positions, int(original * rope["factor"]))
    return positions


def no_room(length: str, config: PretrainedConfig) -> str:
    """The message for a prompt that leaves no position for an output."""
    context = f"the model's context of {context_length(config)} tokens"
    return f"the prompt has {length} and leaves no room in {context}"


def scale_rotation(config: PretrainedConfig, scaling: Any) -> None:
    """Set the rotation of a config to a `rope_scaling`, as model cards write it. In models with a rotation
    for each layer type, `scaling` is for full attention.

    Raises:
        ValueError: it rotates by the length of a sequence, or lacks a number.
    """
    kinds = ("linear", "llama3", "yarn")
    kind = scaling.get("rope_type", scaling.get("type")) if isinstance(scaling, Mapping) else None
    if kind not in kinds:
        must = f"must be a dictionary whose rope_type is one of {', '.join(kinds)}"
        raise ValueError(f"model_args rope_scaling {scaling!r}: {must}")
    before = _scaled_rotation(config)
    kept = {name: before[name] for name in ("rope_theta", "partial_rotary_factor") if name in before}
    if kind != "linear":
        kept["original_max_position_embeddings"] = config.max_position_embeddings
    scaled = {**kept, **scaling, "rope_type": kind}
    by_type = "full_attention" in config.rope_parameters
    config.rope_parameters = {**config.rope_parameters, "full_attention": scaled} if by_type else scaled
    config.validate_rope()


def _scaled_rotation(config: PretrainedConfig) -> Mapping[str, Any]:
    """`rope_parameters`, of full attention where each layer type has a rotation."""
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("full_attention") or rope


def declared(config: PretrainedConfig, name: str) -> Any:
    """A setting; None if the family has no such setting. A config file may hold settings of another family,
    such as the one that the model was converted from: the layers ignore them.
    """
    kind: Callable[..., object] = type(config)
    return getattr(config, name, None) if name in _settings(kind) else None


def experts_per_token(config: PretrainedConfig) -> int | None:
    """How many of a layer's `num_experts` a token chooses; None: the model is dense."""
    return declared(config, "num_experts_per_tok")


@cache
def _settings(kind: Callable[..., object]) -> frozenset[str]:
    """The names of a family's settings. `inspect` takes a third of a millisecond."""
    return frozenset(inspect.signature(kind).parameters)


def attention_types(config: PretrainedConfig) -> list[AttentionType]:
    """[L] of each layer."""
    window = declared(config, "sliding_window")
    if not (types := declared(config, "layer_types")):
        return [AttentionType(window)] * config.num_hidden_layers
    rope = getattr(config, "rope_parameters", None) or {}
    return [
        AttentionType(window if kind == "sliding_attention" else None, kind if kind in rope else None)
        for kind in types
    ]
