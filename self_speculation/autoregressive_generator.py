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
        depth = len(decoder.layers) if config.exit_layer == -1 else config.exit_layer
        return Decoding(rows, decoder, depth)

    def round(self, decoding: Decoding) -> None:
        """One token of each row; one read from the device."""
        rows = decoding.rows
        rows.emit(forward_early(decoding.decoder, rows.last, decoding.depth).logits[:, 0])
