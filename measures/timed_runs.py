"""Timed generation of one example, by one strategy or by several in turn, and the warm-up before it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from runs.records import Record
from self_speculation import GenerationConfig, GenerationStrategy, HuggingfaceLlamaGenerator
from self_speculation.model.compiled import RUNS_TO_WARM_UP, is_compiled
from self_speculation.model.devices import synchronize
from self_speculation.model.families import attended_length
from self_speculation.results import SourceCounts

T = TypeVar("T")

BASELINE = "autoregressive_"  # prefix of the fields of the strategy that another is compared with

# One of the strategies compared: the prefix of its fields in the record, what generates, and how.
Side = tuple[str, HuggingfaceLlamaGenerator, GenerationConfig]


def warm_up(sides: Sequence[Side], prompt: str | list[int]) -> None:
    """Run the passes that will be timed, by each side, three times each: no more tokens than that takes.

    Args:
        prompt: the longest one that will be timed: compiled passes depend on how much room a cache has.
    """
    for _, generator, config in sides:
        run_every_pass(generator.generation_strategy, generator.model, generator.encode(prompt), config)


def run_every_pass(
    strategy: GenerationStrategy, model: PreTrainedModel, prompt: list[int], config: GenerationConfig
) -> None:
    """The warm-up of one side; a prompt that fills the context is cut."""
    longest = 0 if config.generation_strategy == "autoregressive" else config.longest_draft
    num_tokens = warm_up_tokens(longest)
    ids = prompt[-max(1, attended_length(model.config) - num_tokens) :]
    endless = replace(config, stop_words=None, stop_token_ids=None)

    def generate(settings: GenerationConfig) -> None:
        """End ids are left out too; there is room for all of max_steps, and the output ends long before."""
        strategy.generate_token_ids(
            model, ids, [], settings, ends_text=lambda tokens: len(tokens) >= num_tokens
        )

    generate(endless)
    if is_compiled(model):  # narrower passes too, for drafts that are cut short
        for width in [1 << power for power in range(longest.bit_length())]:
            for _ in range(RUNS_TO_WARM_UP):
                generate(replace(endless, max_steps=width + 1))


def warm_up_tokens(longest_draft: int) -> int:
    """The first one, and as many as three rounds of such drafts emit at most."""
    return RUNS_TO_WARM_UP * (longest_draft + 1) + 1


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
            "drafts_by_source": took.drafts_by_source and _named(took.drafts_by_source),
            "drafted_by_position": took.drafted_by_position,
            "judged_by_position": took.judged_by_position,
            "accepted_by_position": took.accepted_by_position,
        }
        record |= {f"{prefix}{name}": value for name, value in fields.items() if value is not None}
    return record


def _named(counts: Mapping[str, SourceCounts]) -> Record:
    """JSON would make nameless lists of tuples."""
    return {source: each._asdict() for source, each in counts.items()}


def timed(model: PreTrainedModel, call: Callable[..., T], *args: Any) -> tuple[T, float]:
    """What a call returns, and the seconds until every GPU of the model is done with it."""
    synchronize(model)
    started = time.perf_counter()
    result = call(*args)
    synchronize(model)
    return result, time.perf_counter() - started
