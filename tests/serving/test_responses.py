"""The Responses API, by OpenAI's client: requests become a chat's requests, and answers become events."""

import json

import openai
import pytest
import requests
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter
from servers import CHAT, GREEDY, HELLO, Served, held, post
from test_reasoning import SCHEMA, TEXT, THOUGHT, called
from thinkers import Teller, thinking_tokenizer

from serving.protocol import ChatRequest
from serving.responses import ResponsesRequest

EVENTS = TypeAdapter(ResponseStreamEvent)
STOP = {"type": "function", "name": "stop", "description": "Stop.", "parameters": {"enum": [{}]}}
FORMAT = {"type": "json_schema", "name": "x", "schema": SCHEMA["json_schema"]["schema"]}


@pytest.fixture(scope="module")
def served(byte_tokenizer):
    tokenizer = thinking_tokenizer(byte_tokenizer)
    strategy = GREEDY.generation_strategy
    with Served(Teller(tokenizer, strategy, max_position_embeddings=1024)) as served:
        yield served


def kinds(events):
    """The types of the events, of equal ones the first."""
    found = [event.type.removeprefix("response.") for event in events]
    return [kind for kind, before in zip(found, [None, *found], strict=False) if kind != before]


def answered(served, text, /, **request):
    """The response to a request whose answer begins with a text. Its stream says the same."""
    served.generator.text = text
    request = {"model": "tiny", "input": "Hello", "max_output_tokens": 200, **request}
    create = served.client.responses.create
    whole = create(**request)
    events = list(create(**request, stream=True))
    Response.model_validate(whole.model_dump(by_alias=True))
    for number, event in enumerate(events):
        EVENTS.validate_python(event.model_dump(by_alias=True))
        assert event.sequence_number == number
    last = events[-1]
    deltas = {}
    for event in events:
        if event.type.endswith(".delta"):
            deltas[event.item_id] = deltas.get(event.item_id, "") + event.delta
    for item in last.response.output:
        shown = item.arguments if item.type == "function_call" else item.content[0].text
        assert deltas.get(item.id, "") == shown
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert done == last.response.output
    assert (events[0].type, last.type) == ("response.created", f"response.{whole.status}")
    changing = {"id": True, "created_at": True, "usage": True, "metrics": True}
    changing["output"] = {"__all__": {"id", "call_id"}}
    assert last.response.model_dump(exclude=changing) == whole.model_dump(exclude=changing)
    return whole, events


def test_text_comes_as_in_a_chat(served):
    """Whole and streamed. Guards against a second way to an answer, fields and events that the types of
    OpenAI's client do not have, and an answer that says that it is stored.
    """
    served.generator.text = "So be it.</s>"
    chat = post(served, CHAT, messages=[{"role": "system", "content": "Be brief."}, *HELLO]).json()
    whole, events = answered(
        served, "So be it.</s>", instructions="Be brief.", metadata={"a": "b"}, store=False
    )
    assert whole.output_text == chat["choices"][0]["message"]["content"] == "So be it."
    assert (whole.status, whole.store, whole.metadata) == ("completed", False, {"a": "b"})
    usage = chat["usage"]
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (
        usage["prompt_tokens"],
        usage["completion_tokens"],
    )
    assert whole.usage.input_tokens_details.cached_tokens == usage["prompt_tokens"] - 1
    assert whole.metrics["speculative_decoding"]["drafted"] >= 0
    assert kinds(events) == [
        "created", "in_progress", "output_item.added", "content_part.added", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done", "completed",
    ]  # fmt: skip
    cut, _ = answered(served, "So be it.</s>", max_output_tokens=3)
    assert (cut.status, cut.incomplete_details.reason, cut.output_text) == (
        "incomplete",
        "max_output_tokens",
        "So b",
    )
    assert cut.output[0].status == "incomplete"
    empty, _ = answered(served, "</s>")
    assert [item.type for item in empty.output] == ["message"]


