"""OpenAI's protocol: what requests may contain, and the JSON of answers and errors.

A field that the server cannot honour is an error that names it. Knows nothing of HTTP or the model.
"""

from __future__ import annotations

import json
import reprlib
import time
import uuid
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)

from self_speculation import GenerationConfig
from self_speculation.decoding.grammar import Grammar
from serving.streaming import Delta, Token, TokenLogprob
from serving.tools import ToolCall, call_grammar, find_calls, known_format

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
    "service_tier", "store", "user", "verbosity",
}  # fmt: skip
_SAME_IN_CONFIG = {
    "temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"
}  # fmt: skip
_FINISH_REASONS = {"eos": "stop", "stop_word": "stop", "max_steps": "length", "context": "length"}
_MIN_LOGPROB = -9999.0  # JSON has no infinity
# Limits besides --max_body, because each item takes time to validate. With fail_fast, a list stops at its
# first fault.
_MAX_ITEMS = 2048  # messages of a chat, parts of a message, prompts
_MAX_FIELDS = 100  # of an object
_short = reprlib.Repr()  # of values in error messages
_short.maxstring = 60


class APIError(Exception):
    """An error as a client sees it.

    Args:
        param: the request's field that is at fault.
    """

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
    if first["type"] == "model_type" and not param:
        return APIError("the body must be a JSON object")
    if first["type"] == "extra_forbidden":
        is_known = first["loc"][-1] in _NEUTRAL
        message = f"{param}: {'this server cannot honour it' if is_known else 'no such field'}, leave it out"
    else:
        value = "" if first["type"] in ("missing", "json_invalid") else f" {_short.repr(first['input']):.60}"
        message = f"{param or 'the body'}{value}: {first['msg'].removeprefix('Value error, ')}"
    return APIError(message, param=param or None)


