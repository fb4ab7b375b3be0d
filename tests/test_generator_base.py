"""HuggingfaceLlamaGenerator: a user's strategies, and prompts that are refused before tokenization."""

import copy

import pytest
import torch
from conftest import config_of, generator_of

from self_speculation import (
    GenerationConfig,
    GenerationStrategy,
    GenerationStrategyResult,
    HuggingfaceLlamaGenerator,
    make_strategy,
)


@pytest.mark.parametrize("kind", ["byte_tokenizer", "sentencepiece_tokenizer"])
def test_only_texts_that_cannot_fit_are_not_tokenized(kind, text_model, request, monkeypatch):
    """Guards against a refusal of a text that fits, such as one of the longest tokens, and against seconds of
    tokenizing before the same error.
    """
    tokenizer = request.getfixturevalue(kind)
    generator = generator_of(tokenizer, text_model)
    ids = sorted(range(len(tokenizer)), key=lambda i: len(tokenizer.decode([i])))
    for text in (
        "café ",
        "中文字符",
        "🙂",
        "e\u0301",
        *(tokenizer.decode(ids[-n:] * 3) for n in (1, 5, 300)),
    ):
        length = len(tokenizer.encode(text * 200, add_special_tokens=False))
        monkeypatch.setattr("self_speculation.generator_base.context_length", lambda _, length=length: length)
        assert not generator.is_far_too_long(text * 200)
    monkeypatch.undo()
    monkeypatch.setattr(type(tokenizer), "_encode_plus", lambda *_, **__: pytest.fail("it was tokenized"))
    for text in ("all work and no play ", " ", "🙂"):
        with pytest.raises(ValueError, match="leaves no room in the model's context of 256 tokens"):
            generator.encode(text * 99_000)


def test_a_text_of_tokens_that_were_added_later_fits(byte_tokenizer, text_model):
    """Guards against a refusal by the longest token that the generator's tokenizer had before."""
    generator = generator_of(copy.deepcopy(byte_tokenizer), text_model)
    longer = "x" * 900
    text = longer * 200
    assert generator.is_far_too_long(text)
    generator.tokenizer.add_tokens([longer])
    assert not generator.is_far_too_long(text)
    generator.tokenizer = byte_tokenizer
    assert generator.is_far_too_long(text)


def test_a_strategy_with_generate_token_ids_alone(byte_tokenizer, text_model):
    """Guards against a strategy of the paper's interface that no longer works: it gets stop words as a
    criterion, end ids as a list and penalties as processors. In a batch the prompts run one by one.
    """

    class Own(GenerationStrategy):
        def generate_token_ids(
            self, model, input_ids, eos_token_ids, config, logits_processors, stopping_criteria, streamer
        ):
            assert streamer is None
            ids = list(input_ids)
            while len(ids) < len(input_ids) + config.max_steps:
                history = torch.tensor([ids])
                logits = model(history).logits[:, -1]
                if logits_processors:
                    logits = logits_processors(history, logits)
                if (token := int(logits.argmax())) in eos_token_ids:
                    break
                ids.append(token)
                if stopping_criteria and stopping_criteria(torch.tensor([ids]), logits).any():
                    break
            return GenerationStrategyResult(ids[len(input_ids) :])

    prompts = ["def", "Once upon", [10**6]]
    custom, ours = (
        HuggingfaceLlamaGenerator(byte_tokenizer, text_model, strategy)
        for strategy in (Own(), make_strategy("autoregressive"))
    )
    text = ours.generate("def", config_of(max_steps=20)).decoded_prediction
    for settings in ({}, {"stop_words": [text[6:9]]}, {"no_repeat_ngram_size": 1}):
        config = config_of(max_steps=20, **settings)
        found, expected = (dict(generator.generate_batch(prompts, config)) for generator in (custom, ours))
        assert isinstance(found.pop(2), ValueError)
        for index, result in found.items():
            assert result.decoded_prediction == expected[index].decoded_prediction
            assert result.num_tokens_generated == expected[index].num_tokens_generated
        assert custom.generate("def", config).decoded_prediction == found[0].decoded_prediction


def test_a_strategy_without_a_method_of_its_own_is_refused():
    """Guards against defaults that call each other without end."""
    with pytest.raises(NotImplementedError, match="Mine needs generate_token_ids or generate_batch"):
        type("Mine", (GenerationStrategy,), {})().generate_token_ids(None, [1], None, GenerationConfig())
