"""Stop words, at any token boundary, and end ids."""

import copy

import pytest
import torch
from conftest import generate, tiny_llama, transformers_generate
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, StoppingCriteriaList, SuppressTokensLogitsProcessor

from self_speculation import GenerationConfig, HuggingfaceLlamaGenerator, Request, make_strategy
from self_speculation.decoding.sequence import Sequence
from self_speculation.decoding.stopping import StopWords, decode


def first_stop(tokenizer, words, ids):
    """The least number of ids whose text has a stop word, found by decoding all of them each time."""
    return next(
        (n for n in range(1, len(ids) + 1) if any(word in decode(tokenizer, ids[:n]) for word in words)), None
    )


@pytest.mark.parametrize("name", ["byte_tokenizer", "sentencepiece_tokenizer"])
@pytest.mark.parametrize("word", ["Human:", "an. Hu", " man", "é", "本語", "🙃", "\n\n", "a"])
def test_the_window_finds_words_of_the_whole_text(name, word, request):
    """Guards against a window that is too short, or begins inside a character, and misses a word."""
    tokenizer = request.getfixturevalue(name)
    text = "x y z " * 30 + "日本語" * 9 + "Once there was a man. Human: café 日本語 🙂🙃\n\nclass a"
    ids = tokenizer.encode(text)
    found = StopWords(tokenizer, ["never there", word])
    expected = first_stop(tokenizer, [word], ids)
    assert expected is not None
    assert next(n for n in range(1, len(ids) + 1) if found(ids[:n])) == expected


@settings(max_examples=100)
@given(ids=st.lists(st.integers(3, 300), max_size=40), word=st.text("aeo n.", min_size=1, max_size=3))
def test_random_ids(byte_tokenizer, ids, word):
    """Guards against a word that is missed or found in broken characters."""
    found = StopWords(byte_tokenizer, [word])
    stop = next((n for n in range(1, len(ids) + 1) if found(ids[:n])), None)
    assert stop == first_stop(byte_tokenizer, [word], ids)


def test_cut_and_settled_text():
    """Guards against text after the earliest word, and against a shown beginning of a word."""
    words = StopWords(None, ["Human:", "\n\n"])
    assert [words.cut(text) for text in ("a\n\nb Human:", "Human:", "Hum")] == ["a", "", "Hum"]
    texts = {"I am Hum": "I am ", "line\n": "line", "Humid": "Humid"}
    assert [words.settled(text) for text in texts] == [*texts.values()]
    assert StopWords(None, []).settled("Hum") == "Hum"


@pytest.fixture
def answer(byte_tokenizer, text_model):
    def generate_text(prompt, **config):
        strategy = config.get("generation_strategy", "autoregressive")
        generator = HuggingfaceLlamaGenerator(byte_tokenizer, text_model, make_strategy(strategy))
        return generator.generate(prompt, GenerationConfig(sample=False, max_steps=30, **config))

    return generate_text


SPECULATIVE = {"generation_strategy": "self_speculative", "exit_layer": 2, "num_speculations": 5}


@pytest.mark.parametrize("extra", [{}, SPECULATIVE], ids=["plain", "speculative"])
def test_stop_words_end_text_before_and_ids_after(answer, byte_tokenizer, extra):
    """Guards against text with a stop word, and against more ids than those whose text has it."""
    free = answer("def", **extra)
    text = free.decoded_prediction
    assert free.num_tokens_generated == 30
    for start in range(0, len(text) - 3, 5):
        word = text[start : start + 3]
        if "\ufffd" in word:
            continue
        result = answer("def", stop_words=["never there", word], **extra)
        ids = result.generation_strategy_result.predicted_tokens
        n = first_stop(byte_tokenizer, [word], free.generation_strategy_result.predicted_tokens)
        assert ids == free.generation_strategy_result.predicted_tokens[:n]
        assert result.decoded_prediction == text[: text.index(word)]
        assert result.generation_strategy_result.stop_reason == "stop_word"


@pytest.mark.parametrize("extra", [{}, SPECULATIVE], ids=["plain", "speculative"])
def test_a_stop_word_in_the_prompt_stops_nothing(answer, extra):
    """Guards against a search in the prompt."""
    free = answer("Human:", **extra)
    held = answer("Human:", stop_words=["Human:", "uman"], **extra)
    assert held.decoded_prediction == free.decoded_prediction
    assert held.num_tokens_generated == 30


@pytest.mark.parametrize("extra", [{}, SPECULATIVE], ids=["plain", "speculative"])
def test_an_empty_prompt_stands_for_bos(answer, byte_tokenizer, text_model, extra):
    """Guards against an error, or a pass over no tokens."""
    result = answer("", **extra)
    reference = transformers_generate(text_model, [byte_tokenizer.bos_token_id], 30)
    assert result.generation_strategy_result.predicted_tokens == reference
    assert result.generation_strategy_result.num_prompt_tokens == 1


