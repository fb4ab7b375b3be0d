"""Guided answers, tools, predictions and penalties on the bundled model, over HTTP and by OpenAI's client."""

import contextlib
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import jsonschema
import pydantic
import pytest
import requests
from conftest import config_of, generator_of
from helpers import watch
from servers import CHAT, HELLO, Served, chunks, post, raw_request, refused, tiny_generator, until

from self_speculation.text import grammar
from self_speculation.text.grammar_sandbox import GrammarSandbox

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"enum": [1, 2, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
NAMED = {"type": "function", "function": {"name": "weather"}}
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
def served(bundled):
    model, tokenizer = bundled
    tokenizer.chat_template = TEMPLATE
    config = config_of(max_steps=200, generation_strategy="adaptive")
    with Served(generator_of(tokenizer, model, "adaptive"), config) as served:
        yield served


def content(served, **request):
    """The text of a chat's answer."""
    answer = post(served, CHAT, **{"messages": HELLO, **request}).json()
    return answer["choices"][0]["message"]["content"]


def test_schemas(served):
    """By openai's `parse` too, with and without drafts. Guards against the grammar of another row."""
    given = {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA, "strict": True}}
    text = content(served, response_format=given)
    jsonschema.validate(json.loads(text), SCHEMA)
    assert content(served, response_format=given, drafts=False) == text
    assert content(served, structured_outputs={"json": SCHEMA}) == text
    assert content(served, response_format={"type": "json_object"}).startswith("{")
    likely = {"logprobs": True, "top_logprobs": 20, "max_tokens": 3, "response_format": given}
    assert "Infinity" not in post(served, CHAT, messages=HELLO, **likely).text  # of forbidden tokens

    parsed = served.client.chat.completions.parse(model="tiny", messages=HELLO, response_format=Trip)
    assert isinstance(parsed.choices[0].message.parsed, Trip)


def nested(depth):
    return {"properties": {"a": nested(depth - 1)}} if depth else {}


LOOP = {"$defs": {"a": {"$ref": "#/$defs/a"}}, "type": "object"}
LOOP |= {"properties": {"a": {"$ref": "#/$defs/a"}}, "required": ["a"]}
GUIDE = "response_format, structured_outputs or tools: "


