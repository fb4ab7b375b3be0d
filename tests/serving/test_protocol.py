"""The fields of requests, without a server."""

import json

import pytest
from pydantic import ValidationError

from self_speculation import GenerationConfig
from serving.protocol import ChatRequest, CompletionRequest, validation_error

HELLO = [{"role": "user", "content": "Hello"}]


def refused(kind, **request):
    """The field at fault, and the message."""
    with pytest.raises(ValidationError) as invalid:
        kind.model_validate_json(json.dumps(request))
    assert invalid.value.error_count() <= 8  # the longest list of faults is that of a prompt's union
    error = validation_error(invalid.value)
    return error.param, str(error)


@pytest.mark.parametrize(
    ("name", "neutral", "other"),
    [
        ("ignore_eos", [False], True),
        ("chat_template_kwargs", [{}], {"x": 1}),
        ("top_logprobs", [0], 1),
        ("stream_options", [{}, {"include_usage": False}], {"include_usage": True}),
        ("stream_drafts", [False], True),
        ("frobnicate", [None], 1),
        ("tools", [[]], 1),
        ("tool_choice", ["none", "auto"], "maybe"),
        ("response_format", [{}, {"type": "text"}], {"type": "json_schema"}),
        ("logit_bias", [{}], []),
        ("presence_penalty", [0], 3),
        ("frequency_penalty", [0.0], 3),
        ("repetition_penalty", [1], 0),
        ("min_p", [0], 2),
        ("top_k", [-1, 0], -2),
    ],
)
def test_neutral_values_are_accepted_and_others_are_errors(name, neutral, other):
    """Guards against clients that send every field's default and get an error or another text, and against a
    field that is accepted and changes nothing.
    """
    for value in neutral:
        request = ChatRequest(messages=HELLO, **{name: value})
        assert request.generation_config(GenerationConfig()) == GenerationConfig()
        assert request.grammar(None) is None
        assert not request.logit_bias
        assert not request.is_buffered
    param, message = refused(ChatRequest, messages=HELLO, **{name: other})
    assert param.split(".")[0] == name
    assert message.startswith(name)


def test_harmless_fields_are_ignored():
    """Guards against errors for what clients send by default, in requests and in messages."""
    fields = {
        "metadata": {"a": "b"}, "prompt_cache_key": "k", "safety_identifier": "s", "store": True, "user": "u",
        "service_tier": "flex", "reasoning_effort": "low", "verbosity": "high",
    }  # fmt: skip
    part = {"type": "text", "text": "Hello", "cache_control": {"type": "ephemeral"}}
    messages = [{"role": "user", "name": "Eve", "content": [part]}]
    assert ChatRequest(messages=messages, **fields) == ChatRequest(messages=HELLO)
    answer = {"tool_calls": [], "annotations": [], "reasoning_content": "", "refusal": None, "audio": None}
    for content in ({}, {"content": None}, {"content": ""}):
        [message] = ChatRequest(messages=[{"role": "assistant", **answer, **content}]).messages
        assert message.for_template == {"role": "assistant", "content": ""}


def test_a_template_gets_the_arguments_of_calls():
    """Guards against arguments in quotes, and against roles that templates do not know."""
    function = {"name": "weather", "arguments": '{"city": "Rome"}'}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    calls = [{"id": "x", "type": "function", "index": 0, "function": function}]
    messages = [{"role": "developer", "content": parts}, {"role": "assistant", "tool_calls": calls}]
    first, second = ChatRequest(messages=messages).messages
    assert first.for_template == {"role": "system", "content": "a\nb"}
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    assert second.for_template["tool_calls"] == [{"id": "x", **call}]
    function["arguments"] = ""  # of a function without parameters
    [_, second] = ChatRequest(messages=messages).messages
    assert second.for_template["tool_calls"][0]["function"]["arguments"] == {}
    function["arguments"] = "{"
    assert refused(ChatRequest, messages=messages)[0] == "messages.1.tool_calls.0.function.arguments"


