"""Which runner a model decodes by."""

from __future__ import annotations

import warnings

from transformers import PretrainedConfig, PreTrainedModel

from self_speculation.families import FUSED_FAMILIES
from self_speculation.model_cache import evict, singleton
from self_speculation.passes.captured_runner import CapturedPasses, CapturedRunner
from self_speculation.passes.fused_layers import Settings
from self_speculation.passes.in_place_runner import InPlaceRunner
from self_speculation.passes.model_runner import ModelRunner
from self_speculation.weights.experts import experts_per_token


def make_runner(model: PreTrainedModel) -> ModelRunner:
    """The runner with the least work for the host: captured passes, passes in place, or plain ones."""
    if is_captured(model):
        return CapturedRunner(model)
    return (InPlaceRunner if model.device.type == "cpu" else ModelRunner)(model)


def capture_decoding(model: PreTrainedModel) -> None:
    """From now on `make_runner` captures for this model. Warns if its passes cannot be captured here.

    Raises:
        ValueError: the model is on several devices, or no pass of it can be captured anywhere.
    """
    check_can_be_captured(model.config)
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise ValueError("compile True: needs the whole model on one GPU")
    if (why := ModelRunner(model).why_no_kernels) is not None:
        warnings.warn(f"compile True: passes are not captured, since {why}", stacklevel=2)
    else:
        singleton(model, Settings).is_captured = True
    evict(model, CapturedPasses)


def check_can_be_captured(config: PretrainedConfig) -> None:
    """Raises ValueError for families that are not fused, quantised weights, and experts, whose kernels depend
    on what tokens choose.
    """
    if experts_per_token(config) is not None:
        raise ValueError(f"compile True: not with a mixture of experts ({config.model_type})")
    if config.model_type not in FUSED_FAMILIES:
        families = ", ".join(FUSED_FAMILIES)
        raise ValueError(f"compile True: model type {config.model_type!r} is not one of {families}")
    quantized = getattr(config, "quantization_config", None) or {}
    settings = quantized if isinstance(quantized, dict) else vars(quantized)
    if (method := settings.get("quant_method", "gguf")) != "gguf":  # whose weights are in 16 bits here
        raise ValueError(f"compile True: not with quantised weights ({getattr(method, 'value', method)})")


def is_captured(model: PreTrainedModel) -> bool:
    return singleton(model, Settings).is_captured
