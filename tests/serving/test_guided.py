"""Guided answers, tools, predictions and penalties on the bundled model, over HTTP and by the clients that
people have: openai, LangChain, LiteLLM.
"""

import json
from typing import Literal

import jsonschema
import pydantic
import pytest
import requests
from servers import Served

import self_speculation
from self_speculation import GenerationConfig, HuggingfaceLlamaGenerator, make_strategy

HELLO = [{"role": "user", "content": "Hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
CLIENTS = "needs requirements-clients.txt"
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.tool_calls %} <tool_call>{% endif %}\n"
    "{% endfor %}"
    "{% if tools %}{% for tool in tools %}{{ tool.function.name }} {% endfor %}{% endif %}assistant:"
)


class Place(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    name: Literal["Rome", "Oslo"]


class Trip(pydantic.BaseModel):
    """A trip to somewhere."""

    model_config = pydantic.ConfigDict(extra="forbid")
    place: Place  # a reference in the schema
    days: Literal[1, 2, 3]


@pytest.fixture(scope="module")
def served():
    model, tokenizer = self_speculation.load_model_and_tokenizer(self_speculation.default_model())
    tokenizer.chat_template = TEMPLATE
    config = GenerationConfig(sample=False, max_steps=200, generation_strategy="adaptive")
    with Served(HuggingfaceLlamaGenerator(tokenizer, model, make_strategy("adaptive")), config) as served:
        yield served


def post(served, path="chat/completions", **request):
    return requests.post(f"{served.url}/v1/{path}", json=request, timeout=60)


def test_a_schema(served):
    """As openai and as llama.cpp have it, by openai's `parse`, with and without drafts. Guards against the
    grammar of another row.
    """
    given = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA, "strict": True}}
    texts = set()
    for form, drafts in ((given, True), (given, False), ({"type": "json_object", "schema": SCHEMA}, True)):
        answer = post(served, messages=HELLO, response_format=form, drafts=drafts).json()
        texts.add(answer["choices"][0]["message"]["content"])
    [text] = texts
    jsonschema.validate(json.loads(text), SCHEMA)

    parsed = served.client.chat.completions.parse(model="tiny", messages=HELLO, response_format=Trip)
    assert isinstance(parsed.choices[0].message.parsed, Trip)


def test_an_object(served):
    given = {"type": "json_object"}
    answer = post(served, messages=HELLO, response_format=given, max_tokens=200).json()["choices"][0]
    if answer["finish_reason"] == "stop":  # the language is infinite
        assert isinstance(json.loads(answer["message"]["content"]), dict)
    assert answer["message"]["content"].startswith("{")


def nested(depth):
    return {"properties": {"a": nested(depth - 1)}} if depth else {}


LOOP = {"$defs": {"a": {"$ref": "#/$defs/a"}}}
BAD_SCHEMAS = {
    "invalid": ({"type": "nonsense"}, "nonsense"),
    "empty range": ({"type": "integer", "minimum": 3, "maximum": 2}, "Unsatisfiable schema"),
    "1 MB": ({"const": "x" * 1_000_000}, "at most 100000"),
    "10,000 properties": ({"properties": {f"p{i}": {} for i in range(10_000)}}, "at most 100000"),
    "many properties": ({"properties": {str(i): {} for i in range(6000)}}, "grammar size"),
    "depth 160": (nested(80), "recursion limit"),
    "depth 500": (nested(250), "recursion limit"),
    "huge counts": ({"type": "string", "pattern": "^(a{1000}){1000}$"}, "multiply to more than 10000"),
    "counts of a name": ({"patternProperties": {"^(a{1000}){1000}$": {}}}, "multiply to more than 10000"),
    "look-ahead": ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
    "combinations": (
        {"allOf": [{"anyOf": [{"properties": {f"x{i}{j}": {}}} for j in "ab"]} for i in range(25)]},
        "too large",
    ),
    "recursion": ({**LOOP, "$ref": "#/$defs/a"}, "matches nothing"),
    "recursion inside": (
        {**LOOP, "type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "required": ["a"]},
        "matches nothing",
    ),
}


@pytest.mark.parametrize("schema", BAD_SCHEMAS)
@pytest.mark.parametrize("kind", ["schema", "tool"])
def test_bad_schemas(served, schema, kind):
    """Guards against a status 500, a message of many lines, an empty answer, and seconds of work."""
    schema, said = BAD_SCHEMAS[schema]
    function = {"name": "f", "parameters": schema}
    request = {
        "schema": {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}},
        "tool": {"tools": [{"type": "function", "function": function}], "tool_choice": "required"},
    }[kind]
    response = post(served, messages=HELLO, **request)
    message = response.json()["error"]["message"]
    assert response.status_code == 400
    assert said in message
    assert (len(message.splitlines()), len(message) < 500) == (1, True)


