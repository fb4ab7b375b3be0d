"""Autoregressive decoding: one pass per token, at full depth or up to an exit layer."""

from self_speculation.config import GenerationStrategyName
from self_speculation.scheduler import Decoding, DecodingStrategy


class AutoRegressiveGenerationStrategy(DecodingStrategy):
    """Runs layers 0..exit_layer-1 (all if it is -1), norm and head once for each token."""

    name: GenerationStrategyName = "autoregressive"

    def decode_round(self, decoding: Decoding) -> None:
        """Reads from the device: one."""
        batch = decoding.batch
        ids = batch.last_tokens[:, None]
        logits = decoding.runner.run(decoding.cache, ids, 0, decoding.end_layer).logits
        batch.commit_previous_and_sample(logits[:, 0])
