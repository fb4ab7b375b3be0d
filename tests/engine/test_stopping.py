"""Stop words, at any token boundary, and end ids."""

import copy
import io
from contextlib import nullcontext

import pytest
from conftest import LAYERS, config_of, generator_of, mixed_drafts, transformers_generate
from transformers.convert_slow_tokenizer import bytes_to_unicode

from self_speculation import GenerationConfig, Request, StandardTextStreamer
from self_speculation.text import texts
from self_speculation.text.texts import Detokenizer, OutputReader, decode


def first_stop(tokenizer, words, ids):
    """The least number of ids whose text has a stop word, found by decoding all of them each time."""
    return next(
        (n for n in range(1, len(ids) + 1) if any(word in decode(tokenizer, ids[:n]) for word in words)), None
    )


@pytest.mark.parametrize("name", ["byte_tokenizer", "sentencepiece_tokenizer"])
def test_an_output_reads_on_from_the_end_of_its_prompt(name, request, monkeypatch):
    """Guards against prompts that are decoded as a whole for each of the first tokens, and against a
    character that the end begins within.
    """
    tokenizer = request.getfixturevalue(name)
    read = []
    text = "x y z" * 9 + "ꙮ" * 25 + "x y z" * 9
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


def test_a_long_word_is_compared_with_the_text_alone(byte_tokenizer):
    """Guards against work for each character of a word that has millions."""

    class Word(str):
        parts = 0

        def __getitem__(self, part):
            Word.parts += 1
            return super().__getitem__(part)

    reader = OutputReader(byte_tokenizer, [Word("end" * 100_000)])
    reader.read(byte_tokenizer.encode("the end", add_special_tokens=False))
    assert reader.num_settled() == len("the ")
    assert Word.parts <= len("the end")


def test_a_token_costs_time_by_its_text_alone(byte_tokenizer, monkeypatch):
    """Guards against a search of the whole answer, or of all that stop words hold back, at each token: with
    many long words one client held up all clients.
    """

    class Answer(str):
        searched = 0

        def __add__(self, text):
            return Answer(super().__add__(text))

        def __contains__(self, word):
            Answer.searched += len(self)
            return super().__contains__(word)

        def find(self, *args):
            Answer.searched += len(self)
            return super().find(*args)

    sizes = []
    num_begun = texts._num_begun
    monkeypatch.setattr(texts, "_num_begun", lambda *args: (sizes.append(len(args[0])), num_begun(*args))[1])
    words = [*("a" * 40 + end for end in "bcd"), "ab"]
    reader = OutputReader(byte_tokenizer, words)
    output = byte_tokenizer.encode("a" * 3000, add_special_tokens=False)
    reader.answer = Answer()
    streamer = StandardTextStreamer(byte_tokenizer, io.StringIO())
    streamer.begin(reader)
    for n, id_ in enumerate(output):
        assert not reader(output[: n + 1])
        streamer.put([id_])
        assert reader.num_settled() == max(0, n + 1 - 40)
    assert Answer.searched == 0
    assert max(sizes) <= 41
    assert reader([*output, *byte_tokenizer.encode("b", add_special_tokens=False)])
    assert reader.num_settled() == 2960


@pytest.mark.parametrize("name", ["byte_tokenizer", "sentencepiece_tokenizer"])
def test_bytes_of_no_character_do_not_wait_for_ever(name, request, monkeypatch):
    """Guards against a run of them that is decoded as a whole at each token."""
    tokenizer = request.getfixturevalue(name)
    read = []
    byte = tokenizer.convert_tokens_to_ids("<0xE9>" if name.startswith("sent") else bytes_to_unicode()[0xE9])
    ids = [byte] * 1000 + tokenizer.encode("é", add_special_tokens=False)
    monkeypatch.setattr(texts, "decode", lambda *args: (read.append(len(args[1])), decode(*args))[1])
    detokenizer = Detokenizer(tokenizer, [])
    assert "".join(map(detokenizer.add, ids)) + detokenizer.rest() == decode(tokenizer, ids)
    assert max(read) < 100
