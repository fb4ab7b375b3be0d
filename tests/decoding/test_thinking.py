"""Thinking before an answer: where it ends, and that grammars and stop words begin there."""

import copy
import json
import re

import pytest
from conftest import WAYS, config_of, mixed_drafts
from hypothesis import example, given, settings
from hypothesis import strategies as st
from thinkers import QWEN3, R1, SMOLLM3, TAGS, Teller, thinking_tokenizer
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from self_speculation import GenerationConfig, Request
from self_speculation.decoding.grammar import Grammar
from self_speculation.decoding.texts import Splitter, Tag, Thinking, ThinkingReader, decode

HELLO = [{"role": "user", "content": "Hello"}]
ANSWER, PATTERN = Grammar.regex('\\{"a": [a-z]{3}\\}'), r'\{"a": [a-z]{3}\}'
DRAFTS = ("plain", "layers", "n-grams", "adaptive")


def in_turn(has_begun=False, ids=(None, None)):
    return Thinking(*(Tag(text, id_) for text, id_ in zip(TAGS, ids, strict=True)), has_begun)


def separated(thinking, text):
    """The thinking and the answer of a whole text."""
    begin, end = thinking.begin.text, thinking.end.text
    if not thinking.has_begun:
        if not text.lstrip().startswith(begin):
            return "", text.rstrip("\n") if begin.startswith(text.lstrip()) else text
        text = text.lstrip().removeprefix(begin)
    thought, _, answer = text.partition(end)
    return thought.strip("\n"), answer.lstrip("\n")


PIECES = st.lists(st.sampled_from(["<", "<th", "ink>", *TAGS, "</", "think>", "\n", " ", "a", "é<", ">"]))


@settings(max_examples=60)
@given(pieces=PIECES, has_begun=st.booleans())
@example(pieces=["a</", "think>", "b"], has_begun=True)
def test_pieces_give_what_the_whole_text_gives(pieces, has_begun):
    """Guards against parts of tags in a text, tags that are missed where they are cut, and line breaks that
    depend on how a text was cut.
    """
    thinking = in_turn(has_begun)
    splitter, found = Splitter(thinking), {True: "", False: ""}
    for last, piece in enumerate(pieces, 1):
        for text, is_thinking in splitter.add(piece, finished=last == len(pieces)):
            assert text
            found[is_thinking] += text
    assert (found[True], found[False]) == separated(thinking, "".join(pieces))


@pytest.mark.parametrize("kind", ["added", "spelled"])
@settings(max_examples=30)
@given(
    text=st.lists(st.sampled_from(["\n", "a b", "日🙂", "</thi", *TAGS])).map("".join),
    has_begun=st.booleans(),
)
def test_tokens_of_the_thinking_are_counted(byte_tokenizer, kind, text, has_begun):
    """Guards against a count that is off by the tag's token, and against tokens that are read twice."""
    tokenizer = thinking_tokenizer(byte_tokenizer, kind=kind)
    thinking = in_turn(has_begun, [Tag.of(tag, tokenizer).id for tag in TAGS])
    ids, reader = tokenizer.encode(text, add_special_tokens=False), ThinkingReader(tokenizer, thinking)
    first = None  # token of the answer
    for n in range(1, len(ids) + 1):
        reader.read(ids[:n])
        before = decode(tokenizer, ids[:n])
        if first is None and TAGS[1] in (before if has_begun else before.lstrip().removeprefix(TAGS[0])):
            first = n
    reader.end(ids)
    thinks = has_begun or text.lstrip().startswith(TAGS[0])
    assert (reader.thinking, reader.answer) == separated(thinking, text)
    assert reader.num_thinking == ((len(ids) if first is None else first) if thinks else 0)


def test_a_tag_that_is_a_token_is_that_token_only(byte_tokenizer):
    """Guards against a text that ends the thinking for the reader and not for the grammar."""
    tokenizer = thinking_tokenizer(byte_tokenizer)
    thinking = Thinking.of(tokenizer, "assistant: <think>\n")
    spelled = [tokenizer.encode(char, add_special_tokens=False) for char in TAGS[1]]
    end = tokenizer.encode(f"{TAGS[1]}\n\nyes", add_special_tokens=False)
    reader = ThinkingReader(tokenizer, thinking)
    reader.read([id_ for ids in [*spelled, end] for id_ in ids])
    assert (reader.thinking, reader.answer) == (TAGS[1], "yes")


@pytest.mark.parametrize(
    ("template", "kwargs", "system", "state"),
    [
        (QWEN3, {}, "", "may begin"),
        (QWEN3, {"enable_thinking": True, "unknown": [1]}, "", "may begin"),
        (QWEN3, {"enable_thinking": False}, "", "off"),
        (R1, {}, "", "has begun"),
        (SMOLLM3, {}, "", "may begin"),
        (SMOLLM3, {"enable_thinking": False}, "", "off"),
        (SMOLLM3, {}, "/no_think", "off"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}<think>", {}, "", "off"),  # its own text
    ],
)
def test_the_prompt_tells_whether_its_answer_thinks(byte_tokenizer, template, kwargs, system, state):
    generator = Teller(thinking_tokenizer(byte_tokenizer, template))
    messages = [{"role": "system", "content": system}, *HELLO]
    thinking = Thinking.of(generator.tokenizer, generator.render_chat(messages, kwargs))
    ids = generator.tokenizer.convert_tokens_to_ids(TAGS)
    assert thinking == (None if state == "off" else in_turn(state == "has begun", ids))


