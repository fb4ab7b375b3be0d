"""Guided answers, tools, predictions and penalties over HTTP, on the bundled model."""

import json

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
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.tool_calls %} <tool_call>{% endif %}\n"
    "{% endfor %}"
    "{% if tools %}{% for tool in tools %}{{ tool.function.name }} {% endfor %}{% endif %}assistant:"
)


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
    """By hand, by openai's `parse`, with and without drafts; guards against a grammar of the wrong row."""
    given = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA, "strict": True}}
    texts = [
        post(served, messages=HELLO, response_format=given, drafts=drafts).json()["choices"][0]["message"][
            "content"
        ]
        for drafts in (True, False)
    ]
    jsonschema.validate(json.loads(texts[0]), SCHEMA)
    assert texts[0] == texts[1]

    class Trip(pydantic.BaseModel):
        model_config = pydantic.ConfigDict(extra="forbid")
        days: int
        is_far: bool

    parsed = served.client.chat.completions.parse(model="tiny", messages=HELLO, response_format=Trip)
    assert isinstance(parsed.choices[0].message.parsed, Trip)


def test_an_object(served):
    given = {"type": "json_object"}
    answer = post(served, messages=HELLO, response_format=given, max_tokens=200).json()["choices"][0]
    if answer["finish_reason"] == "stop":  # the language is infinite
        assert isinstance(json.loads(answer["message"]["content"]), dict)
    assert answer["message"]["content"].startswith("{")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}, "nonsense"),
        ({"type": "json_schema"}, "belongs to the type json_schema"),
        (
            {
                "type": "json_schema",
                "json_schema": {"schema": {"type": "integer", "minimum": 3, "maximum": 2}},
            },
            "Unsatisfiable schema",
        ),
        ({"type": "yaml"}, "response_format.type"),
    ],
)
def test_bad_schemas(served, given, said):
    response = post(served, messages=HELLO, response_format=given)
    assert response.status_code == 400
    assert said in response.json()["error"]["message"]
    assert len(response.json()["error"]["message"].splitlines()) == 1


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_call(served, choice, stream):
    request = {"messages": HELLO, "tools": [WEATHER], "tool_choice": choice}
    if stream:
        lines = post(served, **request, stream=True).text.split("\n\n")
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
        (call,) = next(delta["tool_calls"] for delta in deltas if delta.get("tool_calls"))
        assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    else:
        answer = served.client.chat.completions.create(model="tiny", **request).choices[0]
        assert answer.finish_reason == "tool_calls"
        call = answer.message.tool_calls[0].model_dump()
    assert call["function"]["name"] == "weather"
    jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMA)


def test_a_conversation_with_calls(served):
    """The result of a call goes back to the model; with `auto` it may answer in words."""
    called = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Rome"}'},
    }
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [called]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
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
    response = post(served, "completions", prompt="x", logit_bias={"999999": 1})
    assert (response.status_code, "must be a token id below" in response.text) == (400, True)
