"""Thinking over HTTP: a model that is told what to think, by OpenAI's client and by hand."""

import json

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from servers import GREEDY, Served, chunks, post, refused
from thinkers import QWEN3, R1, SMOLLM3, TAGS, Teller, thinking_tokenizer

from serving.protocol import ChatRequest

CHAT = "chat/completions"
HELLO = [{"role": "user", "content": "Hello"}]
NAMES = ["reasoning_content", "reasoning"]
THOUGHT = "Hm, {a\n\nnaïve 日本"
TEXT = f"{TAGS[0]}\n{THOUGHT}\n{TAGS[1]}\n\n"
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["Rome", "Oslo"]}}}
STOP = {"type": "function", "function": {"name": "stop", "parameters": {"enum": [{}]}}}
CALL = {"tools": [STOP], "tool_choice": "required", "max_tokens": 120}


@pytest.fixture(scope="module")
def served(byte_tokenizer):
    teller = Teller(
        thinking_tokenizer(byte_tokenizer), GREEDY.generation_strategy, max_position_embeddings=512
    )
    with Served(teller, GREEDY) as served:
        yield served


def answered(served, text=f"{TEXT}So be it.</s>", **request):
    """The only choice, and the usage, of an answer that begins with a text."""
    served.generator.text = text
    answer = post(served, CHAT, **{"messages": HELLO, "max_tokens": 60, **request}).json()
    ChatCompletion.model_validate(answer)
    return answer["choices"][0], answer["usage"]


def streamed(served, text=f"{TEXT}So be it.</s>", **request):
    """The choices of all chunks but the first."""
    served.generator.text = text
    request = {"messages": HELLO, "max_tokens": 60, "stream": True, **request}
    found = chunks(post(served, CHAT, **request))
    for chunk in found:
        ChatCompletionChunk.model_validate(chunk)
    return [choice for chunk in found for choice in chunk["choices"]][1:]


def joined(choices, name):
    return "".join(choice["delta"].get(name) or "" for choice in choices)


@pytest.mark.parametrize("guided", [{}, {"response_format": SCHEMA}, CALL])
def test_thinking_comes_before_the_answer(served, guided):
    """Whole and streamed, by both names. Guards against tags in either, an answer that is not guided, a call
    that is looked for in the thinking, and thinking that waits for the end of a call.
    """
    rest = '<tool_call>\n{"name": "stop", "arguments": {}}' if "tools" in guided else "So be it.</s>"
    text = TEXT if "response_format" in guided else TEXT + rest
    whole, usage = answered(served, text, **guided)
    message, plain = whole["message"], answered(served, text, **guided, drafts=False)[0]["message"]
    assert [plain[name] for name in ["content", *NAMES]] == [message[name] for name in ["content", *NAMES]]
    assert [message[name] for name in NAMES] == [THOUGHT] * 2
    if "response_format" in guided:
        assert json.loads(message["content"]) in SCHEMA["json_schema"]["schema"]["enum"]
    if "tools" in guided:
        assert message["content"] is None
        assert message["tool_calls"][0]["function"] == {"name": "stop", "arguments": "{}"}
    num_thinking = len(served.generator.encode(TEXT, special_tokens=False)) - 2  # without the line breaks
    assert usage["completion_tokens_details"]["reasoning_tokens"] == num_thinking < usage["completion_tokens"]
    for pending in ({}, {"stream_drafts": True}):
        parts = streamed(served, text, **guided, **pending)
        thoughts = [part for part in parts if part["delta"].keys() & {*NAMES}]
        assert all(part["delta"].keys() == {*NAMES} for part in thoughts)
        assert parts[: len(thoughts)] == thoughts or pending  # drafts may have no text yet
        assert len(thoughts) > 3
        assert [joined(parts, name) for name in NAMES] == [THOUGHT] * 2
        assert joined(parts, "content") == (message["content"] or "")
        assert parts[-1]["finish_reason"] == whole["finish_reason"]


def test_the_client_of_openai(served):
    """Guards against fields that it drops, or that the server rejects when they come back."""
    served.generator.text = f"{TEXT}So be it.</s>"
    create = served.client.chat.completions.create
    answer = create(model="tiny", messages=HELLO, max_tokens=60).choices[0].message
    assert answer.reasoning_content == THOUGHT
    assert TAGS[1] not in answer.content
    again = create(model="tiny", messages=[*HELLO, answer.model_dump(), *HELLO], max_tokens=60)
    assert again.usage.completion_tokens_details.reasoning_tokens > 0
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    assert not hasattr(create(model="tiny", messages=HELLO, extra_body=off).choices[0].message, NAMES[0])


def test_thinking_that_is_not_asked_for(served):
    choice, usage = answered(served, include_reasoning=False)
    assert not choice["message"].keys() & {*NAMES}
    assert usage["completion_tokens_details"]["reasoning_tokens"] > 0
    parts = streamed(served, include_reasoning=False)
    assert joined(parts, "content") == choice["message"]["content"]
    assert not any(part["delta"].keys() & {*NAMES} for part in parts)


def test_a_limit_within_the_thinking(served):
    for choice in (
        answered(served, max_tokens=6)[0],
        answered(served, max_tokens=6, response_format=SCHEMA)[0],
    ):
        assert choice["finish_reason"] == "length"
        assert choice["message"]["content"] == ""
        assert THOUGHT.startswith(choice["message"]["reasoning"])
    parts = streamed(served, max_tokens=6)
    assert joined(parts, "content") == ""
    assert THOUGHT.startswith(joined(parts, "reasoning"))
    assert parts[-1]["finish_reason"] == "length"


