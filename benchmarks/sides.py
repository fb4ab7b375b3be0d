"""The sides of a comparison on one loaded model: our strategies by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from measures.timed_runs import TimedSide
from self_speculation import GenerationConfig, GenerationStrategy, HuggingfaceLlamaGenerator, make_strategy

PLAIN, SPECULATIVE, COPY, ADAPTIVE = "without drafts", "self-speculative", "4-bit copy", "adaptive"


def strategies(config: GenerationConfig, copied_layers: int) -> dict[str, GenerationConfig]:
    """Name -> settings of each strategy here.

    Args:
        config: exit layer and draft length of self-speculation.
        copied_layers: layers of the 4-bit copy that drafts.
    """
    chosen = replace(config, exit_layer=-1, num_speculations=-1, draft_confidence=None)
    speculative = replace(config, generation_strategy="self_speculative")
    return {
        PLAIN: replace(chosen, generation_strategy="autoregressive"),
        SPECULATIVE: speculative,
        COPY: replace(speculative, exit_layer=copied_layers, draft_weights="int4"),
        ADAPTIVE: replace(chosen, generation_strategy="adaptive"),
    }


def side(
    name: str, generator: HuggingfaceLlamaGenerator, strategy: GenerationStrategy, config: GenerationConfig
) -> TimedSide:
    """A side with the tokenizer and model of the generator; the prefix of its fields is its name."""
    return f"{name}: ", HuggingfaceLlamaGenerator(generator.tokenizer, generator.model, strategy), config


def ours(generator: HuggingfaceLlamaGenerator, configs: Mapping[str, GenerationConfig]) -> list[TimedSide]:
    """The strategies of these settings."""
    return [side(name, generator, make_strategy(c.generation_strategy), c) for name, c in configs.items()]
