"""Penalties and min-p: equal to those of transformers, exact with drafts, and by row."""

import pytest
import torch
from conftest import generate, tiny_llama
from transformers import LogitsProcessorList, MinPLogitsWarper, TemperatureLogitsWarper, TopPLogitsWarper

from self_speculation import GenerationConfig, Request, make_strategy
from self_speculation.decoding.processors import FrequencyPenaltyLogitsProcessor, config_processors
from self_speculation.decoding.sampling import Sampler, joint_sampler

PROMPT = [5, 9, 4, 7, 7, 3]
PENALTIES = [
    {"repetition_penalty": 1.3},
    {"frequency_penalty": 0.7},
    {"presence_penalty": -0.5},
    {"repetition_penalty": 1.2, "frequency_penalty": 0.4, "presence_penalty": 0.3, "no_repeat_ngram_size": 3},
]
DRAFTS = [
    {"exit_layer": 2, "num_speculations": 4},
    {"exit_layer": 2, "num_speculations": 4, "prompt_lookup": 2},
    {"strategy": "adaptive"},
]


def test_the_penalties_of_openai():
    """Guards against another formula than logit - count * frequency - (count > 0) * presence, and against
    counts of the prompt.
    """
    processor = FrequencyPenaltyLogitsProcessor(2, frequency=0.5, presence=0.25)
    scores = processor(torch.tensor([[3, 3, 1, 0, 1]]), torch.zeros(1, 5))
    assert scores.tolist() == [[-0.75, -1.25, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("penalties", PENALTIES)
@pytest.mark.parametrize("drafts", DRAFTS)
def test_the_same_ids_with_drafts(penalties, drafts):
    """Guards against penalties that count rejected drafts, or not the accepted ones."""
    model = tiny_llama(agreement="sometimes", exit_layer=2)
    shared = {"max_steps": 30, "eos": [], **penalties}
    plain = generate(model, PROMPT, strategy="autoregressive", **shared).predicted_tokens
    assert generate(model, PROMPT, **shared, **drafts).predicted_tokens == plain
    assert plain != generate(model, PROMPT, strategy="autoregressive", max_steps=30, eos=[]).predicted_tokens


def test_the_ids_of_transformers():
    """Guards against another order of processors."""
    model = tiny_llama()
    shared = {"max_new_tokens": 25, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    theirs = model.generate(torch.tensor([PROMPT]), repetition_penalty=1.3, no_repeat_ngram_size=2, **shared)
    config = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
    ours = generate(model, PROMPT, exit_layer=2, num_speculations=3, max_steps=25, eos=[], **config)
    assert ours.predicted_tokens == theirs[0, len(PROMPT) :].tolist()


def test_every_row_has_its_own():
    """Guards against penalties of another row."""
    model = tiny_llama()
    own = [GenerationConfig(sample=False, max_steps=20, **penalties) for penalties in PENALTIES]
    strategy = make_strategy("self_speculative")
    batch = GenerationConfig(sample=False, max_steps=20, exit_layer=2, num_speculations=3)
    requests = [Request(PROMPT, config=config) for config in own]
    for index, result in strategy.generate_batch(model, requests, batch, batch_size=4):
        alone = generate(model, PROMPT, strategy="autoregressive", max_steps=20, eos=[], **PENALTIES[index])
        assert result.predicted_tokens == alone.predicted_tokens


@pytest.mark.parametrize("min_p", [0.02, 0.3, 1.0])
def test_min_p_of_transformers(min_p):
    """Guards against another threshold, or another order of filters, alone and beside other rows."""
    logits = 3 * torch.randn(40, 50, generator=torch.Generator().manual_seed(1))
    warpers = [TemperatureLogitsWarper(0.7), TopPLogitsWarper(0.95), MinPLogitsWarper(min_p)]
    expected = LogitsProcessorList(warpers)(None, logits).softmax(-1)
    sampler = Sampler(temperature=0.7, top_p=0.95, min_p=min_p)
    torch.testing.assert_close(sampler.probabilities(logits), expected)
    rows = joint_sampler([sampler, Sampler(temperature=0.9)] * 20, logits.device)
    torch.testing.assert_close(rows.probabilities(logits)[::2], expected[::2])


def test_defaults_and_ranges():
    """Guards against a needless processor, which costs time per token, and against values out of range."""
    assert config_processors(GenerationConfig(), 3) == []
    with pytest.raises(ValueError, match=r"frequency_penalty 3: must be between -2 and 2"):
        GenerationConfig(frequency_penalty=3)
    with pytest.raises(ValueError, match=r"min_p 1.5: must be between 0 and 1"):
        GenerationConfig(min_p=1.5)
