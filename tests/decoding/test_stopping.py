"""Stop words, at any token boundary, and end ids."""

import copy
from contextlib import nullcontext

import pytest
from conftest import (
    LAYERS,
    config_of,
    generator_of,
    ids_of,
    mixed_drafts,
    tiny_llama,
    transformers_generate,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LogitsProcessorList, StoppingCriteriaList, SuppressTokensLogitsProcessor

from self_speculation import GenerationConfig, Request
from self_speculation.decoding import texts
from self_speculation.decoding.texts import Detokenizer, OutputReader, decode


def first_stop(tokenizer, words, ids):
    """The least number of ids whose text has a stop word, found by decoding all of them each time."""
    return next(
        (n for n in range(1, len(ids) + 1) if any(word in decode(tokenizer, ids[:n]) for word in words)), None
    )


TEXT = "x y z " * 30 + "日本語" * 9 + "Once there was a man. Human: café 日本語 🙂🙃\n\nclass a"
WORDS = ["\ufffd", "Human:", "an. Hu", " man", "é", "本語", "🙃", "\n\n", "a"]


@pytest.mark.parametrize("name", ["byte_tokenizer", "sentencepiece_tokenizer"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ids=st.none() | st.lists(st.integers(3, 300), max_size=40),
    word=st.sampled_from(WORDS) | st.text("aeo n.", min_size=1, max_size=3),
)
def test_words_are_found_at_the_first_token_whose_text_has_them(name, request, ids, word):
    """Guards against a window that is too short, or begins inside a character, and misses a word, and against
    a word that is found in broken characters.
    """
    tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode(TEXT) if ids is None else ids
    found = OutputReader(tokenizer, [word])
    stop = next((n for n in range(1, len(ids) + 1) if found(ids[:n])), None)
    assert stop == first_stop(tokenizer, [word], ids)


@pytest.mark.parametrize("name", ["byte_tokenizer", "sentencepiece_tokenizer"])
def test_an_output_reads_on_from_the_end_of_its_prompt(name, request, monkeypatch):
    """Guards against prompts that are decoded as a whole for each of the first tokens, and against a
    character that the end begins within.
    """
    tokenizer, read, text = request.getfixturevalue(name), [], "x y z" * 9 + "ꙮ" * 25 + "x y z" * 9
    ids = tokenizer.encode(text)
    monkeypatch.setattr(texts, "decode", lambda *args: (read.append(len(args[1])), decode(*args))[1])
    for n in range(1, len(ids)):
        before = decode(tokenizer, ids[:n])
        if not before.endswith("\ufffd"):
            output = "".join(map(Detokenizer(tokenizer, ids[:n]).add, ids[n:]))
            assert before + output == text
    assert max(read) < 80 < len(ids)


@pytest.fixture
def answer(byte_tokenizer, text_model):
    def generate_text(prompt, tokenizer=byte_tokenizer, **config):
        config = config_of(max_steps=30, **config)
        return generator_of(tokenizer, text_model, config.generation_strategy).generate(prompt, config)

    return generate_text


@pytest.fixture(params=[{}, LAYERS], ids=["plain", "speculative"])
def extra(request):
    with mixed_drafts("exit 2") if request.param else nullcontext():
        yield request.param


def test_stop_words_end_text_before_and_ids_after(answer, byte_tokenizer, extra):
    """Guards against text with a stop word, against more ids than those whose text has it, and against a
    search in the prompt.
    """
    free = answer("def", **extra)
    assert answer("def", stop_words=["def", "ef"], **extra).decoded_prediction == free.decoded_prediction
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


def test_every_source_of_end_ids_counts(answer, text_model, byte_tokenizer, extra, monkeypatch):
    """Guards against ignored end ids of the config, the tokenizer or the model; the earliest one counts.
    Guards against an end id that stays in the output because it is the end of a stop word, too.
    """
    ids = answer("def", **extra).generation_strategy_result.predicted_tokens
    fresh = [i for i in range(1, len(ids)) if ids[i] not in ids[:i]]
    late, early = fresh[-1], fresh[0]
    monkeypatch.setattr(text_model.generation_config, "eos_token_id", [ids[late], 2])
    assert answer("def", **extra).generation_strategy_result.predicted_tokens == ids[:late]
    for check in (None, lambda output: len(output) > early):
        request = Request("def", stop_checks=check)
        result = answer(request, stop_token_ids=[ids[early]], **extra).generation_strategy_result
        assert (result.predicted_tokens, result.stop_reason) == (ids[:early], "eos")
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ids[early])
    assert answer("def", tokenizer, **extra).generation_strategy_result.predicted_tokens == ids[:early]


def test_empty_prompts_and_rates(answer, text_model, byte_tokenizer):
    """Guards against a pass over no tokens or the id None, and against rates by other times or numbers than
    those of the result.
    """
    result = answer("")
    ids = transformers_generate(text_model, [byte_tokenizer.bos_token_id], 30)
    assert result.generation_strategy_result.predicted_tokens == ids
    assert result.num_tokens_generated == len(ids)
    assert result.time_per_token == pytest.approx(result.total_time / len(ids))
    assert result.tokens_per_second == pytest.approx(len(ids) / result.total_time)
    generation = result.generation_strategy_result
    assert generation.prefill_time + generation.decode_time <= result.total_time
    tokenizer = copy.deepcopy(byte_tokenizer)
    generator = generator_of(tokenizer, text_model)
    tokenizer.bos_token = None
    assert generator.encode("") == [tokenizer.eos_token_id]
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="the prompt has no tokens"):
        generator.generate("", GenerationConfig())


def test_one_callable_or_a_list(extra):
    """Guards against `'function' object is not iterable`, and against a call of transformers' lists."""
    processor, criterion = SuppressTokensLogitsProcessor([7, 9]), lambda ids, scores: ids.shape[1] >= 9
    one, lists, theirs = (
        ids_of(tiny_llama(), [5, 6, 7], logits_processors=processors, stopping_criteria=criteria, **extra)
        for processors, criteria in (
            (processor, criterion),
            ([processor], [criterion]),
            (LogitsProcessorList([processor]), StoppingCriteriaList([criterion])),
        )
    )
    assert one == lists == theirs
    assert len(one) == 6
    free = ids_of(tiny_llama(), [5, 6, 7], **extra)
    assert ids_of(tiny_llama(), [5, 6, 7], eos=free[4], **extra) == free[: free.index(free[4])]


def test_a_long_word_is_compared_with_the_text_alone(byte_tokenizer):
    """Guards against work for each character of a word that has millions."""

    class Word(str):
        parts = 0

        def __getitem__(self, part):
            Word.parts += 1
            return super().__getitem__(part)

    word = Word("end" * 100_000)
    assert OutputReader(byte_tokenizer, [word]).settled("the end") == "the "
    assert Word.parts <= len("the end")
