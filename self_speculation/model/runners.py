"""Which runner a model has: plain, traced or captured passes."""

from __future__ import annotations

from transformers import PreTrainedModel

from self_speculation.model.captured_runner import CapturedRunner, is_captured, num_captures
from self_speculation.model.model_runner import ModelRunner
from self_speculation.model.traced_runner import TracedRunner, num_traces


def make_runner(model: PreTrainedModel) -> ModelRunner:
    """The runner with the least work for the host."""
    if is_captured(model):
        return CapturedRunner(model)
    return (TracedRunner if model.device.type == "cpu" else ModelRunner)(model)


def num_prepared(model: PreTrainedModel) -> int:
    """Passes that were ever traced or captured. A round that prepares one takes ten times as long."""
    return num_traces(model) + num_captures(model)
