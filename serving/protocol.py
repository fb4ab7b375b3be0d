"""OpenAI's protocol: what requests may contain, and the JSON of answers and errors.

A field that the server cannot honour is an error that names it. Knows nothing of HTTP or the model.
"""

from __future__ import annotations

import reprlib
import time
import uuid
from abc import ABC, abstractmethod
from dataclasses import fields, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Json,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)
from transformers import PreTrainedTokenizerBase

from self_speculation import GenerationConfig
from self_speculation.decoding.grammar import Grammar
from serving.streaming import Delta, Token, TokenLogprob
from serving.tools import call_grammar, find_calls, known_format

# Fields that the server cannot honour -> values that ask for nothing. Null always asks for nothing.
_NEUTRAL: dict[str, list[Any]] = {
    "annotations": [[]], "best_of": [1], "chat_template_kwargs": [{}], "function_call": ["none", "auto"],
    "functions": [[]], "ignore_eos": [False], "include_obfuscation": [False], "modalities": [["text"]],
    "parallel_tool_calls": [True, False], "reasoning_content": [""], "suffix": [""], "tool_calls": [[]],
    "tool_choice": ["none", "auto"], "tools": [[]],
}  # fmt: skip
# Fields that do not change the text of an answer.
_IGNORED = {
    "cache_control", "index", "metadata", "name", "prompt_cache_key", "reasoning_effort", "safety_identifier",
    "service_tier", "store", "strict", "user", "verbosity",
}  # fmt: skip
_FINISH_REASONS = {"eos": "stop", "stop_word": "stop", "max_steps": "length", "context": "length"}
# Fields that have no effect unless another one is true.
_NEEDED = {"stream_options": "stream", "stream_drafts": "stream", "top_logprobs": "logprobs"}
# Limits besides --max_body, because each item takes time to validate. With fail_fast, a list stops at its
# first fault.
_MAX_ITEMS = 2048  # messages of a chat, parts of a message, prompts
_MAX_FIELDS = 100  # of an object


class APIError(Exception):
    """An error as a client sees it; `param` is the field at fault."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def validation_error(error: ValidationError) -> APIError:
    """Turn pydantic's first error into an API error."""
    first = error.errors(include_url=False)[0]
    param = ".".join(map(str, first["loc"]))[:100]
    value = "" if first["type"] in ("missing", "json_invalid") else f" {reprlib.repr(first['input']):.60}"
    message = f"{param or 'the body'}{value}: {first['msg'].removeprefix('Value error, ')}"
    if first["type"] == "extra_forbidden":
        message = f"{param}: this server cannot honour this field, leave it out"
    return APIError(message, param=param or None)


class _Strict(BaseModel, extra="forbid", strict=True, allow_inf_nan=False):
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


class _StreamOptions(_Strict):
    include_usage: bool = False


class _TextPart(_Strict):
    type: Literal["text"]
    text: str


_parts = TypeAdapter(Annotated[list[_TextPart], Field(max_length=_MAX_ITEMS, fail_fast=True)])


def _joined(given: Any, *, between: str = "\n") -> str:
    if isinstance(given, str):
        return given
    return between.join(part.text for part in _parts.validate_python(given))


_Text = Annotated[str, BeforeValidator(_joined, json_schema_input_type=str | list[_TextPart])]
_Verbatim = Annotated[
    str, BeforeValidator(partial(_joined, between=""), json_schema_input_type=str | list[_TextPart])
]  # parts of one text


class _Called(_Strict):
    name: str
    # Some clients send no text for a function without parameters.
    arguments: Annotated[Json[Any], BeforeValidator(lambda given: "{}" if given == "" else given)]


class _ToolCall(_Strict):
    id: str | None = None
    type: Literal["function"] = "function"
    function: _Called


class _Function(_Strict):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class _Tool(_Strict):
    type: Literal["function"]
    function: _Function


class _JSONSchema(_Strict):
    json_schema: dict[str, Any] = Field(alias="schema")
    description: str | None = None


class _ResponseFormat(_Strict):
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: _JSONSchema | None = None
    # Of json_object, as in llama.cpp.
    object_schema: dict[str, Any] | None = Field(default=None, alias="schema")

    @model_validator(mode="after")
    def _check_schema(self) -> _ResponseFormat:
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


