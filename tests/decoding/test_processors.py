"""Penalties: the formulas of OpenAI and llama.cpp. Drafts: see test_self_speculation_generator.py."""

import torch

from self_speculation import GenerationConfig
from self_speculation.decoding.processors import FrequencyPenaltyLogitsProcessor, config_processors


def test_the_penalties_of_openai():
    """Guards against another formula than logit - count * frequency - (count > 0) * presence, and against
    counts of the prompt.
    """
    processor = FrequencyPenaltyLogitsProcessor(2, frequency=0.5, presence=0.25)
    scores = processor(torch.tensor([[3, 3, 1, 0, 1]]), torch.zeros(1, 5))
    assert scores.tolist() == [[-0.75, -1.25, 0.0, 0.0, 0.0]]
    assert config_processors(GenerationConfig(), 3) == []


def test_a_repetition_penalty_over_the_last_tokens():
    """Guards against a penalty of llama.cpp's clients that sees the whole prompt."""
    [processor] = config_processors(GenerationConfig(repetition_penalty=2.0, repetition_window=2), 3)
    scores = processor(torch.tensor([[0, 1, 2, 3]]), torch.ones(1, 5))
    assert scores.tolist() == [[1.0, 1.0, 0.5, 0.5, 1.0]]
