"""Strategies by name."""

from self_speculation.autoregressive_generator import AutoRegressiveGenerationStrategy
from self_speculation.engine.scheduler import DecodingStrategy
from self_speculation.self_speculation_generator import (
    AdaptiveGenerationStrategy,
    SelfSpeculativeGenerationStrategy,
)

_STRATEGIES: dict[str, type[DecodingStrategy]] = {
    "autoregressive": AutoRegressiveGenerationStrategy,
    "self_speculative": SelfSpeculativeGenerationStrategy,
    "adaptive": AdaptiveGenerationStrategy,
}


def make_strategy(name: str) -> DecodingStrategy:
    """Make the strategy of that name. Raises ValueError if there is none."""
    if name not in _STRATEGIES:
        raise ValueError(f"generation_strategy {name!r}: must be one of {', '.join(_STRATEGIES)}")
    return _STRATEGIES[name]()
