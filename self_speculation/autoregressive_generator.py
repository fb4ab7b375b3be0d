"""Autoregressive decoding: one pass per token, at full depth or up to an exit layer."""

from self_speculation.config import GenerationStrategyName
from self_speculation.engine.replayed_rounds import replay_round
from self_speculation.engine.scheduler import DecodingStrategy, RoundInputs


class AutoRegressiveGenerationStrategy(DecodingStrategy):
    """Runs layers 0..exit_layer-1 (all if it is -1), norm and head once for each token."""

    name: GenerationStrategyName = "autoregressive"

    def decode_round(self, inputs: RoundInputs) -> None:
        """Reads from the device: one."""
        runner, prefix_cache, batch, end_layer, _ = inputs
        cache = prefix_cache.cache
        if replay_round(runner, cache, batch, end_layer):
            return
        logits = runner.run(cache, batch.last_tokens[:, None], 0, end_layer).logits
        batch.commit_previous_and_sample(logits[:, 0])
