"""OpenAI's Responses API by way of a chat: a request becomes a chat's request, and a chat's choice becomes
the items of a response. The server stores nothing between requests.
"""

from __future__ import annotations

import copy
import itertools
import json
import time
import uuid
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from arguments import JSONObject
from serving import fields
from serving.protocol import ChatRequest, SharedFields, server_sent

_LOGPROBS = "message.output_text.logprobs"  # a value of `include`
_ID_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
# The first state of an item with text, and the only part.
_TEXT_ITEMS: dict[str, tuple[JSONObject, JSONObject]] = {
    "message": (
        {"role": "assistant", "content": []},
        {"type": "output_text", "text": "", "annotations": [], "logprobs": []},
    ),
    "reasoning": ({"summary": [], "content": []}, {"type": "reasoning_text", "text": ""}),
}
# Fields of a request that the response repeats.
_REPEATED = {
    "instructions", "max_output_tokens", "metadata", "parallel_tool_calls", "reasoning", "temperature",
    "text", "tool_choice", "tools", "top_logprobs", "top_p",
}  # fmt: skip


# Each field below has `for_chat`: the field of a chat that means the same.


class _Item(fields.Fields):
    """An item of the Responses API's input. An item of an earlier answer has an id and a status."""

    id: object = None
    status: object = None


class InputMessage(_Item):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: fields.Text

    @property
    def for_chat(self) -> JSONObject:
        """Fields of a chat's message."""
        return {"role": self.role, "content": self.content}


class FunctionCall(_Item, fields.Called):
    type: Literal["function_call"]
    call_id: str

    @property
    def for_chat(self) -> JSONObject:
        """See `InputMessage`."""
        function = fields.Called.model_construct(name=self.name, arguments=self.arguments)
        return {
            "role": "assistant",
            "tool_calls": [fields.ToolCall.model_construct(id=self.call_id, function=function)],
        }


class FunctionOutput(_Item):
    type: Literal["function_call_output"]
    call_id: str
    output: fields.Text

    @property
    def for_chat(self) -> JSONObject:
        """See `InputMessage`."""
        return {"role": "tool", "content": self.output, "tool_call_id": self.call_id}


class ReasoningItem(_Item):
    type: Literal["reasoning"]
    content: fields.Text = ""
    summary: fields.Text = ""  # OpenAI's servers send this one
    encrypted_content: object = None

    @property
    def for_chat(self) -> JSONObject:
        """See `InputMessage`."""
        return {"role": "assistant", "reasoning_content": self.content or self.summary}


def _item_kind(given: object) -> str | None:
    return f"[{given.get('type') or 'message'}]" if isinstance(given, dict) else None


def _as_items(given: object) -> object:
    if not isinstance(given, str | list):
        raise ValueError("must be a text or a list of items")
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


# An error leaves out tags in brackets.
_AnyItem = Annotated[
    Annotated[InputMessage, Tag("[message]")]
    | Annotated[FunctionCall, Tag("[function_call]")]
    | Annotated[FunctionOutput, Tag("[function_call_output]")]
    | Annotated[ReasoningItem, Tag("[reasoning]")],
    Discriminator(
        _item_kind,
        custom_error_type="item",
        custom_error_message="must be a message, function_call, function_call_output or reasoning",
    ),
]
Items = Annotated[
    list[_AnyItem],
    Field(min_length=1, max_length=fields.MAX_ITEMS, fail_fast=True),
    BeforeValidator(_as_items),
]


class NamedFunction(fields.Fields):
    """The choice of a tool in the Responses API."""

    type: Literal["function"]
    name: str

    @property
    def for_chat(self) -> fields.Tool:
        """The tool of a chat."""
        given = self.model_dump(exclude_unset=True, exclude={"type"})
        return fields.Tool.model_construct(function=fields.Function.model_construct(**given))


class FunctionTool(fields.Function, NamedFunction):
    """A tool of the Responses API. Validation begins with the type: a tool of another type has no name."""


