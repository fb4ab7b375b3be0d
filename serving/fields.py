"""The fields of requests to OpenAI's protocol, and which others are accepted.

A field that would change the answer and cannot be honoured is an error that names it.
"""

from __future__ import annotations

import json
from difflib import get_close_matches
from functools import partial
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Json,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import from_json

from self_speculation.config import check_template_kwargs
from self_speculation.decoding.grammar import Grammar

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

# Fields that the server cannot honour -> values that ask for nothing. Null always asks for nothing.
_NEUTRAL: dict[str, list[Any]] = {
    "add_generation_prompt": [True], "add_special_tokens": [False], "bad_words": [[]],
    "best_of": [1], "chat_template_kwargs": [{}], "continue_final_message": [False],
    "continuous_usage_stats": [False], "documents": [[]], "dry_multiplier": [0], "dynatemp_range": [0],
    "echo": [False], "exclude": [False], "extra_body": [{}], "function_call": ["none", "auto"],
    "functions": [[]], "images": [[]],
    "include_reasoning": [False, True], "include_stop_str_in_output": [False], "length_penalty": [1],
    "min_tokens": [0], "mirostat": [0], "modalities": [["text"]], "parallel_tool_calls": [True, False],
    "priority": [0], "reasoning": [{}], "reasoning_effort": [*get_args(Effort)], "return_token_ids": [False],
    "skip_special_tokens": [True, False], "spaces_between_special_tokens": [True], "suffix": [""],
    "tool_calls": [[]], "tool_choice": ["none", "auto"], "tools": [[]], "typical_p": [1],
    "use_beam_search": [False], "verbosity": ["low", "medium", "high"], "xtc_probability": [0],
}  # fmt: skip
# Fields that do not change the text of an answer; some are in answers of other servers, and clients send them
# back.
_IGNORED = {
    "annotations", "cache_control", "cache_prompt", "chat_id", "include_obfuscation", "index", "metadata",
    "name", "prompt_cache_key", "prompt_cache_retention", "provider_specific_fields", "reasoning_details",
    "refusal", "safety_identifier", "service_tier", "session_id", "store", "strict", "thinking_blocks",
    "user",
}  # fmt: skip
# Limits besides --max_body, because each item takes time to validate. With fail_fast, a list stops at its
# first fault.
MAX_ITEMS = 2048  # messages of a chat, parts of a message, prompts
_MAX_FIELDS = 100  # of an object


class Fields(BaseModel, extra="forbid", strict=True, allow_inf_nan=False):
    """Allows its own fields, and other fields with neutral values."""

    model_config = ConfigDict(frozen=True, json_schema_extra={"additionalProperties": {"type": "null"}})

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        if len(given) > _MAX_FIELDS:
            raise ValueError(f"must have at most {_MAX_FIELDS} fields, not {len(given)}")

        def asks(name: str, value: Any) -> bool:
            return name in cls.model_fields or not (name in _IGNORED or value in _NEUTRAL.get(name, []))

        return {name: value for name, value in given.items() if value is not None and asks(name, value)}


def why_forbidden(name: str, known: set[str]) -> str:
    """Why a field is an error, beside fields that are known there."""
    if name in _NEUTRAL:
        return f"this server can honour only {' or '.join(map(json.dumps, _NEUTRAL[name]))}"
    near = get_close_matches(name[:50], known, 1, cutoff=0.75)
    hint = f"did you mean {near[0]}?" if near else "leave it out"
    return f"this server cannot honour this field, {hint}"


def _no_limit(given: Any) -> Any:
    return None if given == -1 else given


def as_list(given: Any) -> Any:
    return [given] if isinstance(given, str) else given


Limit = Annotated[int | None, Field(ge=1), BeforeValidator(_no_limit, json_schema_input_type=int | None)]
Penalty = Annotated[float | None, Field(ge=0.01, le=100)]
Id = Annotated[int, Field(ge=0, strict=False)]  # a string, since it is a key
Words = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    Field(max_length=128),
    BeforeValidator(as_list, json_schema_input_type=str | list[str]),
]


class StreamOptions(Fields):
    include_usage: bool = False


class _TextPart(Fields):
    type: Literal["text"]
    text: str


_parts = TypeAdapter(Annotated[list[_TextPart], Field(max_length=MAX_ITEMS, fail_fast=True)])


def _joined(given: Any, *, between: str = "\n") -> str:
    if isinstance(given, str):
        return given
    return between.join(part.text for part in _parts.validate_python(given))


_Text = Annotated[str, BeforeValidator(_joined, json_schema_input_type=str | list[_TextPart])]
_Verbatim = Annotated[
    str, BeforeValidator(partial(_joined, between=""), json_schema_input_type=str | list[_TextPart])
]  # parts of one text


