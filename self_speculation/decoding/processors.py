"""The logits processors that a config asks for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from self_speculation.config import GenerationConfig


class RecentRepetitionPenaltyLogitsProcessor(RepetitionPenaltyLogitsProcessor):
    """A repetition penalty that sees the last tokens only (llama.cpp's)."""

    def __init__(self, penalty: float, window: int) -> None:
        super().__init__(penalty)
        self._window = window

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids: [1, n] prompt, output and draft; scores: [1, V]"""
        return super().__call__(input_ids[:, -self._window :], scores)


class FrequencyPenaltyLogitsProcessor(LogitsProcessor):
    """Lowers the logit of each id by `frequency` for each time that the output has it, and by `presence` once
    (OpenAI's penalties, which transformers does not have).
    """

    def __init__(self, prompt_length: int, frequency: float, presence: float) -> None:
        self._prompt_length, self._frequency, self._presence = prompt_length, frequency, presence

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids: [1, n] prompt, output and draft; scores: [1, V]"""
        output = input_ids[:, self._prompt_length :]
        counts = torch.zeros_like(scores).scatter_add_(1, output, torch.ones_like(output, dtype=scores.dtype))
        return scores - self._frequency * counts - self._presence * (counts > 0)


def config_processors(
    config: GenerationConfig, prompt_length: int, logit_bias: Mapping[int, float] | None = None
) -> list[LogitsProcessor]:
    """In the order of transformers. They are called before those of a request."""
    processors: list[LogitsProcessor] = []
    if logit_bias:
        processors.append(
            SequenceBiasLogitsProcessor({(id_,): float(bias) for id_, bias in logit_bias.items()})
        )
    if config.repetition_penalty != 1.0:
        penalty, window = config.repetition_penalty, config.repetition_window
        recent = RecentRepetitionPenaltyLogitsProcessor
        processors.append(recent(penalty, window) if window else RepetitionPenaltyLogitsProcessor(penalty))
    if config.frequency_penalty or config.presence_penalty:
        penalties = (config.frequency_penalty, config.presence_penalty)
        processors.append(FrequencyPenaltyLogitsProcessor(prompt_length, *penalties))
    if config.no_repeat_ngram_size:
        processors.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    return processors
