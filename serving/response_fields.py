"""The fields of the Responses API, each with the field of a chat that means the same."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from serving import JSONObject, fields


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
        """The same in a chat."""
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
        """The same in a chat."""
        schema = self.json_schema and fields.JSONSchema.model_construct(json_schema=self.json_schema)
        return fields.ResponseFormat.model_construct(type=self.type, json_schema=schema)


class TextConfig(fields.Fields):
    format: TextFormat = TextFormat()


class Reasoning(fields.Fields):
    effort: fields.Effort | None = None
