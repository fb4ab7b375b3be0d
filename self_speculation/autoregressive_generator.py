"""One token per pass, at full depth or from an early exit."""

from __future__ import annotations

from transformers import PreTrainedModel

from self_speculation.config import GenerationConfig, GenerationStrategyName
from self_speculation.decoding.output import Output
from self_speculation.decoding.sampling import Sampler
from self_speculation.generator_base import DecodingStrategy
from self_speculation.model.compiled import make_decoder
from self_speculation.model.decoder import Decoder, forward_early, prefill


class AutoRegressiveGenerationStrategy(DecodingStrategy):
    """Layers 0..exit_layer-1 (all of them when it is -1), then norm and head, once for every token."""

    name: GenerationStrategyName = "autoregressive"

    def decode(self, model: PreTrainedModel, output: Output, config: GenerationConfig) -> None:
        decoder = make_decoder(model, len(output.prompt), output.max_length)
        sampler = Sampler.of(config)
        depth = len(decoder.layers) if config.exit_layer == -1 else config.exit_layer
        output.emit(prefill(decoder, output.history(), depth).logits[0], sampler)
        step_by_step(decoder, output, sampler, depth)


def step_by_step(decoder: Decoder, output: Output, sampler: Sampler, depth: int) -> None:
    """One token after the other until the output ends; each takes one read from the device."""
    while output.remaining:
        output.emit(forward_early(decoder, output.last(), depth).logits[0], sampler)
