"""Which runner a model decodes by, as callers have set it."""

import warnings

import torch
from transformers import PretrainedConfig, PreTrainedModel

from self_speculation.backends import card_runner
from self_speculation.backends.captures import CapturedRunner
from self_speculation.backends.card_runner import FusedRunner, JointWeights
from self_speculation.backends.cpu_runner import InPlaceRunner, InPlaceWeights
from self_speculation.backends.layers import FusedWeights
from self_speculation.backends.runner import ModelRunner
from self_speculation.backends.unsupported_hooks import check_followed
from self_speculation.models.families import LLAMA_LAYOUT, check_supported, key_shape
from self_speculation.models.model_cache import kept, lock, peek, release


def make_runner(model: PreTrainedModel) -> ModelRunner:
    """The runner with the least work for the host."""
    if not is_captured(model):
        return eager_runner(model)
    # The model may have moved to a device without kernels since.
    _, head_dim = key_shape(model.config)
    why_not = card_runner.why_no_kernels(model.device, model.dtype, head_dim)
    return CapturedRunner(model) if why_not is None else eager_runner(model)


def eager_runner(model: PreTrainedModel) -> ModelRunner:
    """A runner that captures nothing."""
    if model.device.type != "cpu":
        return FusedRunner(model)
    weights = InPlaceWeights.of(model)
    return InPlaceRunner(model) if weights.replaced else ModelRunner(model, weights)


def _weights(model: PreTrainedModel) -> FusedWeights:
    """What is made of the model's weights."""
    return (InPlaceWeights if model.device.type == "cpu" else JointWeights).of(model)


def fuse(model: PreTrainedModel) -> int:
    """Decode this model by the layers of this library from now on, as it is now. On a CPU one operator reads
    the weights where they lie. On a GPU layers are fused, and weights of the same input lie side by side.

    Plain layers of Llama's layout with sdpa attention are replaced; quantised, offloaded, hooked and
    adapter-wrapped modules are not. On a CPU a model is replaced as a whole or not at all, and the output is
    a float32 model's.

    Call it again after a change that `weights_key` does not see: a write through `.data`, a hook, another
    `forward`, activation, buffer or number. What was made of the model is then made anew. For a model
    with layers of transformers, `release` does the same.

    Returns:
        The number of layers that were replaced.

    Raises:
        ValueError: the model is not supported, or has code around the layers, which passes do not follow.
    """
    check_followed(model)
    check_supported(model.config)
    with lock(model):
        kept(model)["is_fused"] = True
        release(model)
        replaced = _weights(model).replaced
    return sum(layer in replaced for layer in model.base_model.layers)


def activation_dtype(model: PreTrainedModel) -> torch.dtype:
    """The dtype of activations, keys, values and logits."""
    return _weights(model).dtype


def bytes_made(model: PreTrainedModel) -> int:
    """Bytes of all copies of a model's weights, which draft."""
    weights = peek(model, FusedWeights)
    return sum(copy.num_bytes for copy in weights.copies.values()) if weights else 0


def capture_decoding(model: PreTrainedModel) -> None:
    """From now on `make_runner` captures for this model. Warns if passes cannot be captured here.

    Raises:
        ValueError: the model is on several devices, or no pass of it can be captured anywhere.
    """
    check_can_be_captured(model.config)
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise ValueError("compile True: needs the whole model on one GPU")
    if (why := capture_where_possible(model)) is not None:
        warnings.warn(f"compile True: passes are not captured, since {why}", stacklevel=2)


def capture_where_possible(model: PreTrainedModel) -> str | None:
    """As `capture_decoding`; returns why nothing is captured. None: passes are."""
    try:
        check_can_be_captured(model.config)
    except ValueError as error:
        return str(error).removeprefix("compile True: ")
    if (why := FusedRunner(model).why_no_kernels) is None:
        kept(model)["is_captured"] = True
    return why


def check_can_be_captured(config: PretrainedConfig) -> None:
    """Raises ValueError for families that are not fused, and for quantised weights."""
    if config.model_type not in LLAMA_LAYOUT:
        families = ", ".join(LLAMA_LAYOUT)
        raise ValueError(f"compile True: model type {config.model_type!r} is not one of {families}")
    quantized = getattr(config, "quantization_config", None) or {}
    settings = quantized if isinstance(quantized, dict) else vars(quantized)
    if (method := settings.get("quant_method", "gguf")) != "gguf":  # whose weights are in 16 bits here
        raise ValueError(f"compile True: not with quantised weights ({getattr(method, 'value', method)})")


def is_captured(model: PreTrainedModel) -> bool:
    return kept(model).get("is_captured", False)