def test_stop_words_and_log_probabilities_are_of_the_answer(served):
    """Guards against a stop in the thinking, and tokens of it among those of the content."""
    for stop, said in (("Hm", "🙂 yes, "), (" ", "🙂")):
        request = {"stop": stop, "logprobs": True}
        choice, _ = answered(served, f"{TEXT}🙂 yes, Hm, no", **request)
        assert choice["message"]["content"] == said
        parts = streamed(served, f"{TEXT}🙂 yes, Hm, no", **request)
        assert joined(parts, "content") == said
        for choices in ([choice], parts):
            tokens = [token for choice in choices for token in choice["logprobs"]["content"]]
            assert b"".join(bytes(token["bytes"]) for token in tokens) == said.encode()


@pytest.mark.parametrize("text", ["<b>yes", "\n yes", "<think", f"\n{TAGS[0]}a{TAGS[1]}yes"])
def test_log_probabilities_of_an_answer_that_may_begin_a_tag(served, text):
    """Guards against tokens that were held back and are missing, and against those of an opening tag."""
    for drafts in (True, False):
        choice, _ = answered(served, f"{text}</s>", logprobs=True, drafts=drafts)
        tokens = [bytes(token["bytes"]) for token in choice["logprobs"]["content"]]
        parts = streamed(served, f"{text}</s>", logprobs=True, drafts=drafts)
        in_stream = [bytes(token["bytes"]) for part in parts for token in part["logprobs"]["content"]]
        assert b"".join(tokens).decode() == choice["message"]["content"] == text.split(TAGS[1])[-1]
        assert in_stream == tokens


@pytest.mark.parametrize("template", [QWEN3, R1, SMOLLM3])
def test_requests_and_flags_set_variables_of_the_template(byte_tokenizer, template):
    """Guards against a flag that wins over a request, and efforts that no template gets."""
    seen = []
    teller = Teller(thinking_tokenizer(byte_tokenizer, template), GREEDY.generation_strategy)
    teller.encode = lambda prompt, *args: seen.append(prompt) or Teller.encode(teller, prompt, *args)
    with Served(teller, GREEDY, chat_template_kwargs='{"enable_thinking": false}') as served:

        def prompt(**request):
            seen.clear()
            answered(served, "x", max_tokens=1, **request)
            return seen[0]

        off = prompt()
        assert off.endswith(f"{TAGS[0]}\n" if template == R1 else f"{TAGS[0]}\n\n{TAGS[1]}\n\n")
        assert prompt(chat_template_kwargs={"enable_thinking": False, "unknown": {"a": [1]}}) == off
        on = prompt(chat_template_kwargs={"enable_thinking": True})
        assert on == (off if template == R1 else off.partition(TAGS[0])[0])
        effort = "effort {}\nassistant:" if template == SMOLLM3 else "assistant:"
        for name, thinks, request in (
            ("low", True, {}),
            ("none", False, {}),
            ("none", True, {"chat_template_kwargs": {"enable_thinking": True}}),
        ):
            expected = (on if thinks else off).replace("assistant:", effort.format(name))
            assert prompt(reasoning_effort=name, **request) == expected
        thought = [*HELLO, {"role": "assistant", "content": "A", "reasoning": "THOUGHT"}, *HELLO]
        assert "THOUGHT" not in prompt(messages=thought)
        assert "THOUGHT" in prompt(messages=thought, chat_template_kwargs={"keep": True})


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (5, "chat_template_kwargs 5: Input should be an object"),
        (["enable_thinking"], "should be an object"),
        ("enable_thinking=false", "should be an object"),
        ({"chat_template": "{{ 1 }}"}, "chat_template is no variable of chat templates"),
        ({"tokenize": True}, "tokenize is no variable of chat templates"),
    ],
)
def test_variables_that_are_none(served, given, says):
    """Guards against a client that has its own template or other ids rendered."""
    message = refused(served, CHAT, messages=HELLO, chat_template_kwargs=given)
    assert says in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("template", ["{{ 1 // x }}", "{{ x | dictsort }}", "{{ x + 'a' }}", "{{ x.y.z }}"])
def test_variables_that_a_template_cannot_use(byte_tokenizer, template):
    """Guards against the status of a fault of the server."""
    teller = Teller(thinking_tokenizer(byte_tokenizer, template), GREEDY.generation_strategy)
    with Served(teller, GREEDY) as served:
        message = refused(served, CHAT, messages=HELLO, chat_template_kwargs={"x": 0})
        assert message.startswith("messages: the chat template fails: ")


def test_earlier_thinking_goes_to_the_template():
    """By either name. Guards against other servers' objects of that name."""
    for fields, expected in (
        ({"reasoning_content": "a"}, "a"),
        ({"reasoning": "a"}, "a"),
        ({"reasoning": "a", "reasoning_content": "a"}, "a"),
        ({"reasoning": {"effort": "low"}, "reasoning_content": "a"}, "a"),
        ({"reasoning": {"effort": "low"}}, None),
        ({"reasoning": "", "reasoning_content": None}, None),
    ):
        [message] = ChatRequest(messages=[{"role": "assistant", "content": "x", **fields}]).messages
        assert message.for_template.get("reasoning_content") == expected
        assert "reasoning" not in message.for_template
