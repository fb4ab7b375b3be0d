"""Thinking over HTTP: a model with given thoughts, by OpenAI's client and by hand."""

import json

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from servers import CHAT, GREEDY, HELLO, Served, chunks, post
from thinkers import SMOLLM3, TAGS, Teller, thinking_tokenizer

NAMES = ["reasoning_content", "reasoning"]
THOUGHT = "Hm, {a\n\nnaïve 日本"
TEXT = f"{TAGS[0]}\n{THOUGHT}\n{TAGS[1]}\n\n"
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["Rome", "Oslo"]}}}
STOP = {"type": "function", "function": {"name": "stop", "parameters": {"enum": [{}]}}}
STRICT = {"type": "function", "function": {**STOP["function"], "strict": True}}
NO_TOOLS = {"tools": []}
ONE = {"parallel_tool_calls": False}
LOGPROBS = {"logprobs": True}


@pytest.fixture(scope="module")
def served(byte_tokenizer):
    tokenizer = thinking_tokenizer(byte_tokenizer)
    strategy = GREEDY.generation_strategy
    with Served(Teller(tokenizer, strategy, max_position_embeddings=512)) as served:
        yield served


def streamed(served, **request):
    """The choices of all chunks but the first."""
    found = chunks(post(served, CHAT, **request, stream=True))
    for chunk in found:
        ChatCompletionChunk.model_validate(chunk)
    return [choice for chunk in found for choice in chunk["choices"]][1:]


def joined(choices, name):
    return "".join(choice["delta"].get(name) or "" for choice in choices)


def tokens_of(choices):
    found = [choice["logprobs"]["content"] for choice in choices if choice["logprobs"]]
    return [bytes(token["bytes"]) for tokens in found for token in tokens]


def answered(served, text=f"{TEXT}So be it.</s>", **request):
    """Choice and usage of an answer that begins with a text, and of the stream, which has the same text."""
    served.generator.text = text
    request = {"messages": HELLO, "max_tokens": 60, **request}
    answer = post(served, CHAT, **request).json()
    ChatCompletion.model_validate(answer)
    [choice] = answer["choices"]
    parts = streamed(served, **request)
    for name in ("content", *NAMES):
        assert joined(parts, name) == (choice["message"].get(name) or "")
    assert any(part["delta"].keys() & {*NAMES} for part in parts) == (NAMES[0] in choice["message"])
    assert parts[-1]["finish_reason"] == choice["finish_reason"]
    assert tokens_of(parts) == tokens_of([choice])
    return choice, answer["usage"], parts


def called(name="stop", arguments="{}"):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "fields", "content", "calls"),
    [
        ("So be it.</s>", NO_TOOLS, "So be it.", []),
        ("So be it.</s>", {**NO_TOOLS, "include_reasoning": False}, "So be it.", []),
        ("", {**NO_TOOLS, "response_format": SCHEMA}, '"', []),
        (called(), {"tool_choice": "required", "response_format": SCHEMA, "ignore_eos": True}, None, [{}]),
        (called(), {"response_format": SCHEMA}, None, [{}]),
        ('"Rome"</s>', {"response_format": SCHEMA}, '"Rome"', []),
        (f"Now.\n{called()}</s>", {"tools": [STRICT]}, None, [{}]),
        (called(arguments="[5]"), {"tools": [STRICT], "max_tokens": 110}, None, [{}]),
        (f"{called(arguments='[5]')}</s>", {}, None, [[5]]),
        ("Now.</s>", {"tools": [STRICT]}, "Now.", []),
        (f"{called()}\n{called()}</s>", {}, None, [{}] * 2),
        (f"{called()}\n{called()}</s>", ONE, None, [{}]),
        (f"{called()}\n{called()}</s>", {"tools": [STRICT]}, None, [{}] * 2),
        ("🙂 yes, Hm, no", {**NO_TOOLS, **LOGPROBS, "stop": "Hm"}, "🙂 yes, ", []),
        ("🙂 yes, Hm, no", {**NO_TOOLS, **LOGPROBS, "stop": " "}, "🙂", []),
    ],
)
def test_thinking_comes_before_the_answer(served, text, fields, content, calls):
    """Whole and streamed, by both names. Guards against tags in either, an answer that is not guided, a call
    that is looked for in the thinking, and thinking that waits for the end. Guards against tools that a
    schema for the answer hides, arguments against a strict schema, a second call that nobody asked for, stops
    in the thinking, and tokens of thinking among tokens of the content.
    """
    fields = {"tools": [STOP], "max_tokens": 200, **fields}
    choice, usage, undrafted = answered(served, TEXT + text, **fields)
    message = choice["message"]
    is_shown = fields.get("include_reasoning", True)
    assert [message.get(name) for name in NAMES] == [THOUGHT if is_shown else None] * 2
    assert [json.loads(call["function"]["arguments"]) for call in message.get("tool_calls", [])] == calls
    assert (message["content"] or "").startswith(content or "")
    if "response_format" in fields and not calls:
        assert json.loads(message["content"]) in SCHEMA["json_schema"]["schema"]["enum"]
    if "logprobs" in fields:
        assert b"".join(tokens_of([choice])).decode() == message["content"] == content
    num_thinking = len(served.generator.encode(TEXT, special_tokens=False)) - 2  # without the line breaks
    assert usage["completion_tokens_details"]["reasoning_tokens"] == num_thinking < usage["completion_tokens"]
    drafted = streamed(served, messages=HELLO, **fields, stream_drafts=True)
    for parts, pending in ((undrafted, False), (drafted, True)):
        thoughts = [part for part in parts if part["delta"].keys() & {*NAMES}]
        assert all(part["delta"].keys() == {*NAMES} for part in thoughts)
        assert parts[: len(thoughts)] == thoughts or pending  # drafts may have no text yet
        assert len(thoughts) > 3 or not is_shown
        texts = [joined(parts, name) for name in ("content", *NAMES)]
        assert texts == [message["content"] or "", *[THOUGHT * is_shown] * 2]