class _Strict(BaseModel):
    """Allows its own fields, and other fields with neutral values."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

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


def _as_parts(given: Any) -> Any:
    return [{"type": "text", "text": given}] if isinstance(given, str) else given


_Parts = Annotated[
    list[_TextPart],
    Field(max_length=_MAX_ITEMS, fail_fast=True),
    BeforeValidator(_as_parts, json_schema_input_type=str | list[_TextPart]),
]


class _Called(_Strict):
    name: str
    arguments: str  # JSON


class _ToolCall(_Strict):
    id: str = ""
    type: Literal["function"] = "function"
    function: _Called

    @property
    def for_template(self) -> dict[str, Any]:
        try:
            arguments = json.loads(self.function.arguments)
        except (ValueError, RecursionError):
            arguments = self.function.arguments
        return {"type": "function", "function": {"name": self.function.name, "arguments": arguments}}


class _Function(_Strict):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class _Tool(_Strict):
    type: Literal["function"]
    function: _Function


class _JSONSchema(_Strict):
    json_schema: dict[str, Any] = Field(alias="schema")
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class _ResponseFormat(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JSONSchema | None = None
    object_schema: dict[str, Any] | None = Field(None, alias="schema")  # of json_object, as in llama.cpp

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
    content: _Parts


class _Message(_Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: _Parts
    tool_calls: list[_ToolCall] = Field([], max_length=_MAX_ITEMS)
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _allow_no_content(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("role") == "assistant" and given.get("content") is None:
            return {**given, "content": []}
        return given

    @property
    def for_template(self) -> dict[str, Any]:
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": "\n".join(part.text for part in self.content)}
        if self.tool_calls:
            message["tool_calls"] = [call.for_template for call in self.tool_calls]
        return message


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
    logit_bias: dict[_Id, Annotated[float, Field(ge=-100, le=100)]] | None = Field(None, max_length=1024)
    response_format: _ResponseFormat | None = None
    prediction: _Prediction | None = None
    stop: _Words | None = None
    seed: int | None = None
    n: int = Field(1, ge=1, le=128)
    stream: bool = False
    stream_options: _StreamOptions | None = None
    drafts: bool = True
    stream_drafts: bool = False

    @field_validator("stream_options", "stream_drafts")
    @classmethod
    def _check_stream(cls, given: Any, info: ValidationInfo) -> Any:
        if given not in (False, _StreamOptions()) and not info.data.get("stream"):
            raise ValueError("is for stream true")
        return given

    @property
    def max_new_tokens(self) -> int | None:
        return min(filter(None, (self.max_tokens, self.max_completion_tokens)), default=None)

    def generation_config(self, default: GenerationConfig) -> GenerationConfig:
        """Replace what the request sets."""
        fields = {
            **self.model_dump(include=_SAME_IN_CONFIG),
            "max_steps": self.max_new_tokens,
            "sample": None if self.temperature is None else self.temperature > 0,
            "top_k": None if self.top_k is None else max(0, self.top_k),
            "stop_words": self.stop,
        }
        config = replace(default, **{name: value for name, value in fields.items() if value is not None})
        return config if self.drafts else replace(config, generation_strategy="autoregressive", exit_layer=-1)

    @property
    def predicted_text(self) -> str | None:
        return None if self.prediction is None else "".join(part.text for part in self.prediction.content)

    def grammar(self, chat_template: str | None) -> Grammar | None:  # noqa: ARG002
        """The language of the answer.

        Raises:
            APIError: the model cannot be asked for it.
            GrammarError: a schema is invalid.
        """
        return None if self.response_format is None else self.response_format.grammar

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

    def prompt_to_echo(self, index: int) -> str | list[int]:  # noqa: ARG002
        """The prompt that a choice repeats before its answer."""
        return ""

    def first_chunks(self, index: int, echo: str) -> list[dict[str, Any]]:
        """The chunks of a choice before those with its text.

        Args:
            echo: the text that precedes the answer, if any.
        """
        return [self.choice(index, Delta(echo), None, None)] if echo else []

    def choice(
        self, index: int, delta: Delta, logprobs: list[TokenLogprob] | None, stop_reason: str | None
    ) -> dict[str, Any]:
        """A choice of a chunk if the request streams, or else a whole choice."""
        choice = {
            "index": index,
            **self._content(delta.text),
            "logprobs": None if logprobs is None else self._logprobs(logprobs),
            "finish_reason": self._finish_reason(delta.text, stop_reason),
        }
        if self.stream_drafts:
            choice["draft"] = {"accepted": delta.accepted, "pending": delta.pending}
        return choice

    def _finish_reason(self, text: str, stop_reason: str | None) -> str | None:  # noqa: ARG002
        return _FINISH_REASONS[stop_reason] if stop_reason else None

    @abstractmethod
    def _content(self, text: str) -> dict[str, Any]:
        pass

    @abstractmethod
    def _logprobs(self, tokens: list[TokenLogprob]) -> dict[str, Any]:
        pass


class ChatRequest(BaseRequest):
    """A request for the next turn of a conversation."""

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    messages: list[_Message] = Field(min_length=1, max_length=_MAX_ITEMS, fail_fast=True)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[_Tool] = Field([], max_length=128)
    tool_choice: Literal["none", "auto", "required"] | _Tool = "auto"

    @field_validator("top_logprobs")
    @classmethod
    def _check_logprobs(cls, given: int | None, info: ValidationInfo) -> int | None:
        if given and not info.data.get("logprobs"):
            raise ValueError("is for logprobs true")
        return given

    @property
    def num_top_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def first_chunks(self, index: int, echo: str) -> list[dict[str, Any]]:  # noqa: ARG002
        chunk = self.choice(index, Delta(""), None, None)
        return [{**chunk, "delta": {"role": "assistant", "content": ""}}]

    @property
    def is_buffered(self) -> bool:
        return bool(self.tools_for_template)

    @property
    def tools_for_template(self) -> list[dict[str, Any]]:
        """The tools that the model may call."""
        none = self.tool_choice == "none"
        return [] if none else [tool.model_dump(exclude_unset=True) for tool in self.tools]

    def grammar(self, chat_template: str | None) -> Grammar | None:
        tools, choice = self.tools_for_template, self.tool_choice
        if tools and known_format(chat_template) is None:
            raise APIError("tools: the chat template of this model knows no tools", param="tools")
        if choice in ("none", "auto"):
            return super().grammar(chat_template)
        name = choice.function.name if isinstance(choice, _Tool) else None
        if not any(name in (None, tool["function"]["name"]) for tool in tools):
            raise APIError("tool_choice: names no tool of this request", param="tool_choice")
        assert chat_template is not None
        return call_grammar(tools, chat_template, name)

    def _finish_reason(self, text: str, stop_reason: str | None) -> str | None:
        reason = super()._finish_reason(text, stop_reason)
        return "tool_calls" if reason == "stop" and self._calls(text) else reason

    def _calls(self, text: str) -> list[ToolCall]:
        return find_calls(text, self.tools_for_template) if self.is_buffered and text else []

    def _content(self, text: str) -> dict[str, Any]:
        content: dict[str, Any] = {"content": text}
        if calls := self._calls(text):
            content = {"content": None, "tool_calls": [_call(call) for call in calls]}
        if self.stream:
            for index, call in enumerate(content.get("tool_calls", [])):
                call["index"] = index
            return {"delta": content}
        return {"message": {"role": "assistant", **content, "refusal": None}}

    def _logprobs(self, tokens: list[TokenLogprob]) -> dict[str, Any]:
        def entry(token: Token, logprob: float) -> dict[str, Any]:
            return {"token": token.text, "logprob": max(logprob, _MIN_LOGPROB), "bytes": list(token.bytes)}

        content = [
            {**entry(token.token, token.logprob), "top_logprobs": [entry(*other) for other in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": call._asdict()}


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

    @field_validator("echo")
    @classmethod
    def _check_echo(cls, given: bool, info: ValidationInfo) -> bool:
        if given and info.data.get("logprobs") is not None:
            raise ValueError("cannot be combined with logprobs")
        return given

    @property
    def num_top_logprobs(self) -> int | None:
        return self.logprobs

    def prompt_to_echo(self, index: int) -> str | list[int]:
        return self.prompt[index // self.n] if self.echo else ""

    def _content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _logprobs(self, tokens: list[TokenLogprob]) -> dict[str, Any]:
        return {
            "tokens": [token.token.text for token in tokens],
            "token_logprobs": [max(token.logprob, _MIN_LOGPROB) for token in tokens],
            # If tokens have the same text, such as parts of characters, the most likely one stays.
            "top_logprobs": [
                {other.text: max(value, _MIN_LOGPROB) for other, value in reversed(token.top)}
                for token in tokens
            ],
            "text_offset": [token.offset for token in tokens],
        }
