"""One token per pass, at full depth or from an early exit."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from self_speculation.config import GenerationConfig, GenerationStrategyName
from self_speculation.decoding.output import Output
from self_speculation.decoding.sampling import Sampler
from self_speculation.generator_base import DecodingStrategy
from self_speculation.model.compiled import make_decoder
from self_speculation.model.decoder import forward_early, prefill


class AutoRegressiveGenerationStrategy(DecodingStrategy):
    """Layers 0..exit_layer-1 (all of them when it is -1), then norm and head, once for every token."""

    name: GenerationStrategyName = "autoregressive"

    def decode(self, model: PreTrainedModel, output: Output, config: GenerationConfig) -> dict[str, Any]:
        decoder = make_decoder(model, output.prompt_length, output.max_length)
        sampler = Sampler.of(config)
        depth = len(decoder.layers) if config.exit_layer == -1 else config.exit_layer

        result = prefill(decoder, output.history(), depth)
        while True:
            logits = output.process(result.logits[0])  # [1, V]
            token = sampler(logits).tokens  # [1]
            output.place(token, 0)
            output.commit(token.tolist(), logits)
            if not output.remaining:
                return {}
            result = forward_early(decoder, output.last(), depth)
