"""Thinking before an answer: where it ends, and that grammars and stop words begin there."""

import copy
import io
import json
import re

import pytest
from conftest import TEXTS, WAYS, config_of, mixed_drafts
from hypothesis import example, given, settings
from hypothesis import strategies as st
from thinkers import QWEN3, R1, SMOLLM3, TAGS, Teller, thinking_tokenizer
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from self_speculation import GenerationConfig, Request, SpeculativeTextStreamer
from self_speculation.text.grammar import Grammar
from self_speculation.text.texts import OutputReader, Tag, Thinking, decode

HELLO = [{"role": "user", "content": "Hello"}]
ANSWER = Grammar.regex('\\{"a": [a-z]{3}\\}')
PATTERN = r'\{"a": [a-z]{3}\}'
DRAFTS = ("plain", "layers", "n-grams", "adaptive")


def in_turn(has_begun=False, ids=(None, None)):
    return Thinking(*(Tag(text, id_) for text, id_ in zip(TAGS, ids, strict=True)), has_begun)


def separated(thinking, text):
    """The thinking and the answer of a whole text."""
    if thinking is None:
        return "", text
    begin, end = thinking.begin.text, thinking.end.text
    if not thinking.has_begun:
        if not text.lstrip().startswith(begin):
            return "", text.rstrip("\n") if begin.startswith(text.lstrip()) else text
        text = text.lstrip().removeprefix(begin)
    thought, _, answer = text.partition(end)
    return thought.strip("\n"), answer.lstrip("\n")


PIECES = ["<", "</thi", "nk>", *TAGS, "\n", " ", "a b", "xy", "é", "日🙂", "🙃", "x y z " * 9]
LONG = [*TEXTS, "  x", "日本語日本語です"] * 20


@pytest.mark.parametrize("kind", ["added", "spelled", "byte_tokenizer", "sentencepiece_tokenizer"])
@settings(max_examples=60)
@given(
    pieces=st.lists(st.sampled_from(PIECES), max_size=20),
    words=st.sampled_from(
        [[], ["xy"], ["\n\n", "b"], ["🙂", "never"], ["nk>"], ["xyxya"], ["é"], ["\n<", "日"]]
    ),
    cut=st.integers(0, 3),
    has_begun=st.booleans(),
)
@example(pieces=LONG, words=[], cut=1, has_begun=False)
@example(pieces=["a</thi", "nk>", "b"], words=[], cut=0, has_begun=True)
@example(pieces=["é", "xy", "xy", "a b"], words=["b", "xyxya"], cut=0, has_begun=False)
def test_an_output_is_read_token_by_token(request, kind, pieces, words, cut, has_begun):
    """Thinking and answer are those of the whole text, and a file gets the answer. Guards against parts of
    tags, tags that are missed where they are cut, line breaks that depend on how a text is cut, tokens of the
    thinking that are miscounted, stop words in it, the beginning of a stop word or text after the first one,
    parts of characters before the end, of which decoders replace whole runs, and drafts in a file.
    """
    thinks = kind in ("added", "spelled")
    thinking = None
    tokenizer = request.getfixturevalue("byte_tokenizer" if thinks else kind)
    if thinks:
        tokenizer = thinking_tokenizer(tokenizer, kind=kind)
        thinking = in_turn(has_begun, [Tag.of(tag, tokenizer).id for tag in TAGS])
    ids = tokenizer.encode("".join(pieces), add_special_tokens=False)
    ids = ids[: len(ids) - cut]
    while not thinks and "byte" not in kind and decode(tokenizer, ids).endswith("\ufffd"):
        ids.pop()  # the decoder replaces whole characters before it
    texts = [decode(tokenizer, ids[:n]) for n in range(len(ids) + 1)]
    wholes = [separated(thinking, text) for text in texts]
    stop = next((n for n, (_, answer) in enumerate(wholes) if any(word in answer for word in words)), None)
    reader = OutputReader(tokenizer, words, thinking=thinking)
    file = io.StringIO()
    streamer = SpeculativeTextStreamer(tokenizer, file)
    streamer.begin(reader)
    for n, id_ in enumerate(ids[:stop], 1):
        assert reader(ids[:n]) == (n == stop)
        streamer.put([id_], is_draft=True)
        streamer.delete(1, is_draft=True)
        streamer.put([id_])
        assert "\ufffd" not in file.getvalue()
    streamer.end()
    reader.end(ids[:stop])
    thought, answer = wholes[-1 if stop is None else stop]
    assert (reader.thinking, reader.answer) == (thought, answer)
    end = min((answer.index(word) for word in words if word in answer), default=len(answer))
    assert file.getvalue() == f"{answer[:end]}\n"
    begun = ["" if has_begun else TAGS[0]] * thinks
    ended = (n for n, text in enumerate(texts) if TAGS[1] in text.lstrip().removeprefix(*begun or [""]))
    is_thinking = thinks and (has_begun or texts[-1].lstrip().startswith(TAGS[0]))
    assert reader.num_thinking == (min(next(ended, len(ids)), stop or len(ids)) if is_thinking else 0)