def test_expensive_patterns_are_answered(served):
    """Guards against expressions for which a backtracking engine takes for ever."""
    for pattern in (
        "^(a|a)*b$",
        "^(a|b)*a(a|b){200}$",
        "^((a|b){0,5000}c){0,5000}$",
        "^" + "(" * 30 + "a" + "+)" * 30,
    ):
        schema = {"schema": {"type": "string", "pattern": pattern}}
        given = {"type": "json_schema", "json_schema": schema}
        assert post(served, messages=HELLO, response_format=given, max_tokens=8).status_code == 200


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_and_its_result(served, choice, stream):
    """They go back to the model; with `auto` it may answer in words. Guards against fields of an answer
    that the server itself rejects.
    """
    request = {"messages": HELLO, "tools": [WEATHER], "tool_choice": choice}
    if stream:
        lines = post(served, **request, stream=True).text.split("\n\n")
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
        message = {"role": "assistant", "content": None}
        (message["tool_calls"],) = [delta["tool_calls"] for delta in deltas if delta.get("tool_calls")]
        assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    else:
        answer = served.client.chat.completions.create(model="tiny", **request).choices[0]
        assert answer.finish_reason == "tool_calls"
        message = answer.message.model_dump()
    [call] = message["tool_calls"]
    assert call["function"]["name"] == "weather"
    jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMA)
    messages = [*HELLO, message, {"role": "tool", "tool_call_id": call["id"], "content": "sunny"}]
    answer = post(served, messages=messages, tools=[WEATHER], max_tokens=8).json()["choices"][0]
    assert answer["message"]["content"]
    assert answer["finish_reason"] == "length"


def test_tools_that_cannot_be_called(served):
    other = {"type": "function", "function": {"name": "other"}}
    response = post(served, messages=HELLO, tools=[WEATHER], tool_choice=other)
    assert (response.status_code, "names no tool" in response.text) == (400, True)
    served.generator.tokenizer.chat_template, template = "{{ messages[0].content }}", TEMPLATE
    try:
        response = post(served, messages=HELLO, tools=[WEATHER])
        assert (response.status_code, "knows no tools" in response.text) == (400, True)
    finally:
        served.generator.tokenizer.chat_template = template