class TextFormat(fields.Fields):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    json_schema: JSONObject | None = Field(default=None, alias="schema")
    strict: bool | None = None  # an answer follows the schema in any case

    @model_validator(mode="after")
    def _check_schema(self) -> TextFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("the type json_schema needs the field schema, other types have none")
        return self

    @property
    def for_chat(self) -> fields.ResponseFormat:
        """The response format of a chat."""
        schema = self.json_schema and fields.JSONSchema.model_construct(json_schema=self.json_schema)
        return fields.ResponseFormat.model_construct(type=self.type, json_schema=schema)


class TextConfig(fields.Fields):
    format: TextFormat = TextFormat()


class Reasoning(fields.Fields):
    effort: fields.Effort | None = None


class ResponsesRequest(SharedFields):
    """A request for a response."""

    refused = fields.REFUSED_IN_RESPONSES
    prompt_field: ClassVar[str] = "input"

    input: Items
    instructions: str | None = None
    max_output_tokens: fields.Limit = None
    tools: list[FunctionTool] = Field([], max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedFunction = "auto"
    parallel_tool_calls: bool = True
    text: TextConfig = TextConfig()
    reasoning: Reasoning = Reasoning()
    chat_template_kwargs: fields.TemplateKwargs = Field({})
    include: list[str] = Field([], max_length=fields.MAX_ITEMS)
    top_logprobs: int = Field(0, ge=0, le=20)
    metadata: JSONObject = Field({})

    @property
    def chat(self) -> ChatRequest:
        """The request of a chat that asks for the same."""
        choice = self.tool_choice
        return ChatRequest.model_construct(
            **{name: getattr(self, name) for name in SharedFields.model_fields},
            messages=self._messages(),
            max_tokens=self.max_output_tokens,
            tools=[tool.for_chat for tool in self.tools],
            tool_choice=choice if isinstance(choice, str) else choice.for_chat,
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=self.text.format.for_chat,
            reasoning_effort=self.reasoning.effort,
            chat_template_kwargs=self.chat_template_kwargs,
            logprobs=_LOGPROBS in self.include or self.top_logprobs > 0,
            top_logprobs=self.top_logprobs,
        )

    def _messages(self) -> list[fields.Message]:
        """Return a chat's messages. Reasoning, text and calls of one turn become one message."""
        messages = list[JSONObject]()
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        for item in self.input:
            message = item.for_chat
            last = messages[-1] if messages else {}
            is_after_reasoning = "content" in message and last.keys() == {"role", "reasoning_content"}
            is_same_turn = "tool_calls" in message or is_after_reasoning
            if message["role"] == last.get("role") == "assistant" and is_same_turn:
                calls = [*last.get("tool_calls", []), *message.get("tool_calls", [])]
                messages[-1] = {**last, **message, "tool_calls": calls}
            else:
                messages.append(message)
        return [fields.Message.model_construct(**message) for message in messages]

    def writer(self, model: str) -> ResponseWriter:
        """Return the object that writes the answer."""
        response = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "model": model,
            "output": [],
            "usage": None,
            "error": None,
            "incomplete_details": None,
            "background": False,
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
            **self.model_dump(include=_REPEATED, by_alias=True),
        }
        return ResponseWriter(response, self.stream)