def test_a_tag_that_is_a_token_is_that_token_only(byte_tokenizer):
    """Guards against a text that ends the thinking for the reader and not for the grammar."""
    tokenizer = thinking_tokenizer(byte_tokenizer)
    thinking = Thinking.of(tokenizer, "assistant: <think>\n")
    spelled = [tokenizer.encode(char, add_special_tokens=False) for char in TAGS[1]]
    end = tokenizer.encode(f"{TAGS[1]}\n\nyes", add_special_tokens=False)
    reader = OutputReader(tokenizer, thinking=thinking)
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
        ("{% for m in messages %}{{ m.content }}{% endfor %}<think>", {}, "", "off"),  # text of the template
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


@pytest.fixture(params=["added", "spelled"])
def results_of(request, byte_tokenizer):
    """Answers a chat with a given output. Returns the results by the name of the strategy."""

    def answers(text, template=QWEN3, drafts=DRAFTS, stop_words=None, max_steps=60, before="", **fields):
        tokenizer = thinking_tokenizer(byte_tokenizer, template, request.param)
        results = {}
        for name in drafts:
            config = config_of(max_steps=max_steps, stop_words=stop_words, **WAYS[name])
            teller = Teller(tokenizer, config.generation_strategy, text, max_position_embeddings=512)
            prompt = teller.render_chat([{"role": "user", "content": before}], {})
            ids = teller.encode(prompt, special_tokens=False)
            thinking = Thinking.of(tokenizer, prompt)
            results[name] = teller.generate(Request(ids, thinking=thinking, **fields), config)
        return results

    return answers


@mixed_drafts("exit 2")
@pytest.mark.parametrize(
    ("template", "thought"), [(QWEN3, ""), (R1, "ab {c"), (QWEN3, "A city: {]\n\nnaïve 日")]
)
def test_a_grammar_begins_after_the_thinking(results_of, template, thought):
    """At the very token, also in the middle of a draft. Guards against an answer that is not guided, one
    that is guided from the next round on, and thinking that is.
    """
    opening = "" if template == R1 else TAGS[0]
    text = f"{opening}{thought}{TAGS[1]}\n\n"
    # n-grams draft beyond the end of the thinking what the grammar forbids.
    before = f"{thought}{TAGS[1]}\n\nnot JSON" * 2
    results = results_of(text, template, before=before, grammar=ANSWER)
    for name, result in results.items():
        assert result.thinking == thought
        assert re.fullmatch(PATTERN, result.decoded_prediction)
        took = result.generation_strategy_result
        assert took.stop_reason == "eos"
        assert took.predicted_tokens == results["plain"].generation_strategy_result.predicted_tokens, name
        assert result.num_thinking_tokens == results["plain"].num_thinking_tokens > 0


def test_a_grammar_without_thinking(results_of):
    """An output that may think and does not is guided from the first token on."""
    for result in results_of('{"a"', drafts=["layers"], grammar=ANSWER).values():
        assert (result.thinking, result.num_thinking_tokens) == ("", 0)
        assert re.fullmatch(PATTERN, result.decoded_prediction)


def test_guided_thinking_has_no_stop_token_of_the_request(byte_tokenizer):
    """Guards against an answer that is no JSON, since a stop token of the request ended the thinking."""
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