class _Prediction(_Strict):
    type: Literal["content"]
    content: _Verbatim


class _Message(_Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: _Text
    tool_calls: list[_ToolCall] = Field([], max_length=_MAX_ITEMS)
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _allow_no_content(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("role") == "assistant" and given.get("content") is None:
            return {**given, "content": ""}
        return given

    @property
    def for_template(self) -> dict[str, Any]:
        role = "system" if self.role == "developer" else self.role
        without = set() if self.tool_calls else {"tool_calls"}
        return {**self.model_dump(exclude=without, exclude_none=True), "role": role}


def _as_list(given: Any) -> Any:
    return [given] if isinstance(given, str) else given


_Id = Annotated[int, Field(ge=0, strict=False)]  # a string, since it is a key
_Words = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    Field(max_length=16),
    BeforeValidator(_as_list, json_schema_input_type=str | list[str]),
]


class BaseRequest(_Strict, ABC):
    """The fields that both kinds of requests share. `drafts` and `stream_drafts` are this server's own."""

    object_name: ClassVar[str]
    chunk_name: ClassVar[str]

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[_Id, Annotated[float, Field(ge=-100, le=100)]] = Field({}, max_length=1024)
    response_format: _ResponseFormat = _ResponseFormat()
    prediction: _Prediction | None = None
    stop: _Words | None = None
    seed: int | None = None
    n: int = Field(1, ge=1, le=128)
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    drafts: bool = True
    stream_drafts: bool = False

    @field_validator(*_NEEDED, check_fields=False)
    @classmethod
    def _check_needed(cls, given: Any, info: ValidationInfo) -> Any:
        needed = _NEEDED[str(info.field_name)]
        if given not in (0, _StreamOptions()) and not info.data.get(needed):
            raise ValueError(f"is for {needed} true")
        return given

    @property
    def max_new_tokens(self) -> int | None:
        return min(filter(None, (self.max_tokens, self.max_completion_tokens)), default=None)

    def generation_config(self, default: GenerationConfig) -> GenerationConfig:
        """Replace what the request sets."""
        given = {
            **self.model_dump(include={field.name for field in fields(default)}),
            "max_steps": self.max_new_tokens,
            "sample": None if self.temperature is None else self.temperature > 0,
            "top_k": None if self.top_k is None else max(0, self.top_k),
            "stop_words": self.stop,
        }
        config = replace(default, **{name: value for name, value in given.items() if value is not None})
        return config if self.drafts else replace(config, generation_strategy="autoregressive", exit_layer=-1)

    def grammar(self, tokenizer: PreTrainedTokenizerBase) -> Grammar | None:  # noqa: ARG002
        """The language of the answer. Raises GrammarError for an invalid schema."""
        return self.response_format.grammar

    @property
    def is_buffered(self) -> bool:
        """Whether a stream gets the whole text at its end, because it may be a call."""
        return False

    @property
    @abstractmethod
    def num_top_logprobs(self) -> int | None:
        """Number of likely tokens to return at each position; None: return no log-probabilities."""

    def head(self, model: str, fingerprint: str) -> dict[str, Any]:
        """The first fields of an answer, or of each chunk of a stream."""
        name = self.chunk_name if self.stream else self.object_name
        return {
            "id": f"{name}-{uuid.uuid4().hex}",
            "object": name,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def first_choice(self, index: int, echo: str) -> dict[str, Any] | None:
        """The choice before those with new text, if any; `echo` is the text that precedes the answer."""
        return self.choice(index, Delta(echo)) if echo else None

    def choice(
        self,
        index: int,
        delta: Delta,
        logprobs: list[TokenLogprob] | None = None,
        stop_reason: str | None = None,
    ) -> dict[str, Any]:
        """A choice of a chunk if the request streams, or else a whole choice."""
        finish_reason = stop_reason and _FINISH_REASONS[stop_reason]
        choice = {
            "index": index,
            "logprobs": None if logprobs is None else self._logprobs(logprobs),
            "finish_reason": finish_reason,
            **self._content(delta.text, finish_reason),
        }
        if self.stream_drafts:
            choice["draft"] = {"accepted": delta.accepted, "pending": delta.pending}
        return choice

    @abstractmethod
    def _content(self, text: str, finish_reason: str | None) -> dict[str, Any]: ...

    @abstractmethod
    def _logprobs(self, tokens: list[TokenLogprob]) -> dict[str, Any]: ...


class ChatRequest(BaseRequest):
    """A request for the next turn of a conversation."""

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    messages: list[_Message] = Field(min_length=1, max_length=_MAX_ITEMS, fail_fast=True)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    tools: list[_Tool] = Field([], max_length=128)
    tool_choice: Literal["none", "auto", "required"] | _Tool = "auto"

    @property
    def num_top_logprobs(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    @property
    def is_buffered(self) -> bool:
        return bool(self.tools_for_template)

    @property
    def tools_for_template(self) -> list[dict[str, Any]]:
        """The tools that the model may call."""
        none = self.tool_choice == "none"
        return [] if none else [tool.model_dump(exclude_unset=True) for tool in self.tools]

    def grammar(self, tokenizer: PreTrainedTokenizerBase) -> Grammar | None:
        tools, choice = self.tools_for_template, self.tool_choice
        if tools and known_format(tokenizer.chat_template) is None:
            raise APIError("tools: the chat template of this model knows no tools", param="tools")
        if choice in ("none", "auto"):
            return super().grammar(tokenizer)
        name = choice.function.name if isinstance(choice, _Tool) else None
        if not any(name in (None, tool["function"]["name"]) for tool in tools):
            raise APIError("tool_choice: names no tool of this request", param="tool_choice")
        return call_grammar(tools, tokenizer, name)

    def first_choice(self, index: int, echo: str) -> dict[str, Any]:  # noqa: ARG002
        return {**self.choice(index, Delta("")), "delta": {"role": "assistant", "content": ""}}

    def _content(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        message, tools = dict[str, Any](content=text), self.tools_for_template
        if functions := find_calls(text, tools) if tools else []:
            calls: list[dict[str, Any]] = [
                {"id": f"call_{uuid.uuid4().hex}", "type": "function", "function": function}
                for function in functions
            ]
            if self.stream:
                calls = [{"index": index, **call} for index, call in enumerate(calls)]
            message = {"content": None, "tool_calls": calls}
            finish_reason = "tool_calls" if finish_reason == "stop" else finish_reason
        if self.stream:
            return {"delta": message, "finish_reason": finish_reason}
        message = {"role": "assistant", **message, "refusal": None}
        return {"message": message, "finish_reason": finish_reason}

    def _logprobs(self, tokens: list[TokenLogprob]) -> dict[str, Any]:
        def entry(token: Token, logprob: float) -> dict[str, Any]:
            return {"token": token.text, "logprob": logprob, "bytes": list(token.bytes)}

        content = [
            {**entry(token.token, token.logprob), "top_logprobs": [entry(*other) for other in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}


def _as_prompts(given: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    is_list = isinstance(given, list) and given and not isinstance(given[0], int)
    if is_list and len(given) > _MAX_ITEMS:
        raise ValueError(f"must be at most {_MAX_ITEMS} prompts, not {len(given)}")
    try:
        return validate(given if is_list else [given])
    except ValidationError:
        raise ValueError("must be a text, or token ids, or a list of either") from None


_Ids = Annotated[list[int], Field(min_length=1, fail_fast=True)]
_Prompts = Annotated[
    list[str | _Ids],
    Field(fail_fast=True),
    WrapValidator(_as_prompts, json_schema_input_type=str | _Ids | list[str | _Ids]),
]


class CompletionRequest(BaseRequest):
    """A request for continuations of prompts."""

    object_name = "text_completion"
    chunk_name = "text_completion"

    prompt: _Prompts
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool = False

    @property
    def num_top_logprobs(self) -> int | None:
        return self.logprobs

    def _content(self, text: str, finish_reason: str | None) -> dict[str, Any]:  # noqa: ARG002
        return {"text": text}

    def _logprobs(self, tokens: list[TokenLogprob]) -> dict[str, Any]:
        return {
            "tokens": [token.token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            # If tokens have the same text, such as parts of characters, the most likely one stays.
            "top_logprobs": [
                {other.text: logprob for other, logprob in reversed(token.top)} for token in tokens
            ],
            "text_offset": [token.offset for token in tokens],
        }