@pytest.mark.parametrize("text", ["<b>yes", "\n yes", "<think", f"\n{TAGS[0]}a{TAGS[1]}yes"])
def test_log_probabilities_of_an_answer_that_may_begin_a_tag(served, text):
    """Guards against tokens that were held back and are missing, and against those of an opening tag."""
    for drafts in (True, False):
        choice, *_ = answered(served, f"{text}</s>", logprobs=True, drafts=drafts)
        assert b"".join(tokens_of([choice])).decode() == choice["message"]["content"]
        assert choice["message"]["content"] == text.split(TAGS[1])[-1]


def test_a_limit_within_the_thinking(served):
    """Guards against thinking that becomes the answer, and a grammar that begins in it."""
    for guided in ({}, {"response_format": SCHEMA}):
        choice, *_ = answered(served, max_tokens=6, **guided)
        assert (choice["finish_reason"], choice["message"]["content"]) == ("length", "")
        assert THOUGHT.startswith(choice["message"]["reasoning"])


def test_requests_and_flags_set_variables_of_the_template(byte_tokenizer):
    """Guards against a flag that wins over a request, and efforts that no template gets."""
    seen = []
    teller = Teller(thinking_tokenizer(byte_tokenizer, SMOLLM3), GREEDY.generation_strategy)
    teller.encode = lambda prompt, *args: seen.append(prompt) or Teller.encode(teller, prompt, *args)
    with Served(teller, chat_template_kwargs='{"enable_thinking": false}') as served:

        def prompt(**request):
            seen.clear()
            answered(served, "x", max_tokens=1, **request)
            return seen[0]

        off = prompt()
        assert off.endswith(f"{TAGS[0]}\n\n{TAGS[1]}\n\n")
        assert prompt(chat_template_kwargs={"enable_thinking": False, "unknown": {"a": [1]}}) == off
        on = prompt(chat_template_kwargs={"enable_thinking": True})
        assert on == off.partition(TAGS[0])[0]
        for name, thinks, request in (
            ("low", on, {}),
            ("none", off, {}),
            ("none", on, {"chat_template_kwargs": {"enable_thinking": True}}),
        ):
            expected = thinks.replace("assistant:", f"effort {name}\nassistant:")
            assert prompt(reasoning_effort=name, **request) == expected
        thought = [*HELLO, {"role": "assistant", "content": "A", "reasoning": "THOUGHT"}, *HELLO]
        assert "THOUGHT" not in prompt(messages=thought)
        assert "THOUGHT" in prompt(messages=thought, chat_template_kwargs={"keep": True})