class Prediction(Fields):
    type: Literal["content"]
    content: _Verbatim


class ThinkingSwitch(Fields):
    type: Literal["enabled", "disabled"]


class Reasoning(Fields):
    effort: Effort | None = None


class _Called(Fields):
    name: str
    # Some clients send no text for a function without parameters.
    arguments: Annotated[Json[Any], BeforeValidator(lambda given: "{}" if given == "" else given)]


class _ToolCall(Fields):
    id: str | None = None
    type: Literal["function"] = "function"
    function: _Called


class Message(Fields):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: _Text = ""
    tool_calls: list[_ToolCall] = Field([], max_length=MAX_ITEMS)
    tool_call_id: str | None = None
    # Texts of thinking, by either name. Some servers have other things under these names.
    reasoning_content: Any = None
    reasoning: Any = None

    @property
    def for_template(self) -> dict[str, Any]:
        """The template decides whether the model sees earlier thinking."""
        role = "system" if self.role == "developer" else self.role
        without = {"reasoning", "reasoning_content"} | (set() if self.tool_calls else {"tool_calls"})
        message = {**self.model_dump(exclude=without, exclude_none=True), "role": role}
        for thought in (self.reasoning, self.reasoning_content):
            if thought and isinstance(thought, str):
                message["reasoning_content"] = thought
        return message


class _Function(Fields):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Fields):
    type: Literal["function"] = "function"
    function: _Function

    @property
    def for_template(self) -> dict[str, Any]:
        return {"type": self.type, "function": self.function.model_dump(exclude_unset=True)}


_Choice = Literal["none", "auto", "required"]
_choice = TypeAdapter(_Choice)


def _as_tool_choice(given: Any) -> Any:
    if isinstance(given, dict):
        return Tool.model_validate(given)
    return _choice.validate_python("required" if given == "any" else given)


# The errors of a union name its types.
ToolChoice = Annotated[
    _Choice | Tool, PlainValidator(_as_tool_choice, json_schema_input_type=_Choice | Literal["any"] | Tool)
]


class _JSONSchema(Fields):
    json_schema: dict[str, Any] = Field(alias="schema")
    description: str | None = None


class ResponseFormat(Fields):
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: _JSONSchema | None = None
    # Of json_object, as in llama.cpp.
    object_schema: dict[str, Any] | None = Field(default=None, alias="schema")

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema: belongs to the type json_schema")
        if self.object_schema is not None and self.type != "json_object":
            raise ValueError("schema: belongs to the type json_object")
        return self

    @property
    def grammar(self) -> Grammar | None:
        if self.type == "text":
            return None
        given = self.json_schema.json_schema if self.json_schema else self.object_schema
        return Grammar.json_schema({"type": "object"} if given is None else given)


def _as_object(given: Any) -> Any:
    return from_json(given) if isinstance(given, str) else given


TemplateKwargs = Annotated[dict[str, Any], AfterValidator(check_template_kwargs)]

Schema = Annotated[
    dict[str, Any], BeforeValidator(_as_object, json_schema_input_type=dict[str, Any] | Json[dict[str, Any]])
]


class StructuredOutputs(Fields):
    """Of vLLM, one of its fields at a time."""

    json_schema: Schema | None = Field(default=None, alias="json")
    json_object: bool = False
    regex: str | None = None
    choice: list[str] = Field(default=[], max_length=MAX_ITEMS)

    @model_validator(mode="after")
    def _check_number(self) -> StructuredOutputs:
        given = (self.json_schema is not None, self.json_object, self.regex is not None, bool(self.choice))
        if sum(given) > 1:
            raise ValueError("must have one of json, json_object, regex and choice")
        return self

    @property
    def grammar(self) -> Grammar | None:
        if self.choice:
            return Grammar.lark(f"start: {' | '.join(json.dumps(text) for text in self.choice)}")
        if self.regex is not None:
            return Grammar.regex(self.regex)
        if self.json_schema is None and not self.json_object:
            return None
        return Grammar.json_schema({"type": "object"} if self.json_schema is None else self.json_schema)


def _as_prompts(given: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    is_list = isinstance(given, list) and given and not isinstance(given[0], int)
    if is_list and len(given) > MAX_ITEMS:
        raise ValueError(f"must be at most {MAX_ITEMS} prompts, not {len(given)}")
    try:
        return validate(given if is_list else [given])
    except ValidationError:
        raise ValueError("must be a text, or token ids, or a list of either") from None


_Ids = Annotated[list[int], Field(min_length=1, fail_fast=True)]
Prompts = Annotated[
    list[str | _Ids],
    Field(fail_fast=True),
    WrapValidator(_as_prompts, json_schema_input_type=str | _Ids | list[str | _Ids]),
]
