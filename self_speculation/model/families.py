"""Which models can be driven layer by layer, and how long their context is; told by their config alone."""

from __future__ import annotations

from typing import Any

# `config.model_type` of the decoders that are a stack of residual layers between an unscaled embedding and a
# plain `lm_head(norm(x))`. Every one of them is compared with its own `model(...)` in
# tests/test_llama_model_utils.py.
SUPPORTED_MODEL_TYPES = (
    "llama", "mistral", "qwen2", "qwen3", "smollm3", "arcee", "ernie4_5", "exaone4", "gemma", "glm", "glm4",
    "helium", "hunyuan_v1_dense", "ministral", "olmo", "olmo2", "phi3", "seed_oss", "stablelm", "starcoder2",
)  # fmt: skip

SUPPORTED_ATTENTION = ("sdpa", "eager")


def check_supported(config: Any) -> None:
    """Refuse a model that cannot be driven layer by layer.

    Raises:
        ValueError: names the model type or attention implementation and lists the supported ones.
    """
    if config.model_type not in SUPPORTED_MODEL_TYPES:
        raise ValueError(
            f"model type {config.model_type!r} is not supported; supported are "
            + ", ".join(SUPPORTED_MODEL_TYPES)
        )
    attention = getattr(config, "_attn_implementation", None)
    if attention not in (None, *SUPPORTED_ATTENTION):
        raise ValueError(
            f"attn_implementation {attention!r} is not supported; supported are "
            + ", ".join(SUPPORTED_ATTENTION)
        )


def context_length(config: Any) -> int:
    """How many positions (prompt and output together) the model's position embedding covers."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # Beyond its original context such a model re-reads the whole past with other frequencies, which no
        # cache of rotated keys can follow.
        return rope.get("original_max_position_embeddings", config.max_position_embeddings)
    return config.max_position_embeddings


def sliding_window(config: Any) -> int | None:
    """How many positions some of the layers attend to; None where all attend to everything."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and "sliding_attention" not in layer_types:
        return None
    return getattr(config, "sliding_window", None)


def attended_length(config: Any) -> int:
    """How many positions a sequence may have such that every layer attends to all of them."""
    return min(context_length(config), sliding_window(config) or context_length(config))


def check_window(config: Any, num_positions: int) -> None:
    """Refuse a generation of `num_positions` (prompt and output) in which a sliding window would hide some.

    Raises:
        ValueError: names the window.
    """
    window = sliding_window(config)
    if window is not None and num_positions > window:
        raise ValueError(
            f"prompt and max_steps need {num_positions} positions, but this {config.model_type} model has a "
            f"sliding window of {window}; only full attention is supported, so at most {window} positions"
        )