def test_parts_of_a_prediction_are_one_text():
    """Guards against lines that break where a client has cut a file in parts."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = ChatRequest(messages=HELLO, prediction={"type": "content", "content": parts})
    assert request.prediction.content == "ab"


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0.type"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": "0.5"}, "temperature"),
        ({"n": 0}, "n"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty"),  # infinite logits
        ({"max_tokens": 5, "max_completion_tokens": 0}, "max_completion_tokens"),
        ({"stop": [""]}, "stop.0"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, None),
        ({"logit_bias": {"x": 1}}, "logit_bias.x.[key]"),
        ({"logit_bias": {"-1": 1}}, "logit_bias.-1.[key]"),
        ({"response_format": {"type": "text", "schema": {}}}, "response_format"),
        ({"response_format": {"type": "json_object", "schema": 1}}, "response_format.schema"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
    ],
)
def test_an_error_names_the_place_of_a_bad_value(request_, param):
    """Guards against numbers in quotes, and against type names of a union in the path."""
    assert refused(ChatRequest, **{"messages": HELLO, **request_})[0] == param


EMPTY = {"role": "user", "content": ""}
PARTS = [{"type": "text", "text": ""}] * 9_000


@pytest.mark.parametrize(
    ("kind", "request_", "param", "says"),
    [
        (ChatRequest, {"messages": [EMPTY] * 9_000}, "messages", "at most 2048 items"),
        (ChatRequest, {"messages": [{}] * 9_000}, "messages.0.role", "required"),
        (
            ChatRequest,
            {"messages": [{**EMPTY, "content": PARTS}]},
            "messages.0.content",
            "at most 2048 items",
        ),
        (CompletionRequest, {"prompt": [""] * 9_000}, "prompt", "at most 2048 prompts, not 9000"),
        (CompletionRequest, {"prompt": [1] * 9_000 + [True] * 9_000}, "prompt", "must be a text"),
        (CompletionRequest, {f"x{i}": 0 for i in range(9_000)}, None, "at most 100 fields, not 9000"),
    ],
)
def test_validation_stops_at_the_first_fault(kind, request_, param, says):
    """Guards against seconds of validation, and against a message that quotes the whole request."""
    name, message = refused(kind, **request_)
    assert (name, says in message, len(message) < 200) == (param, True, True)


@pytest.mark.parametrize("prompt", [{}, [["a"]], [1, "a"], [[]], ["a", 1], [True], 5, ["a", None]])
def test_a_prompt_is_text_or_ids(prompt):
    """Guards against an error for each type of the union."""
    message = "must be a text, or token ids, or a list of either"
    assert refused(CompletionRequest, prompt=prompt) == ("prompt", f"prompt {prompt!r}: {message}")
    for one in ("a", "", [5, 6]):
        assert CompletionRequest(prompt=one).prompt == [one]
        assert CompletionRequest(prompt=[one, "b"]).prompt == [one, "b"]


def test_the_servers_config_has_the_defaults():
    """Guards against a temperature of the flags that overrides the request's, or the other way round."""
    default = GenerationConfig(max_steps=7, sample=False, top_p=0.5, stop_words=["x"], exit_layer=2)
    assert ChatRequest(messages=HELLO).generation_config(default) == default
    request = ChatRequest(messages=HELLO, temperature=0.5, max_completion_tokens=9, stop="y", drafts=False)
    config = request.generation_config(default)
    assert (config.sample, config.temperature, config.top_p) == (True, 0.5, 0.5)
    assert (config.max_steps, config.stop_words) == (9, ["y"])
    assert (config.generation_strategy, config.exit_layer) == ("autoregressive", -1)
    assert ChatRequest(messages=HELLO, temperature=0).generation_config(GenerationConfig()).greedy
    more = {"max_tokens": 9, "max_completion_tokens": 9}
    for limits in ({"max_tokens": 5}, more | {"max_tokens": 5}, more | {"max_completion_tokens": 5}):
        assert ChatRequest(messages=HELLO, **limits).max_new_tokens == 5
