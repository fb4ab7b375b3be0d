"""Timed generation of one example, by one strategy or by several in turn."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from runs.records import Record
from self_speculation import GenerationConfig, HuggingfaceLlamaGenerator

BASELINE = "autoregressive_"  # prefix of the fields of the strategy that another is compared with

# One of the strategies compared: the prefix of its fields in the record, what generates, and how.
Side = tuple[str, HuggingfaceLlamaGenerator, GenerationConfig]


def measure_example(sides: Sequence[Side], prompt: str | list[int], index: int, seed: int) -> Record:
    """What each side makes of a prompt, and how long it takes; the sides take turns at going first.

    The outcome depends on prompt, index and seed alone, not on what was generated before.
    """
    record: Record = {}
    for prefix, generator, config in sides[:: 1 if index % 2 else -1]:
        torch.manual_seed(seed + index)
        result = generator.generate(prompt, config)
        took = result.generation_strategy_result
        fields = {
            "prediction": result.decoded_prediction,
            "tokens": took.predicted_tokens,
            "num_tokens": result.num_tokens_generated,
            "num_prompt_tokens": took.num_prompt_tokens,
            "num_decode_tokens": took.num_decode_tokens,
            "stop_reason": took.stop_reason,
            "prefill_time": took.prefill_time,
            "decode_time": took.decode_time,
            "num_verifications": took.num_verifications,
            "drafts_by_source": took.drafts_by_source,
            "drafted_by_position": took.drafted_by_position,
            "judged_by_position": took.judged_by_position,
            "accepted_by_position": took.accepted_by_position,
        }
        record |= {f"{prefix}{name}": value for name, value in fields.items() if value is not None}
    return record