@pytest.mark.parametrize(
    ("schema", "is_tool", "says"),
    [
        ({"type": "nonsense"}, False, f"{GUIDE}.*nonsense"),
        ({"const": "x" * 1_000_000}, False, f"{GUIDE}.*at most 100000"),
        ({"const": "x" * 1_000_000}, True, "tools: have more than the 6144 characters"),
        (nested(250), False, "the body: must be JSON: recursion limit"),
        ({"type": "string", "pattern": "(?=a)b"}, True, f"{GUIDE}.*look-ahead"),
        (LOOP, False, f"{GUIDE}.*matches nothing"),
    ],
)
def test_bad_schemas(served, schema, is_tool, says):
    """Guards against a status 500, a message of many lines, an empty answer, and seconds of work."""
    function = {"name": "f", "parameters": schema}
    request = {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
    if is_tool:
        request = {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    message = refused(served, CHAT, messages=HELLO, **request)
    assert re.match(says, message)
    assert (len(message.splitlines()), len(message) < 500) == (1, True)


@pytest.mark.parametrize("choice", ["required", NAMED])
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_and_its_result(served, choice, stream):
    """They go back to the model; with `auto` it may answer in words. Guards against fields of an answer that
    the server itself rejects.
    """
    request = {"model": "tiny", "messages": HELLO, "tools": [WEATHER], "tool_choice": choice}
    answer = served.client.chat.completions.create(**request, stream=stream)
    choices = [each.choices[0] for each in (answer if stream else [answer])]
    messages = [choice.delta if stream else choice.message for choice in choices]
    message, *later = [message for message in messages if message.tool_calls]
    assert bool(later) == stream  # the arguments as they grow
    for other in later:
        message.tool_calls[0].function.arguments += other.tool_calls[0].function.arguments
    message.role = "assistant"
    assert choices[-1].finish_reason == "tool_calls"
    [call] = message.tool_calls
    assert call.function.name == "weather"
    assert ("index" in call.model_dump()) == stream  # other servers reject a message that has it
    jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
    messages = [*HELLO, message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    answer = post(served, CHAT, messages=messages, tools=[WEATHER], max_tokens=8).json()["choices"][0]
    assert answer["message"]["content"]
    assert answer["finish_reason"] == "length"


def test_drafts_are_shown_beside_tools(served):
    """Guards against a stream with tools that has no drafts, or more accepted characters than text."""
    request = {"messages": HELLO, "tools": [WEATHER], "max_tokens": 60, "stream_drafts": True, "stream": True}
    parts = [choice for chunk in chunks(post(served, CHAT, **request)) for choice in chunk["choices"]][1:]
    assert any(part["draft"]["pending"] for part in parts)
    assert any(part["draft"]["accepted"] for part in parts)
    assert all(part["draft"]["accepted"] <= len(part["delta"].get("content", "")) for part in parts)


def test_tools_that_cannot_be_called(served, monkeypatch):
    """Guards against a choice, or tools, that are ignored without a word."""
    other = {"type": "function", "function": {"name": "other"}}
    assert "names no tool" in refused(served, CHAT, messages=HELLO, tools=[WEATHER], tool_choice=other)
    monkeypatch.setattr(served.generator.tokenizer, "chat_template", "{{ messages[0].content }}")
    assert "knows no tools" in refused(served, CHAT, messages=HELLO, tools=[WEATHER])


def test_a_prediction(served):
    """Guards against a prediction that is not drafted, or changes the answer."""
    text = content(served, max_tokens=60)
    prediction = {"type": "content", "content": text}
    answer = post(served, CHAT, messages=HELLO, max_tokens=60, prediction=prediction).json()
    assert answer["choices"][0]["message"]["content"] == text
    details = answer["usage"]["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] > max(3, details["rejected_prediction_tokens"])


def test_a_prediction_is_tokenized_once(served, monkeypatch):
    """Guards against minutes and gigabytes for each choice of one that is longer than the context."""
    encoded = watch(monkeypatch, served.generator.tokenizer, "encode")
    prediction = {"type": "content", "content": "x = 1\n" * 100_000}
    post(served, CHAT, messages=HELLO, max_tokens=2, prediction=prediction, n=3)
    lengths = [len(text) for (text,), _ in encoded if text.startswith("x = 1")]
    assert lengths == [20 * served.generator.model.config.max_position_embeddings]


def test_grammars_wait_in_turn(text_model, byte_tokenizer, monkeypatch):
    """Guards against compilers that take all threads of the server, also for clients that are gone, a job of
    one that left while the grammar was compiled, more requests that wait than --max_waiting allows, and a
    server that refuses all grammars after a few.
    """
    go_on = threading.Event()
    began = []
    watch(monkeypatch, grammar, "_matcher", lambda *args: began.append(args) or go_on.wait())
    given = {"prompt": "x", "max_tokens": 2, "structured_outputs": {"json": {}}}
    with Served(tiny_generator(text_model, byte_tokenizer), batch_size=1, max_waiting=9) as served:
        submitted = watch(monkeypatch, served.engine, "submit")
        with contextlib.ExitStack() as gone:
            try:
                for _ in range(12):  # two are compiled
                    gone.enter_context(raw_request(served.url, given))
                until(lambda: len(began) == 2)
                until(lambda: post(served, **given).status_code == 429)
                assert post(served, prompt="x", max_tokens=2).status_code == 200
                gone.close()
                until(lambda: 'status="499"} 12.0' in requests.get(f"{served.url}/metrics").text)
            finally:
                go_on.set()
        assert post(served, **given).status_code == 200
    assert len(began) < 5
    *left, _ = [job for ((job,),), _ in submitted if job.request.grammar]
    assert all(job.is_cancelled.is_set() for job in left)


def test_two_grammars_are_tried_at_once(text_model, byte_tokenizer, monkeypatch):
    """Guards against one slow grammar that all guided requests wait for."""
    together = threading.Barrier(2, timeout=60)
    problems = []

    def check(_, definition):
        problems.append(definition)
        together.wait()

    monkeypatch.setattr(GrammarSandbox, "check", check)
    with Served(tiny_generator(text_model, byte_tokenizer)) as served, ThreadPoolExecutor(2) as clients:
        given = [{"prompt": "x", "max_tokens": 2, "structured_outputs": {"choice": [word]}} for word in "ab"]
        answers = clients.map(lambda request: post(served, **request).status_code, given)
        assert [*answers] == [200, 200]
    assert len(problems) == 2


def test_a_process_for_grammars_that_is_killed(served, monkeypatch):
    """Guards against a schema that is blamed for what somebody did to the server."""
    sandbox = served.generator.sandboxes.queue[-1]
    start = sandbox._start
    monkeypatch.setattr(sandbox, "_start", lambda: (process := start(), process.kill(), process.wait())[0])
    answer = post(served, prompt="x", structured_outputs={"regex": "never compiled"})
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
