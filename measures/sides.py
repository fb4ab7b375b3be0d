"""Sides of a comparison on one loaded model, called alike: `generate` of transformers and strategies here."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from unittest.mock import patch

import torch
from transformers import PreTrainedModel

from self_speculation import GenerationConfig, GenerationStrategyResult, Request, make_strategy


@dataclass(frozen=True)
class Answer:
    """New ids, and the seconds until the first ones and from there to the last."""

    ids: list[int]
    num_first: int  # ids that came at once, out of the pass over the prompt
    prefill_time: float
    decode_time: float
    result: GenerationStrategyResult | None = None  # of our strategies

    @property
    def tokens_per_second(self) -> float:
        return len(self.ids) / (self.prefill_time + self.decode_time)

    @property
    def decode_tokens_per_second(self) -> float:
        return (len(self.ids) - self.num_first) / self.decode_time


class Generate(Protocol):
    def __call__(self, ids: list[int], at_most: int | None = None) -> Answer:
        """Answer a prompt; `at_most` so many tokens, where that is fewer than the side was made for."""


class Clock:
    """A streamer of transformers that notes when it is given how many ids; the prompt comes first."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.counts: list[int] = []

    def put(self, ids: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        self.counts.append(ids.numel())

    def end(self) -> None:
        self.times.append(time.perf_counter())


def theirs(
    model: Any,
    end_ids: Sequence[int],
    config: GenerationConfig,
    assistant: dict[str, Any] | None = None,
    **options: Any,
) -> Generate:
    """`generate` of transformers, with the settings of sampling and the length of `config`.

    Args:
        assistant: see `early_exit`.
        options: of `generate`.
    """
    picking: dict[str, Any] = {"do_sample": False}
    if not config.greedy:
        picking = {
            "do_sample": True,
            "temperature": config.temperature,
            "top_k": config.top_k,
            "top_p": config.top_p,
        }

    @torch.inference_mode()
    def generate(ids: list[int], at_most: int | None = None) -> Answer:
        inputs, clock = torch.tensor([ids], device=model.device), Clock()
        started = time.perf_counter()
        with patch.dict(vars(model.generation_config), assistant or {}):
            output = model.generate(
                inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=at_most or config.max_steps,
                eos_token_id=list(end_ids) or None, pad_token_id=0, streamer=clock, **picking, **options,
            )  # fmt: skip
        _, first, *_, last = clock.times
        return Answer(output[0, len(ids) :].tolist(), clock.counts[1], first - started, last - first)

    return generate


def early_exit(model: PreTrainedModel, end_ids: Sequence[int], config: GenerationConfig) -> Generate:
    """`generate` of transformers with the exit layer and the draft length of `config`.

    How an assistant drafts, it reads off the assistant's own generation config alone, which here is the
    model's.
    """
    assistant = {
        "num_assistant_tokens": config.num_speculations,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }
    return theirs(model, end_ids, config, assistant, assistant_early_exit=config.exit_layer)


def ours(model: PreTrainedModel, end_ids: Sequence[int], config: GenerationConfig) -> Generate:
    """The strategy that `config` names."""
    strategy = make_strategy(config.generation_strategy)

    def generate(ids: list[int], at_most: int | None = None) -> Answer:
        early: dict[str, Any] = {}
        if at_most is not None:
            early = {"ends_text": lambda tokens: len(tokens) >= at_most}
        result = strategy.generate_token_ids(model, ids, list(end_ids), config, **early)
        new = [*result.predicted_tokens, *([] if result.end_token_id is None else [result.end_token_id])]
        return Answer(new, 1, result.prefill_time, result.decode_time, result)

    return generate


# Prompts, as ids -> the new ids of each.
Batched = Callable[[Sequence[list[int]]], list[list[int]]]


def theirs_batched(
    model: PreTrainedModel, end_ids: Sequence[int], config: GenerationConfig, batch_size: int
) -> Batched:
    """Greedy `generate` of transformers: prompts in their order, padded on the left to batches; a batch goes
    on until its last row has ended.
    """

    @torch.inference_mode()
    def generate(prompts: Sequence[list[int]]) -> list[list[int]]:
        new: list[list[int]] = []
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            width = max(map(len, batch))
            ids, mask = (
                torch.tensor([[0] * (width - len(row)) + of(row) for row in batch], device=model.device)
                for of in (list, lambda row: [1] * len(row))
            )
            output = model.generate(
                ids, attention_mask=mask, max_new_tokens=config.max_steps, do_sample=False,
                eos_token_id=list(end_ids) or None, pad_token_id=0,
            )  # fmt: skip
            new += [_up_to_the_end(row, end_ids) for row in output[:, width:].tolist()]
        return new

    return generate


def ours_batched(
    model: PreTrainedModel, end_ids: Sequence[int], config: GenerationConfig, batch_size: int
) -> Batched:
    """The strategy that `config` names; a row that ends makes room for the next prompt."""
    strategy = make_strategy(config.generation_strategy)

    def generate(prompts: Sequence[list[int]]) -> list[list[int]]:
        requests = [Request(ids, list(end_ids)) for ids in prompts]
        found = dict(strategy.generate_batch(model, requests, config, batch_size))
        results = [found[index] for index in range(len(prompts))]
        ends = [[] if result.end_token_id is None else [result.end_token_id] for result in results]
        return [[*result.predicted_tokens, *end] for result, end in zip(results, ends, strict=True)]

    return generate


def _up_to_the_end(ids: list[int], end_ids: Sequence[int]) -> list[int]:
    """What was generated of a padded row, the end id included."""
    end = next((position for position, token in enumerate(ids) if token in end_ids), len(ids))
    return ids[: end + 1]


def count_passes(model: Any, generate: Callable[[list[int]], Answer], prompts: Sequence[list[int]]) -> float:
    """Tokens for each pass through all layers, of a side that decodes by the model's own."""
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    hook = model.base_model.layers[-1].register_forward_hook(count)
    try:
        return sum(len(generate(ids).ids) for ids in prompts) / passes
    finally:
        hook.remove()  # or the layers are no plain ones, and no longer lean
