"""The fields of requests to OpenAI's protocol.

A field that the server does not know is ignored and named in the log, as vLLM and llama.cpp do. It is an
error if it would change the answer, or if its name looks like that of a field which the server has.
"""

from __future__ import annotations

import json
from difflib import get_close_matches
from functools import partial
from typing import Annotated, Any, Literal

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
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError, from_json

from self_speculation.config import check_template_kwargs
from self_speculation.decoding.grammar import Grammar

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

# Fields that would change the answer -> their values that ask for nothing, besides null, false, 0 and what is
# empty.
_CHANGES: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (), "audio": (), "bad_words": (), "best_of": (1,), "chat_template": (),
    "continue_final_message": (), "documents": (), "dry_multiplier": (), "dynatemp_range": (), "echo": (),
    "function_call": ("none", "auto"), "functions": (), "grammar": (), "guided_grammar": (), "images": (),
    "include_stop_str_in_output": (), "json_schema": (), "length_penalty": (1,), "lora": (), "min_tokens": (),
    "mirostat": (), "modalities": (["text"],), "prefix": (), "prompt_embeds": (),
    "return_tokens_as_token_ids": (), "structural_tag": (), "suffix": (), "tools": (), "top_a": (),
    "truncate_prompt_tokens": (-1,), "typ_p": (1,), "typical_p": (1,), "use_beam_search": (),
    "xtc_probability": (),
}  # fmt: skip
# Fields of other servers whose names look like ours.
_OTHERS = {"context", "encoder_repetition_penalty", "models", "reasoning_format", "repetition_penalty_range"}
_OTHERS |= {"temperature_last", "top_n"}
# Limits besides --max_body, because each item takes time to validate. With fail_fast, a list stops at its
# first fault.
MAX_ITEMS = 2048  # of a list
_MAX_CHAT = 4096  # messages, and their parts and calls, together
_MAX_FIELDS = 100  # of an object


class Fields(BaseModel, extra="ignore", strict=True, allow_inf_nan=False):
    """Drops fields that are null or unknown. The names of the latter join the context, which is a set."""

    model_config = ConfigDict(frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_unknown(cls, given: Any, info: ValidationInfo) -> Any:
        if not isinstance(given, dict):
            return given
        given = {name: value for name, value in given.items() if value is not None}
        known = {field.alias or name for name, field in cls.model_fields.items()}
        ignored: set[str] = set() if info.context is None else info.context
        unknown = given.keys() - known - ignored
        if len(unknown) + len(ignored) > _MAX_FIELDS:  # each is compared with the known ones
            raise ValueError(f"must have at most {_MAX_FIELDS} unknown fields together")
        for name in unknown:
            if why := _why_refused(name, given[name], known):
                error = PydanticCustomError("unknown_field", "{why}", {"why": why})
                details = InitErrorDetails(type=error, loc=(name,), input=given[name])
                raise ValidationError.from_exception_data(cls.__name__, [details])
        ignored.update(unknown - _CHANGES.keys())
        return given


def _why_refused(name: str, value: Any, known: set[str]) -> str | None:
    if name in _CHANGES:
        neutral = _CHANGES[name]
        allowed = f", only {' or '.join(map(json.dumps, neutral))}" if neutral else ", leave it out"
        return f"this server cannot honour this field{allowed}" if value and value not in neutral else None
    near = None if name in _OTHERS else get_close_matches(name[:50], known, 1, cutoff=0.8)
    return f"there is no such field, did you mean {near[0]}?" if near else None


def _as_limit(given: Any) -> Any:
    if given == -1:
        return None
    return int(given) if isinstance(given, float) and given.is_integer() else given


def _as_list(given: Any) -> Any:
    return [given] if isinstance(given, str) else given


Limit = Annotated[int | None, Field(ge=1), BeforeValidator(_as_limit)]
Penalty = Annotated[float | None, Field(ge=0.01, le=100)]
_Id = Annotated[str, Field(pattern="^[0-9]{1,9}$"), AfterValidator(int)]  # a key
LogitBias = Annotated[dict[_Id, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)]
Words = Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=128), BeforeValidator(_as_list)]


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


_Text = Annotated[str, BeforeValidator(_joined)]
_Verbatim = Annotated[str, BeforeValidator(partial(_joined, between=""))]  # parts of one text


