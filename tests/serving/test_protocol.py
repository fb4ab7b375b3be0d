"""What a request may say, without a server."""

import json

import pytest
from pydantic import ValidationError

from self_speculation import GenerationConfig
from serving.protocol import APIError, ChatRequest, CompletionRequest, parse

HELLO = [{"role": "user", "content": "Hello"}]


def refused(kind, **said):
    """(field at fault, message)"""
    with pytest.raises(APIError) as refused:
        parse(kind, json.dumps(said).encode())
    return refused.value.param, str(refused.value)


@pytest.mark.parametrize(
    ("name", "neutral", "other"),
    [
        ("tools", [], [{"type": "function"}]),
        ("tool_choice", "none", "required"),
        ("response_format", {"type": "text"}, {"type": "json_object"}),
        ("presence_penalty", 0, 0.5),
        ("frequency_penalty", 0.0, -1),
        ("logit_bias", {}, {"5": 1}),
        ("store", False, True),
        ("frobnicate", None, 1),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_name(name, neutral, other):
    """Guards against a field that is ignored, and against clients that send every field with its default."""
    assert ChatRequest(messages=HELLO, **{name: neutral}) == ChatRequest(messages=HELLO)
    param, message = refused(ChatRequest, messages=HELLO, **{name: other})
    assert param == name
    assert message.startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("said", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "x", "name": "Eve"}]}, "messages.0.name"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0.type",
        ),
        ({"messages": HELLO, "temperature": 3}, "temperature"),
        ({"messages": HELLO, "temperature": float("nan")}, "temperature"),
        ({"messages": HELLO, "temperature": "0.5"}, "temperature"),
        ({"messages": HELLO, "top_p": -0.1}, "top_p"),
        ({"messages": HELLO, "max_tokens": 0}, "max_tokens"),
        ({"messages": HELLO, "max_tokens": 1.5}, "max_tokens"),
        ({"messages": HELLO, "max_tokens": 5, "max_completion_tokens": 5}, "max_tokens"),
        ({"messages": HELLO, "stop": [""]}, "stop.0"),
        ({"messages": HELLO, "stop": ["x"] * 17}, "stop"),
        ({"messages": HELLO, "n": 0}, "n"),
        ({"messages": HELLO, "seed": True}, "seed"),
        ({"messages": HELLO, "stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": HELLO, "stream_drafts": True}, "stream_drafts"),
        ({"messages": HELLO, "stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"messages": HELLO, "top_logprobs": 3}, "top_logprobs"),
        ({"messages": HELLO, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": HELLO, "prompt": "x"}, "prompt"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content.0.text"),
    ],
)
def test_bad_values_are_refused_by_their_place(said, param):
    """Guards against numbers in quotes that pass, and against names of the types that were tried."""
    assert refused(ChatRequest, **said)[0] == param


EMPTY = {"role": "user", "content": ""}
PART = {"type": "text", "text": ""}


@pytest.mark.parametrize(
    ("kind", "said", "param", "says"),
    [
        (ChatRequest, {"messages": [EMPTY] * 9_000}, "messages", "at most 2048 items"),
        (ChatRequest, {"messages": [{}] * 9_000}, "messages.0.role", "required"),
        (
            ChatRequest,
            {"messages": [{"role": "user", "content": [PART] * 9_000}]},
            "messages.0.content",
            "at most 2048 items",
        ),
        (CompletionRequest, {"prompt": [""] * 9_000}, "prompt", "at most 2048 prompts, not 9000"),
        (CompletionRequest, {"prompt": [1] * 9_000 + [True] * 9_000}, "prompt", "must be a text"),
        (CompletionRequest, {f"x{i}": 0 for i in range(9_000)}, None, "at most 100 fields, not 9000"),
    ],
)
def test_what_is_endless_is_refused_by_its_first_fault(kind, said, param, says):
    """Guards against a request under the size limit that is checked for seconds, and against a message that
    spells all of it.
    """
    with pytest.raises(ValidationError) as error:
        kind.model_validate(said)
    assert error.value.error_count() <= 2  # of the first message
    name, message = refused(kind, **said)
    assert (name, says in message, len(message) < 200) == (param, True, True)


@pytest.mark.parametrize("prompt", [{}, [["a"]], [1, "a"], [[]], ["a", 1], [True], 5])
def test_a_prompt_is_text_or_ids(prompt):
    """Guards against a message for each of the forms that it might have had."""
    message = "must be a text, or token ids, or a list of either"
    assert refused(CompletionRequest, prompt=prompt) == ("prompt", f"prompt {prompt!r}: {message}")


@pytest.mark.parametrize(
    ("given", "several"),
    [
        ("a", ["a"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([5, 6], [[5, 6]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
        ([[5], "b"], [[5], "b"]),
    ],
)
def test_one_prompt_or_several(given, several):
    assert CompletionRequest(prompt=given).prompt == several


def test_what_is_not_said_is_as_the_server_says():
    """Guards against a temperature of the flags that overrides the request's, or the other way round."""
    default = GenerationConfig(max_steps=7, sample=False, top_p=0.5, stop_words=["x"], exit_layer=2)
    assert ChatRequest(messages=HELLO).generation_config(default) == default
    said = ChatRequest(messages=HELLO, temperature=0.5, max_completion_tokens=9, stop="y", drafts=False)
    config = said.generation_config(default)
    assert (config.sample, config.temperature, config.top_p) == (True, 0.5, 0.5)
    assert (config.max_steps, config.stop_words) == (9, ["y"])
    assert (config.generation_strategy, config.exit_layer) == ("autoregressive", -1)
    assert ChatRequest(messages=HELLO, temperature=0).generation_config(GenerationConfig()).greedy
