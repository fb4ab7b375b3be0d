"""One token per pass, at full depth or from an early exit."""

from __future__ import annotations

from self_speculation.config import GenerationConfig, GenerationStrategyName
from self_speculation.decoding.rows import Rows
from self_speculation.decoding_strategy import Decoding, DecodingStrategy
from self_speculation.model.decoder import Decoder, forward_early


class AutoRegressiveGenerationStrategy(DecodingStrategy):
    """Layers 0..exit_layer-1 (all of them when it is -1), then norm and head, once for every token."""

    name: GenerationStrategyName = "autoregressive"
    has_drafts = False

    def begin(self, decoder: Decoder, rows: Rows, config: GenerationConfig) -> Decoding:
        return Decoding(rows, decoder, config)

    def depth(self, decoding: Decoding) -> int:
        exit_layer = decoding.config.exit_layer
        return len(decoding.decoder.layers) if exit_layer == -1 else exit_layer

    def round(self, decoding: Decoding) -> None:
        """One token of each row; one read from the device."""
        rows = decoding.rows
        rows.emit(forward_early(decoding.decoder, rows.last, self.depth(decoding)).logits[:, 0])
