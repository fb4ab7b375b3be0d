"""One token per pass, at full depth or from an early exit."""

from __future__ import annotations

from transformers import PreTrainedModel

from self_speculation.config import GenerationConfig, GenerationStrategyName
from self_speculation.decoding.output import Output
from self_speculation.decoding.rows import Rows
from self_speculation.decoding_strategy import Decoding, DecodingStrategy
from self_speculation.model.compiled import make_decoder
from self_speculation.model.decoder import Decoder, forward_early


class AutoRegressiveGenerationStrategy(DecodingStrategy):
    """Layers 0..exit_layer-1 (all of them when it is -1), then norm and head, once for every token."""

    name: GenerationStrategyName = "autoregressive"
    has_drafts = False

    def begin(
        self, model: PreTrainedModel, rows: Rows, first: Output, config: GenerationConfig, batch_size: int
    ) -> Decoding:
        decoder = make_decoder(model, len(first.prompt), first.max_length, num_rows=batch_size)
        depth = len(decoder.layers) if config.exit_layer == -1 else config.exit_layer
        return Decoding(decoder, depth, lambda: step_by_step(decoder, rows, depth))


def step_by_step(decoder: Decoder, rows: Rows, depth: int) -> None:
    """One token of each row after the other until a row ends; each step takes one read from the device."""
    while rows.all_go_on:
        rows.emit(forward_early(decoder, rows.last, depth).logits[:, 0])