def test_the_config_of_a_tokenizer_may_name_the_tags(byte_tokenizer):
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.response_template = {"fields": {"reasoning_content": {"open": "[a]", "close": "[b]"}}}
    assert Thinking.of(tokenizer, "") == Thinking(Tag("[a]", None), Tag("[b]", None), has_begun=False)
    for odd in ("x", ["x"], {"fields": []}, {"fields": {"thinking": "x"}}):
        tokenizer.response_template = odd
        with pytest.raises(
            ValueError, match="response_template of the tokenizer: its fields must be objects"
        ):
            Thinking.of(tokenizer, "")


@pytest.fixture(params=["added", "spelled"])
def told(request, byte_tokenizer):
    """Answers a chat that is told what to think; the strategies' results by name."""

    def answers(text, template=QWEN3, drafts=DRAFTS, stop_words=None, max_steps=60, before="", **own):
        tokenizer, results = thinking_tokenizer(byte_tokenizer, template, request.param), {}
        for name in drafts:
            config = config_of(max_steps=max_steps, stop_words=stop_words, **WAYS[name])
            teller = Teller(tokenizer, config.generation_strategy, text, max_position_embeddings=512)
            prompt = teller.render_chat([{"role": "user", "content": before}], {})
            ids = teller.encode(prompt, special_tokens=False)
            thinking = Thinking.of(tokenizer, prompt)
            results[name] = teller.generate(Request(ids, thinking=thinking, **own), config)
        return results

    return answers


@mixed_drafts("exit 2")
@pytest.mark.parametrize(
    ("template", "thought"), [(QWEN3, ""), (R1, "ab {c"), (QWEN3, "A city: {]\n\nnaïve 日")]
)
def test_a_grammar_begins_after_the_thinking(told, template, thought):
    """At the very token, also in the middle of a draft. Guards against an answer that is not guided, one
    that is guided from the next round on, and thinking that is.
    """
    opening = "" if template == R1 else TAGS[0]
    text = f"{opening}{thought}{TAGS[1]}\n\n"
    # n-grams draft beyond the end of the thinking what the grammar forbids.
    before = f"{thought}{TAGS[1]}\n\nnot JSON" * 2
    results = told(text, template, before=before, grammar=ANSWER)
    for name, result in results.items():
        assert result.thinking == thought
        assert re.fullmatch(PATTERN, result.decoded_prediction)
        took = result.generation_strategy_result
        assert took.stop_reason == "eos"
        assert took.predicted_tokens == results["plain"].generation_strategy_result.predicted_tokens, name
        assert result.num_thinking_tokens == results["plain"].num_thinking_tokens > 0


def test_a_grammar_without_thinking(told):
    """An output that may think and does not is guided from its first token on."""
    for result in told('{"a"', drafts=["layers"], grammar=ANSWER).values():
        assert (result.thinking, result.num_thinking_tokens) == ("", 0)
        assert re.fullmatch(PATTERN, result.decoded_prediction)


def test_guided_thinking_has_no_stop_token_of_the_request(byte_tokenizer):
    """Guards against an answer that is no JSON, since a stop token of the request ended its thinking."""
    tokenizer = thinking_tokenizer(byte_tokenizer, R1)
    teller = Teller(tokenizer, text=f"a<s>b{TAGS[1]}", max_position_embeddings=512)
    config = GenerationConfig(sample=False, max_steps=60, stop_token_ids=[tokenizer.bos_token_id])
    request = Request([5], thinking=Thinking.of(tokenizer, TAGS[0]), grammar=ANSWER)
    result = teller.generate(request, config)
    assert re.fullmatch(PATTERN, result.decoded_prediction)


def test_an_end_tag_within_a_token(byte_tokenizer):
    """Guards against the rest of a token that both ends the thinking and begins the answer."""
    state = json.loads(byte_tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"][">{"] = len(byte_tokenizer)
    state["model"]["merges"].append([">", "{"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="</s>"
    )
    teller = Teller(tokenizer, text='a</think>{"')
    ids = tokenizer.encode(teller.text, add_special_tokens=False)
    assert ">{" in tokenizer.convert_ids_to_tokens(ids)
    request = Request([5], thinking=in_turn(has_begun=True), grammar=ANSWER)
    result = teller.generate(request, GenerationConfig(sample=False, max_steps=40))
    assert result.generation_strategy_result.predicted_tokens[: len(ids)] == ids
    assert result.thinking == "a"
    assert re.fullmatch(PATTERN, result.decoded_prediction)


def test_stop_words_begin_after_the_thinking(told):
    """Guards against a stop word that ends the thinking, or is made of its end and the answer."""
    text = f"{TAGS[0]}stop, stop\n\nx{TAGS[1]}\n\ny stop z"
    results = told(text, stop_words=["stop", "\n\n", "think>", ">\n"])
    for result in results.values():
        assert (result.thinking, result.decoded_prediction) == ("stop, stop\n\nx", "y ")
        assert result.generation_strategy_result.stop_reason == "stop_word"


def test_a_limit_within_the_thinking(told):
    text = f"{TAGS[0]}one two three four five"
    for result in told(text, max_steps=12, grammar=ANSWER).values():
        assert result.decoded_prediction == ""
        assert text.startswith(TAGS[0] + result.thinking)
        assert (len(result.thinking) > 3, result.num_thinking_tokens) == (True, 12)
        assert result.generation_strategy_result.stop_reason == "max_steps"