def test_an_empty_prompt_without_bos_stands_for_eos_or_is_refused(text_model, byte_tokenizer):
    """Guards against the id None."""
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.bos_token = None
    generator = HuggingfaceLlamaGenerator(tokenizer, text_model, make_strategy("autoregressive"))
    assert generator.encode("") == [tokenizer.eos_token_id]
    tokenizer.eos_token = None
    generator = HuggingfaceLlamaGenerator(tokenizer, text_model, make_strategy("autoregressive"))
    with pytest.raises(ValueError, match="the prompt has no tokens"):
        generator.generate("", GenerationConfig())


@pytest.mark.parametrize("extra", [{}, SPECULATIVE], ids=["plain", "speculative"])
def test_every_source_of_end_ids_counts(answer, text_model, byte_tokenizer, extra, monkeypatch):
    """Guards against ignored end ids of the config, the tokenizer or the model; the earliest one counts."""
    ids = answer("def", **extra).generation_strategy_result.predicted_tokens
    fresh = [i for i in range(1, len(ids)) if ids[i] not in ids[:i]]
    late, early = fresh[-1], fresh[0]
    monkeypatch.setattr(text_model.generation_config, "eos_token_id", [ids[late], 2])
    assert answer("def", **extra).generation_strategy_result.predicted_tokens == ids[:late]
    result = answer("def", stop_token_ids=[ids[early]], **extra)
    assert result.generation_strategy_result.predicted_tokens == ids[:early]
    assert result.generation_strategy_result.stop_reason == "eos"
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ids[early])
    generator = HuggingfaceLlamaGenerator(
        tokenizer, text_model, make_strategy(extra.get("generation_strategy", "autoregressive"))
    )
    result = generator.generate("def", GenerationConfig(sample=False, **extra))
    assert result.generation_strategy_result.predicted_tokens == ids[:early]


def test_rates_of_a_result(answer):
    """Guards against rates by other times or numbers than those of the result."""
    result = answer("def")
    assert result.num_tokens_generated == len(result.generation_strategy_result.predicted_tokens)
    assert result.time_per_token == pytest.approx(result.total_time / 30)
    assert result.tokens_per_second == pytest.approx(30 / result.total_time)


@pytest.mark.parametrize("drafts", [{}, {"exit_layer": 2, "num_speculations": 3}])
def test_one_callable_or_a_list(drafts):
    """Guards against `'function' object is not iterable`, and against a call of transformers' lists."""
    processor, criterion = SuppressTokensLogitsProcessor([7, 9]), lambda ids, scores: ids.shape[1] >= 9
    one = {"logits_processors": processor, "stopping_criteria": criterion}
    lists = {"logits_processors": [processor], "stopping_criteria": [criterion]}
    of_transformers = {
        "logits_processors": LogitsProcessorList([processor]),
        "stopping_criteria": StoppingCriteriaList([criterion]),
    }
    sequences = [
        generate(tiny_llama(), [5, 6, 7], eos=[], max_steps=20, **drafts, **given).predicted_tokens
        for given in (one, lists, of_transformers, {})
    ]
    assert sequences[0] == sequences[1] == sequences[2]
    assert len(sequences[0]) == 6
    assert len(sequences[3]) == 20
    end = sequences[3][4]
    by_id = [generate(tiny_llama(), [5, 6, 7], eos=ids, **drafts).predicted_tokens for ids in (end, [end])]
    assert by_id[0] == by_id[1] == sequences[3][: sequences[3].index(end)]


@pytest.mark.parametrize("reads_drafts", [False, True])
def test_drafted_ids_are_written_where_processors_read_them(reads_drafts):
    """Guards against a needless kernel per drafted token, and against a history with gaps."""
    seen = []
    processors = [lambda ids, scores: scores] if reads_drafts else []
    request = Request([5, 6], processors, lambda ids, _: seen.append(ids[0].tolist()) or False)
    sequence = Sequence(request, GenerationConfig(max_steps=9), 99, torch.device("cpu"))
    sequence._ids.fill_(0)
    for position, token in enumerate(torch.tensor([7, 8, 1])):
        sequence.write_drafted(token, position)
    assert sequence.history(3)[0, 2:].tolist() == ([7, 8, 1] if reads_drafts else [0, 0, 0])
    sequence.commit([7, 8, 9], torch.zeros(3, 50))
    assert [ids[2:] for ids in seen] == [[7], [7, 8], [7, 8, 9]]