class ResponseWriter:
    """Writes a chat's choice as events of a response, or as the response at the end."""

    def __init__(self, response: JSONObject, stream: bool) -> None:
        self._response = response
        self._stream = stream
        self._output: list[JSONObject] = response["output"]  # only the last item is unfinished
        self._numbers = itertools.count()
        self._events = list[str]()  # not taken yet
        self._is_begun = False
        self._is_cut = False

    def add(self, choice: JSONObject) -> str:
        """Add new text of the choice, or the complete choice."""
        if not self._is_begun:
            self._is_begun = True
            self._event("response.created", response=self._response)
            self._event("response.in_progress", response=self._response)
        message = choice["delta"] if "delta" in choice else choice["message"]
        logprobs = choice["logprobs"]["content"] if choice["logprobs"] else []
        if text := message.get("reasoning_content"):
            self._add_text("reasoning", text, [])
        if (text := message.get("content")) or logprobs:
            self._add_text("message", text or "", logprobs)
        for call in message.get("tool_calls", ()):
            self._add_call(call)
        self._is_cut = choice["finish_reason"] == "length"
        return self._take()

    def end(self, figures: JSONObject) -> str:
        """End the answer, with `usage` and `metrics`."""
        if not self._output:
            self._add_text("message", "", [])
        status = "incomplete" if self._is_cut else "completed"
        self._end_item(status)
        details = {"reason": "max_output_tokens"} if self._is_cut else None
        usage = _usage(figures["usage"])
        response = self._response
        response |= {"status": status, "incomplete_details": details, **figures, "usage": usage}
        self._event(f"response.{status}", response=response)
        return self._take() if self._stream else json.dumps(response)

    def _add_text(self, kind: str, text: str, logprobs: list[JSONObject]) -> None:
        """Add text to a message or to reasoning."""
        if not self._output or self._output[-1]["type"] != kind:
            item, part = _TEXT_ITEMS[kind]
            self._begin_item({"type": kind, **copy.deepcopy(item)})
            self._output[-1]["content"].append(copy.deepcopy(part))
            self._part_event("response.content_part.added", part=part)
        part = self._output[-1]["content"][0]
        part["text"] += text
        more = {}
        if kind == "message":
            part["logprobs"] += logprobs
            more = {"logprobs": logprobs}
        if text or logprobs:
            self._part_event(f"response.{part['type']}.delta", delta=text, **more)

    def _add_call(self, call: JSONObject) -> None:
        """Add a call. A call without an id is more arguments of the last call."""
        function = call["function"]
        if "id" in call:
            names = {"call_id": call["id"], "name": function["name"]}
            self._begin_item({"type": "function_call", **names, "arguments": ""})
        self._output[-1]["arguments"] += function["arguments"]
        self._item_event("response.function_call_arguments.delta", delta=function["arguments"])

    def _begin_item(self, item: JSONObject) -> None:
        self._end_item("completed")
        item_id = f"{_ID_PREFIXES[item['type']]}_{uuid.uuid4().hex}"
        self._output.append({"id": item_id, "status": "in_progress", **item})
        self._item_event("response.output_item.added", item=self._output[-1])

    def _end_item(self, status: str) -> None:
        """End the last item, if any."""
        if not self._output:
            return
        item = self._output[-1]
        item["status"] = status
        if item["type"] == "function_call":
            ended = {"name": item["name"], "arguments": item["arguments"]}
            self._item_event("response.function_call_arguments.done", **ended)
        else:
            (part,) = item["content"]
            ended = {name: part[name] for name in ("text", "logprobs") if name in part}
            self._part_event(f"response.{part['type']}.done", **ended)
            self._part_event("response.content_part.done", part=part)
        self._item_event("response.output_item.done", item=item)

    def _part_event(self, kind: str, **content: object) -> None:
        self._item_event(kind, content_index=0, **content)

    def _item_event(self, kind: str, **content: object) -> None:
        """Add an event of the last item."""
        place = {"output_index": len(self._output) - 1}
        if "item" not in content:
            place |= {"item_id": self._output[-1]["id"]}
        self._event(kind, **place, **content)

    def _event(self, kind: str, **content: object) -> None:
        if self._stream:
            event = {"type": kind, "sequence_number": next(self._numbers), **content}
            self._events.append(f"event: {kind}\n{server_sent(event)}")

    def _take(self) -> str:
        """Return the events so far, and remove them."""
        events = "".join(self._events)
        self._events.clear()
        return events


def _usage(usage: JSONObject) -> JSONObject:
    """Return a chat's `usage` by the names of a response."""
    num_prompt = usage["prompt_tokens"]
    num_cached = usage["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": num_prompt,
        "input_tokens_details": {"cached_tokens": num_cached, "cache_write_tokens": num_prompt - num_cached},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": usage["completion_tokens_details"]["reasoning_tokens"]},
        "total_tokens": usage["total_tokens"],
    }