class Prediction(Fields):
    type: Literal["content"]
    content: _Verbatim


class ThinkingSwitch(Fields):
    type: Literal["enabled", "disabled"]


class Reasoning(Fields):
    effort: Effort | None = None
    exclude: bool = False


class _Called(Fields):
    name: str
    # Some clients send no text for a function without parameters.
    arguments: Annotated[Json[Any], BeforeValidator(lambda given: "{}" if given == "" else given)]


class _ToolCall(Fields):
    id: str | None = None
    type: Literal["function"] = "function"
    function: _Called


# A text of thinking. Some servers have other things under these names.
_Thought = Annotated[str, BeforeValidator(lambda given: given if isinstance(given, str) else "")]


class Message(Fields):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: _Text = ""
    tool_calls: list[_ToolCall] = []
    tool_call_id: str | None = None
    reasoning_content: _Thought = ""
    reasoning: _Thought = ""

    @property
    def for_template(self) -> dict[str, Any]:
        """The template decides whether the model sees earlier thinking."""
        role = "system" if self.role == "developer" else self.role
        own = {"role": role, "reasoning_content": self.reasoning_content or self.reasoning}
        message = {**self.model_dump(exclude={"reasoning"}, exclude_none=True), **own}
        return {name: value for name, value in message.items() if value or name == "content"}


def _check_size(given: Any) -> Any:
    if isinstance(given, list):
        fields = [each[name] for each in given if isinstance(each, dict) for name in _LISTS & each.keys()]
        number = len(given) + sum(len(field) for field in fields if isinstance(field, list))
        if number > _MAX_CHAT:
            raise ValueError(f"must be at most {_MAX_CHAT} messages, parts and calls together, not {number}")
    return given


_LISTS = {"content", "tool_calls"}
Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True), BeforeValidator(_check_size)]


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
ToolChoice = Annotated[_Choice | Tool, PlainValidator(_as_tool_choice)]


_OBJECT = {"type": "object"}


class _JSONSchema(Fields):
    json_schema: dict[str, Any] = Field(alias="schema")
    name: Any = None  # for people
    description: Any = None
    strict: Any = None  # the schema is followed in any case


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
    def grammar(self) -> Grammar:
        given = self.json_schema.json_schema if self.json_schema else self.object_schema
        return Grammar.json_schema(_OBJECT if given is None else given)


def _as_object(given: Any) -> Any:
    return from_json(given) if isinstance(given, str) else given


TemplateKwargs = Annotated[
    dict[str, Any], Field(max_length=_MAX_FIELDS), AfterValidator(check_template_kwargs)
]

Schema = Annotated[dict[str, Any], BeforeValidator(_as_object)]
Texts = Annotated[list[str], Field(max_length=MAX_ITEMS)]


class StructuredOutputs(Fields):
    """Of vLLM, one of its fields at a time."""

    json_schema: Schema | None = Field(default=None, alias="json")
    json_object: bool = False
    regex: str | None = None
    choice: Texts = []

    @model_validator(mode="after")
    def _check_number(self) -> StructuredOutputs:
        given = (self.json_schema is not None, self.json_object, self.regex is not None, bool(self.choice))
        if sum(given) > 1:
            raise ValueError("must have one of json, json_object, regex and choice")
        return self

    @property
    def grammar(self) -> Grammar:
        if self.choice:
            return Grammar.lark(f"start: {' | '.join(map(json.dumps, self.choice))}")
        if self.regex is not None:
            return Grammar.regex(self.regex)
        return Grammar.json_schema(_OBJECT if self.json_schema is None else self.json_schema)


def _as_prompts(given: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    is_list = isinstance(given, list) and given and not isinstance(given[0], int)
    if is_list and len(given) > MAX_ITEMS:
        raise ValueError(f"must be at most {MAX_ITEMS} prompts, not {len(given)}")
    try:
        return validate(given if is_list else [given])
    except ValidationError:
        raise ValueError("must be a text, or token ids, or a list of either") from None


_Ids = Annotated[list[int], Field(min_length=1, fail_fast=True)]
Prompts = Annotated[list[str | _Ids], Field(fail_fast=True), WrapValidator(_as_prompts)]
