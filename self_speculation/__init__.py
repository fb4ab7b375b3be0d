"""Early-exit inference and self-speculative decoding of Llama-type models (LayerSkip, arXiv 2404.16710).

Public names are loaded on first use, so an import of the package, or of config.py alone, is quick.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "AdaptiveGenerationStrategy": "self_speculation_generator",
    "AutoRegressiveGenerationStrategy": "autoregressive_generator",
    "GenerationConfig": "config",
    "GenerationResult": "generator_base",
    "GenerationStrategy": "generator_base",
    "GenerationStrategyResult": "generator_base",
    "HuggingfaceLlamaGenerator": "generator_base",
    "LoadingError": "loading.sources",
    "LoadingOptions": "config",
    "Request": "requests.request",
    "Sampler": "backends.sampling",
    "SelfSpeculativeGenerationStrategy": "self_speculation_generator",
    "SpeculativeTextStreamer": "speculative_streamer",
    "StandardTextStreamer": "speculative_streamer",
    "Thinking": "text.texts",
    "ThreadGovernor": "machine.threads",
    "decode_next_token": "llama_model_utils",
    "default_model": "config",
    "fuse": "backends.runners",
    "govern_threads": "machine.threads",
    "load_model_and_tokenizer": "loading.loading",
    "make_strategy": "engine.strategies",
    "release": "models.model_cache",
    "self_speculative_generate": "custom_generate",
    "top_k_top_p_filtering": "llama_model_utils",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
