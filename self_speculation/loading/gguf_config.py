"""Configs of models in `.gguf` files. Does not know weights, except factors of rotations."""

import math
from collections.abc import Mapping

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.integrations import GGUF_CONFIG_DEFAULTS_MAPPING, GGUF_CONFIG_MAPPING

from self_speculation.loading.gguf_files import ROTATION_TENSORS, read_tensor
from self_speculation.loading.gguf_header import Header, TensorInfo
from self_speculation.models.families import FAMILIES

# Families by their names in files, where those differ.
_FAMILIES = {"gemma3": "gemma3_text", "qwen3moe": "qwen3_moe"}

# Keys that transformers' reader lacks for a family.
_OF_ALL = {
    "rope.freq_base": "rope_theta",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "final_logit_softcapping": "final_logit_softcapping",
}

# Families that rotate only a part of each head.
_ROTATE_PARTS = ("phi3", "stablelm")

_BETAS = ("beta_fast", "beta_slow")  # of YaRN

# Keys that are read, without `rope.`; `finetuned` changes nothing.
_ROPE_KEYS = {
    "freq_base", "freq_base_swa", "dimension_count", "scale_linear", "scaling.type", "scaling.factor",
    "scaling.attn_factor", "scaling.original_context_length", "scaling.finetuned", "scaling.yarn_attn_factor",
    "scaling.yarn_beta_fast", "scaling.yarn_beta_slow",
}  # fmt: skip


def config_of(header: Header, given: Mapping[str, object]) -> PretrainedConfig:
    """The config of a file's model, with further settings.

    Raises:
        ValueError: another family, no vocabulary, a rotation that is not supported, or a setting that the
            family does not have.
    """
    metadata = header.metadata
    architecture = metadata["general.architecture"]
    tensors = {tensor.name: tensor for tensor in header.tensors}
    family = _FAMILIES.get(architecture, architecture)
    known = GGUF_CONFIG_MAPPING.get(architecture) or GGUF_CONFIG_MAPPING.get(family)
    if known is None or family not in FAMILIES:
        raise ValueError(f"model type {family!r} is not supported in .gguf files")
    if "tokenizer.ggml.tokens" not in metadata:
        raise ValueError("the file has no tokenizer (tokenizer.ggml.tokens)")
    names = {f"{architecture}.{key}": name for key, name in (known | _OF_ALL).items()}
    names |= {f"tokenizer.{key}": name for key, name in GGUF_CONFIG_MAPPING["tokenizer"].items()}
    settings = {
        "vocab_size": metadata["tokenizer.ggml.tokens"],
        "tie_word_embeddings": "output.weight" not in tensors,
        **GGUF_CONFIG_DEFAULTS_MAPPING.get(family, {}),
        **{name: metadata[key] for key, name in names.items() if name and key in metadata},
    }
    if settings.get("sliding_window") == 0:  # files of Phi-4: there is none
        settings["sliding_window"] = None
    width = settings["hidden_size"] // settings["num_attention_heads"]
    if family == "stablelm":
        settings["use_qkv_bias"] = "blk.0.attn_q.bias" in tensors
        settings["use_parallel_residual"] = "blk.0.ffn_norm.weight" not in tensors
    head_dim = settings.get("head_dim", width)
    if family == "gemma3_text":  # by no key; 27B has 62 layers
        settings["query_pre_attn_scalar"] = width if settings["num_hidden_layers"] == 62 else head_dim
    settings |= _rotation(header, tensors, family, head_dim)
    config = AutoConfig.for_model(family, **settings)
    for name in given.keys() - {"dtype"}:
        if name == "torch_dtype" or not (hasattr(config, name) or hasattr(config, f"_{name}")):
            raise ValueError(f"model_args {name}: a .gguf file takes dtype and settings of the config")
    return AutoConfig.for_model(family, **{**settings, **given})


def _rotation(
    header: Header, tensors: Mapping[str, TensorInfo], family: str, head_dim: int
) -> dict[str, object]:
    """Settings of a config that rotates as llama.cpp does.

    llama.cpp divides each frequency by the file's factor and by the tensor's divisor. transformers calls this
    `longrope`.

    Raises:
        ValueError: a key that is not read, or a rotation that transformers does not have.
    """
    architecture = header.metadata["general.architecture"]
    prefix = f"{architecture}.rope."
    rope = {key[len(prefix) :]: value for key, value in header.metadata.items() if key.startswith(prefix)}

    def refuse_unless(is_supported: bool, key: str) -> None:
        if not is_supported:
            raise ValueError(
                f"{prefix}{key} {rope[key]!r} in a {family} file: such rotations are not supported"
            )

    def divisors(name: str) -> list[float]:
        if name not in tensors:
            raise ValueError(f"{name} is missing")
        numbers = read_tensor(header.path, tensors[name], torch.float32) * factor
        if len(numbers) != rotated // 2:
            raise ValueError(f"{name} has {len(numbers)} numbers, not {rotated // 2}")
        return numbers.tolist()

    for key in rope:
        refuse_unless(key in _ROPE_KEYS, key)
    by_type = family == "gemma3_text"
    refuse_unless(by_type or "freq_base_swa" not in rope, "freq_base_swa")
    rotated = rope.get("dimension_count", head_dim)
    refuse_unless(rotated == head_dim or family in _ROTATE_PARTS, "dimension_count")
    settings = {"partial_rotary_factor": rotated / head_dim} if family in _ROTATE_PARTS else {}
    kind = rope.get("scaling.type", "linear")
    refuse_unless(kind in ("none", "linear", "yarn", "longrope"), "scaling.type")
    factor = 1.0 if kind == "none" else rope.get("scaling.factor", rope.get("scale_linear")) or 1.0
    magnitude = rope.get("scaling.attn_factor", 1.0)
    context = header.metadata[f"{architecture}.context_length"]
    original = rope.get("scaling.original_context_length", context)
    has_one = ROTATION_TENSORS[0] in tensors  # for all lengths
    by_length = ROTATION_TENSORS[:1] * 2 if has_one else ROTATION_TENSORS[1:]
    scaling: dict[str, object] = {}
    if any(name in tensors for name in by_length):
        refuse_unless(kind != "yarn", "scaling.type")
        short, long = (divisors(name) for name in by_length)
        original = context if has_one else original
        scaling = {"rope_type": "longrope", "factor": context / original, "attention_factor": magnitude}
        scaling |= {"short_factor": short, "long_factor": long}
        if family == "phi3":
            settings["original_max_position_embeddings"] = original
    elif kind == "yarn":
        magnitude *= rope.get("scaling.yarn_attn_factor", 1 + 0.1 * math.log(max(1.0, factor)))
        scaling = {"rope_type": "yarn", "factor": factor, "attention_factor": magnitude}
        scaling |= {beta: rope[key] for beta in _BETAS if (key := f"scaling.yarn_{beta}") in rope}
    else:
        refuse_unless(magnitude == 1, "scaling.attn_factor")
        scaling = {"rope_type": "linear", "factor": factor} if factor != 1 else {}
    if scaling.get("rope_type") in ("longrope", "yarn"):
        scaling["original_max_position_embeddings"] = original
    if by_type:
        window_scaling = {"rope_type": "default", "rope_theta": rope.get("freq_base_swa", 10000.0)}
        scaling = {"full_attention": scaling or {"rope_type": "default"}, "sliding_attention": window_scaling}
    return {**settings, "rope_parameters": scaling} if scaling else settings