def test_thinking_is_an_item_before_the_message(served):
    """Guards against thinking within the text, and one that the next request loses."""
    whole, events = answered(served, f"{TEXT}So be it.</s>", reasoning={"effort": "low", "summary": "auto"})
    reasoning, message = whole.output
    assert (reasoning.type, reasoning.content[0].text, message.content[0].text) == (
        "reasoning",
        THOUGHT,
        "So be it.",
    )
    assert whole.usage.output_tokens_details.reasoning_tokens > 5
    assert kinds(events)[4:7] == ["reasoning_text.delta", "reasoning_text.done", "content_part.done"]
    items = [item.model_dump(exclude_none=True) for item in whole.output]
    found = ResponsesRequest.model_validate({"input": [*HELLO, *items, *HELLO]}).chat.messages[1]
    assert found.for_template == {"role": "assistant", "content": "So be it.", "reasoning_content": THOUGHT}


def test_calls_are_items(served):
    """Guards against calls as text, a call that the output of the function does not find, and schemas that
    guide nothing.
    """
    fields = {"tools": [STOP], "parallel_tool_calls": True}
    whole, events = answered(served, f"{called()}\n{called()}</s>", **fields)
    assert [(item.type, item.name, item.arguments) for item in whole.output] == [
        ("function_call", "stop", "{}")
    ] * 2
    assert len({item.call_id for item in whole.output}) == 2
    assert kinds(events)[2:6] == [
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done",
        "output_item.done",
    ]  # fmt: skip
    for choice in ("required", {"type": "function", "name": "stop"}):
        forced, _ = answered(served, "So be it.", tools=[STOP], tool_choice=choice)
        assert json.loads(forced.output[0].arguments) == {}
    strict, _ = answered(served, called(arguments="[5]"), tools=[{**STOP, "strict": True}])
    assert json.loads(strict.output[0].arguments) == {}
    free, _ = answered(served, "So be it.</s>", tools=[STOP], tool_choice="none")
    assert free.output_text == "So be it."
    calls = [item.model_dump(exclude_none=True) for item in whole.output]
    outputs = [{"type": "function_call_output", "call_id": call["call_id"], "output": "5"} for call in calls]
    answered(served, "Done.</s>", input=[*HELLO, *calls, *outputs], tools=[STOP])


def test_an_answer_follows_a_schema(served):
    """By the client's `parse`, too. Guards against a format that is accepted and guides nothing."""

    class City(BaseModel):
        name: str

    whole, _ = answered(served, TEXT, text={"format": FORMAT})
    assert json.loads(whole.output_text) in SCHEMA["json_schema"]["schema"]["enum"]
    served.generator.text = '{"name":"Oslo"}'
    parsed = served.client.responses.parse(
        model="tiny", input="Hello", text_format=City, max_output_tokens=99
    )
    assert parsed.output_parsed == City(name="Oslo")
    whole, _ = answered(served, "{}</s>", text={"format": {"type": "json_object"}})
    assert json.loads(whole.output_text) == {}


def test_log_probabilities_are_those_of_a_chat(served):
    """Guards against tokens that a stream loses."""
    include = ["message.output_text.logprobs", "reasoning.encrypted_content"]
    whole, events = answered(served, "So be it.</s>", include=include, top_logprobs=2)
    chat = post(served, CHAT, messages=HELLO, logprobs=True, top_logprobs=2).json()
    expected = [token["token"] for token in chat["choices"][0]["logprobs"]["content"]]
    found = [token for event in events if event.type.endswith("text.delta") for token in event.logprobs]
    assert [token.token for token in found] == [token.token for token in whole.output[0].content[0].logprobs]
    assert [token.token for token in found] == expected
    assert {len(token.top_logprobs) for token in found} == {2}


@pytest.mark.parametrize("text", ["", "I see.\n"])
def test_log_probabilities_belong_to_messages(served, text):
    """Guards against a stream that dies where a call's tokens have log-probabilities, and a message without
    text before a call.
    """
    fields = {"tools": [STOP], "include": ["message.output_text.logprobs"], "top_logprobs": 1}
    whole, events = answered(served, f"{text}{called()}</s>", **fields)
    *messages, call = whole.output
    assert (call.type, call.name) == ("function_call", "stop")
    assert [message.content[0].text for message in messages] == [text.strip()] * bool(text)
    for message in messages:
        assert "".join(token.token for token in message.content[0].logprobs) == text.strip()
    found = [token for event in events if event.type.endswith("text.delta") for token in event.logprobs]
    assert "".join(token.token for token in found) == text.strip()


