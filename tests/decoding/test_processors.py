"""Penalties: OpenAI's formula, exact with drafts."""

import pytest
import torch
from conftest import generate, tiny_llama

from self_speculation import GenerationConfig
from self_speculation.decoding.processors import FrequencyPenaltyLogitsProcessor, config_processors

PROMPT = [5, 9, 4, 7, 7, 3]


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


@pytest.mark.parametrize(
    "drafts", [{"exit_layer": 2, "num_speculations": 4, "prompt_lookup": 2}, {"strategy": "adaptive"}]
)
def test_the_same_ids_with_drafts(drafts):
    """Guards against penalties that count rejected drafts, or not the accepted ones."""
    penalties = {
        "frequency_penalty": 0.4,
        "presence_penalty": 0.3,
        "repetition_penalty": 1.2,
        "repetition_window": 9,
    }
    plain, drafted, unpenalised = (
        generate(tiny_llama(), PROMPT, max_steps=30, eos=[], **config).predicted_tokens
        for config in (penalties, penalties | drafts, {})
    )
    assert drafted == plain != unpenalised
