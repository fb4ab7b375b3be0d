"""Early-exit inference and self-speculative decoding of Llama-type models (LayerSkip, arXiv 2404.16710)."""

from self_speculation.adaptive_generator import AdaptiveGenerationStrategy
from self_speculation.autoregressive_generator import AutoRegressiveGenerationStrategy
from self_speculation.custom_generate import self_speculative_generate
from self_speculation.generator_base import (
    GenerationConfig,
    GenerationResult,
    GenerationStrategy,
    GenerationStrategyResult,
    HuggingfaceLlamaGenerator,
)
from self_speculation.loading import LoadingError, load_model_and_tokenizer
from self_speculation.sampling import Sampler, Verdict, decode_next_token, top_k_top_p_filtering, verify_draft
from self_speculation.self_speculation_generator import SelfSpeculativeGenerationStrategy
from self_speculation.speculative_streamer import SpeculativeTextStreamer, StandardTextStreamer
from self_speculation.strategies import make_strategy

__all__ = [
    "AdaptiveGenerationStrategy",
    "AutoRegressiveGenerationStrategy",
    "GenerationConfig",
    "GenerationResult",
    "GenerationStrategy",
    "GenerationStrategyResult",
    "HuggingfaceLlamaGenerator",
    "LoadingError",
    "Sampler",
    "SelfSpeculativeGenerationStrategy",
    "SpeculativeTextStreamer",
    "StandardTextStreamer",
    "Verdict",
    "decode_next_token",
    "load_model_and_tokenizer",
    "make_strategy",
    "self_speculative_generate",
    "top_k_top_p_filtering",
    "verify_draft",
]