def test_a_prediction(served):
    plain = post(served, messages=HELLO, max_tokens=60).json()
    text = plain["choices"][0]["message"]["content"]
    answer = post(
        served, messages=HELLO, max_tokens=60, prediction={"type": "content", "content": text}
    ).json()
    assert answer["choices"][0]["message"]["content"] == text
    details = answer["usage"]["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] > 10 > details["rejected_prediction_tokens"]
    assert plain["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] == 0


def test_penalties_and_biases(served):
    """Guards against fields without an effect, and ids that the model does not have."""

    def text(**fields):
        answer = post(served, "completions", prompt="def add(a, b):", max_tokens=20, **fields).json()
        return answer["choices"][0]["text"]

    plain = text()
    for fields in ({"frequency_penalty": 2}, {"presence_penalty": 2}, {"repetition_penalty": 2.0}):
        assert text(**fields) != plain
    tokenizer = served.generator.tokenizer
    (id_,) = tokenizer.encode("x", add_special_tokens=False)
    assert set(text(logit_bias={str(id_): 100})) == {"x"}
    banned = dict.fromkeys(map(str, tokenizer.encode(plain, add_special_tokens=False)), -100)
    assert text(logit_bias=banned) != plain
    response = post(served, "completions", prompt="x", logit_bias={"999999": 1})
    assert (response.status_code, "must be by token ids below" in response.text) == (400, True)


@pytest.fixture
def langchain(served):
    library = pytest.importorskip("langchain_openai", reason=CLIENTS)
    return library.ChatOpenAI(
        base_url=f"{served.url}/v1", api_key="none", model="tiny", temperature=0, max_retries=0,
        max_tokens=200, timeout=60,
    )  # fmt: skip


def expected(served, **request):
    answer = served.client.chat.completions.create(model="tiny", messages=HELLO, temperature=0, **request)
    return answer.choices[0].message.content


@pytest.mark.slow
def test_langchain_invokes_streams_and_batches(langchain, served):
    """Guards against chunks that it cannot add up, and usage that it does not find."""
    text = expected(served, max_tokens=200)
    answer = langchain.invoke("Hello")
    assert answer.content == text
    *chunks, last = langchain.stream("Hello", stream_usage=True)
    assert "".join(chunk.content for chunk in [*chunks, last]) == text
    assert len(chunks) > 3
    used = next(chunk.usage_metadata for chunk in [*chunks, last] if chunk.usage_metadata)
    assert used["output_tokens"] == answer.usage_metadata["output_tokens"] <= 200
    assert [each.content for each in langchain.batch(["Hello"] * 3)] == [text] * 3


@pytest.mark.slow
@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_gets_structured_output(langchain, method):
    """Guards against references within the schema of a tool, which start in that schema."""
    trip = langchain.with_structured_output(Trip, method=method, strict=True).invoke("Hello")
    assert isinstance(trip, Trip)


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_langchain_calls_tools(langchain, stream):
    """Guards against chunks of a call that it cannot add up. The answer to a call goes back to the model."""
    messages = pytest.importorskip("langchain_core.messages")
    caller = langchain.bind_tools([WEATHER], tool_choice="required")
    answer = caller.invoke("Hello")
    if stream:
        first, *others = caller.stream("Hello")
        for chunk in others:
            first += chunk
        assert [call["args"] for call in first.tool_calls] == [call["args"] for call in answer.tool_calls]
    [call] = answer.tool_calls
    assert call["name"] == "weather"
    assert call["args"].keys() == SCHEMA["properties"].keys()
    conversation = [
        messages.HumanMessage("Hello"),
        answer,
        messages.ToolMessage("sunny", tool_call_id=call["id"]),
    ]
    assert langchain.bind_tools([WEATHER]).invoke(conversation).content


@pytest.mark.slow
def test_litellm(served, monkeypatch):
    """Guards against a prompt that is too long for the context and not an error that programs act on."""
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it asks a site otherwise
    litellm = pytest.importorskip("litellm", reason=CLIENTS)
    request = {
        "model": "openai/tiny", "api_base": f"{served.url}/v1", "api_key": "none", "temperature": 0,
        "max_tokens": 60, "num_retries": 0,
    }  # fmt: skip
    text = expected(served, max_tokens=60)
    answer = litellm.completion(messages=HELLO, **request)
    assert answer.choices[0].message.content == text
    chunks = list(litellm.completion(messages=HELLO, stream=True, **request))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    long = [{"role": "user", "content": "x y z " * 5000}]
    for stream in (False, True):
        with pytest.raises(litellm.exceptions.ContextWindowExceededError):
            list(litellm.completion(messages=long, stream=stream, **request))
