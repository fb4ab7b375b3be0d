"""Which runner a model has: captured passes, passes in place, or plain ones."""

from __future__ import annotations

from transformers import PreTrainedModel

from self_speculation.model.captured_runner import CapturedRunner, is_captured
from self_speculation.model.in_place_runner import InPlaceRunner
from self_speculation.model.model_runner import ModelRunner


def make_runner(model: PreTrainedModel) -> ModelRunner:
    """The runner with the least work for the host."""
    if is_captured(model):
        return CapturedRunner(model)
    return (InPlaceRunner if model.device.type == "cpu" else ModelRunner)(model)
