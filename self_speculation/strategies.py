"""Strategy name -> object; the only dispatch."""

from __future__ import annotations

from self_speculation.adaptive_generator import AdaptiveGenerationStrategy
from self_speculation.autoregressive_generator import AutoRegressiveGenerationStrategy
from self_speculation.generator_base import GenerationStrategy
from self_speculation.self_speculation_generator import SelfSpeculativeGenerationStrategy

_STRATEGIES: dict[str, type[GenerationStrategy]] = {
    strategy.name: strategy
    for strategy in (
        AutoRegressiveGenerationStrategy,
        SelfSpeculativeGenerationStrategy,
        AdaptiveGenerationStrategy,
    )
}


def make_strategy(name: str) -> GenerationStrategy:
    """The strategy of that name.

    Raises:
        ValueError: lists the known names.
    """
    if name not in _STRATEGIES:
        raise ValueError(f"generation_strategy {name!r}: must be one of {', '.join(_STRATEGIES)}")
    return _STRATEGIES[name]()