def test_a_conversation_becomes_that_of_a_chat():
    """Guards against parts of one turn in several messages, which templates refuse, and lost items."""
    call = {"type": "function_call", "call_id": "a", "name": "f", "arguments": '{"x": 1}'}
    request = {
        "instructions": "Be brief.",
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Hm"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I call."}]},
            call,
            {**call, "call_id": "b"},
            {"type": "function_call_output", "call_id": "a", "output": "1"},
            {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "2"}]},
            {"role": "assistant", "content": "3"},
            {"role": "assistant", "content": "4"},
        ],
        "max_output_tokens": 7,
        "temperature": 0.5,
        "stop": "x",
    }
    chat = ResponsesRequest.model_validate(request).chat
    function = {"name": "f", "arguments": {"x": 1}}
    calls = [{"id": id_, "type": "function", "function": function} for id_ in "ab"]
    assert [message.for_template for message in chat.messages] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "I call.", "reasoning_content": "Hm", "tool_calls": calls},
        {"role": "tool", "content": "1", "tool_call_id": "a"},
        {"role": "tool", "content": "2", "tool_call_id": "b"},
        {"role": "assistant", "content": "3"},
        {"role": "assistant", "content": "4"},
    ]
    same = {"messages": [message.model_dump() for message in chat.messages], "stop": "x", "temperature": 0.5}
    for message in same["messages"]:
        for each in message["tool_calls"]:
            each["function"]["arguments"] = json.dumps(each["function"]["arguments"])
    assert ChatRequest.model_validate({**same, "max_tokens": 7}) == chat


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"store": True}, "store", "leave it out"),
        ({"background": True}, "background", "leave it out"),
        ({"truncation": "auto"}, "truncation", "leave it out"),
        ({"n": 2}, "n", "leave it out"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "use input with all items so far"),
        ({"max_tokens": 5}, "max_tokens", "use max_output_tokens"),
        ({"response_format": {"type": "json_object"}}, "response_format", "use text with format"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "'function'"),
        ({"tools": [{"type": "function"}]}, "tools.0.name", "required"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format", "needs the field schema"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0", "must be a message, function_call"),
        ({"input": [{"role": "user"}]}, "input.0.content", "required"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input.0.content.0.type",
            "text only",
        ),
        ({"input": []}, "input", "must not be empty"),
        ({"input": "x" * 5000}, "input", "context length"),
        ({"reasoning": {"effort": "banana"}}, "reasoning.effort", "'none', "),
        ({"tool_choice": "required"}, "tool_choice", "names no tool"),
    ],
)
def test_an_error_names_the_field_of_this_api(served, fields, param, says):
    """Guards against names of a chat's fields, fields that are accepted and change nothing, and marks of
    pydantic in the place.
    """
    with pytest.raises(openai.BadRequestError) as error:
        served.client.responses.create(
            **{"model": "tiny", "input": "x", "max_output_tokens": 1, "extra_body": fields}
        )
    assert (error.value.param, says in error.value.message) == (param, True), error.value.message


def test_neutral_fields_and_unknown_ones_pass(served):
    """Guards against refusals of what clients send by default."""
    neutral = {"truncation": "disabled", "background": False, "service_tier": "auto", "prompt_cache_key": "x"}
    body = {"input": "x", "max_output_tokens": 1, **neutral, "previous_response_id": None, "verbosity": None}
    assert requests.post(f"{served.url}/responses", json=body, timeout=60).status_code == 200


def test_an_error_ends_a_stream(served):
    """Guards against a stream that just stops, and an event that the client does not take for an error."""
    served.generator.text = "So be it, and so on."
    with held(served.engine, num_steps=4):
        stream = served.client.responses.create(model="tiny", input="x", stream=True, max_output_tokens=500)
        next(iter(stream))
        for job in served.engine.in_flight:
            job.timeout = 0
    with pytest.raises(openai.APIError, match="no answer after"):
        list(stream)
