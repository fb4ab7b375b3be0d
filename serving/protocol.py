"""The protocol of OpenAI: what requests may say, what they are refused for, how answers look.

Two requests, for a chat and for a text to go on with. What cannot be honoured is refused by its name, never
ignored. Knows nothing of HTTP or of the model.
"""

from __future__ import annotations

import json
import reprlib
import time
import uuid
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from self_speculation import GenerationConfig
from serving.feeds import Delta, Scored

# Fields that cannot be honoured, with the values that ask for nothing. Null asks for nothing everywhere.
_NEUTRAL: dict[str, list[Any]] = {
    "best_of": [1],
    "echo": [False],
    "frequency_penalty": [0],
    "function_call": ["none", "auto"],
    "functions": [[]],
    "logit_bias": [{}],
    "metadata": [{}],
    "modalities": [["text"]],
    "parallel_tool_calls": [True, False],
    "presence_penalty": [0],
    "response_format": [{"type": "text"}],
    "service_tier": ["auto", "default"],
    "store": [False],
    "suffix": [""],
    "tool_choice": ["none", "auto"],
    "tools": [[]],
}
_FINISHED = {"eos": "stop", "stop_word": "stop", "max_steps": "length", "context": "length"}
_LOWEST = -9999.0  # JSON has no infinity
# Bounds on what is checked of a request that has the size limit: messages of a chat, parts of a message and
# prompts; fields of an object. What is wrong is looked for up to the first fault (fail_fast).
_MOST = 2048
_MOST_FIELDS = 100
_short = reprlib.Repr()  # for values in messages: they may be as long as a request
_short.maxstring = 60


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeError:
        raise ValueError("must be valid Unicode") from None
    return text


_Text = Annotated[str, AfterValidator(_encodable)]  # JSON can spell halves of characters
_Ids = Annotated[list[int], Field(min_length=1, fail_fast=True)]


class APIError(Exception):
    """A request that gets no answer, and why.

    Args:
        param: the field that is at fault, if it is one.
    """

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def _refusal(error: ValidationError) -> APIError:
    """Of a request that is none, by what pydantic found first."""
    first = error.errors(include_url=False)[0]
    param = ".".join(map(str, first["loc"]))
    if first["type"] == "model_type" and not param:
        return APIError("the body must be a JSON object")
    if first["type"] == "extra_forbidden":
        is_known = first["loc"][-1] in _NEUTRAL
        message = f"{param}: {'this server cannot honour it' if is_known else 'no such field'}, leave it out"
    else:
        value = "" if first["type"] == "missing" else f" {_short.repr(first['input']):.60}"
        message = f"{param or 'the body'}{value}: {first['msg'].removeprefix('Value error, ')}"
    return APIError(message, param=param or None)


class _Strict(BaseModel):
    """Takes what it knows, and the neutral values of what it cannot honour."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        if len(given) > _MOST_FIELDS:
            raise ValueError(f"must have at most {_MOST_FIELDS} fields, not {len(given)}")
        return {k: v for k, v in given.items() if v is not None and v not in _NEUTRAL.get(k, [])}


class _StreamOptions(_Strict):
    include_usage: bool = False


class _TextPart(_Strict):
    type: Literal["text"]
    text: _Text


class _Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: list[_TextPart] = Field(max_length=_MOST, fail_fast=True)

    @field_validator("content", mode="before")
    @classmethod
    def _parts(cls, given: Any) -> Any:
        return [{"type": "text", "text": given}] if isinstance(given, str) else given

    @property
    def for_template(self) -> dict[str, str]:
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": "\n".join(part.text for part in self.content)}


class BaseRequest(_Strict, ABC):
    """What both kinds of requests may say."""

    object_name: ClassVar[str]
    chunk_name: ClassVar[str]

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    stop: list[Annotated[_Text, Field(min_length=1)]] | None = Field(None, max_length=16)
    seed: int | None = None
    n: int = Field(1, ge=1, le=128)
    user: str | None = None
    stream: bool = False
    stream_options: _StreamOptions | None = None
    drafts: bool = True
    """Of this server: False: decode without drafts."""
    stream_drafts: bool = False
    """Of this server: say with each chunk what was drafted."""

    @field_validator("stop", mode="before")
    @classmethod
    def _several(cls, given: Any) -> Any:
        return [given] if isinstance(given, str) else given

    @field_validator("stream_options", "stream_drafts")
    @classmethod
    def _for_streams(cls, given: Any, info: ValidationInfo) -> Any:
        if given and not info.data.get("stream"):
            raise ValueError("is for stream true")
        return given

    def config(self, default: GenerationConfig) -> GenerationConfig:
        """How to generate; what the request does not say is as in `default`."""
        said = {
            "max_steps": self.max_tokens,
            "temperature": self.temperature,
            "sample": None if self.temperature is None else self.temperature > 0,
            "top_p": self.top_p,
            "stop_words": self.stop,
        }
        config = replace(default, **{name: value for name, value in said.items() if value is not None})
        return config if self.drafts else replace(config, generation_strategy="autoregressive", exit_layer=-1)

    @property
    @abstractmethod
    def num_likeliest(self) -> int | None:
        """How many tokens to tell log-probabilities of, besides the answer's own; None: not even that."""

    def choice(
        self, index: int, text: str, scored: list[Scored] | None, stop_reason: str | None
    ) -> dict[str, Any]:
        """A whole answer."""
        return self._said(index, self._whole(text), scored, stop_reason)

    def part(
        self,
        index: int,
        piece: Delta,
        scored: list[Scored] | None,
        is_first: bool,
        stop_reason: str | None = None,
    ) -> dict[str, Any]:
        """What is new of one; a stop reason comes with its end."""
        part = self._said(index, self._new(piece.text, is_first), scored, stop_reason)
        if self.stream_drafts:
            part["draft"] = {"accepted": piece.accepted, "pending": piece.pending}
        return part

    def _said(
        self, index: int, text: dict[str, Any], scored: list[Scored] | None, stop_reason: str | None
    ) -> dict[str, Any]:
        logprobs = None if scored is None else self._logprobs(scored)
        finished = _FINISHED[stop_reason] if stop_reason else None
        return {"index": index, **text, "logprobs": logprobs, "finish_reason": finished}

    @abstractmethod
    def _whole(self, text: str) -> dict[str, Any]:
        """A whole answer's text, as it is called here."""

    @abstractmethod
    def _new(self, text: str, is_first: bool) -> dict[str, Any]:
        """The new text of a chunk."""

    @abstractmethod
    def _logprobs(self, scored: list[Scored]) -> dict[str, Any]:
        """Tokens with their log-probabilities."""


class ChatRequest(BaseRequest):
    """The next turn of a conversation."""

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    messages: list[_Message] = Field(min_length=1, max_length=_MOST, fail_fast=True)
    max_tokens: int | None = Field(
        None, ge=1, validation_alias=AliasChoices("max_completion_tokens", "max_tokens")
    )
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @field_validator("top_logprobs")
    @classmethod
    def _for_logprobs(cls, given: int | None, info: ValidationInfo) -> int | None:
        if not info.data.get("logprobs"):
            raise ValueError("is for logprobs true")
        return given

    @property
    def num_likeliest(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def _whole(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _new(self, text: str, is_first: bool) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": text} if is_first else {"content": text}}

    def _logprobs(self, scored: list[Scored]) -> dict[str, Any]:
        def said(text: str, logprob: float) -> dict[str, Any]:
            whole = None if "\ufffd" in text else list(text.encode())  # a part of a character has no text
            return {"token": text, "logprob": max(logprob, _LOWEST), "bytes": whole}

        content = [
            {**said(one.text, one.logprob), "top_logprobs": [said(*other) for other in one.likeliest]}
            for one in scored
        ]
        return {"content": content, "refusal": None}


class CompletionRequest(BaseRequest):
    """A text, or several, to go on with."""

    object_name = "text_completion"
    chunk_name = "text_completion"

    prompt: Annotated[
        list[_Text | Annotated[list[int], Field(min_length=1, fail_fast=True)]], Field(fail_fast=True)
    ]
    logprobs: int | None = Field(None, ge=0, le=5)

    @field_validator("prompt", mode="wrap")
    @classmethod
    def _prompts(cls, given: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        are_several = isinstance(given, list) and given and not isinstance(given[0], int)
        if are_several and len(given) > _MOST:
            raise ValueError(f"must be at most {_MOST} prompts, not {len(given)}")
        try:
            return validate(given if are_several else [given])
        except ValidationError:
            raise ValueError("must be a text, or token ids, or a list of either") from None

    @property
    def num_likeliest(self) -> int | None:
        return self.logprobs

    def _whole(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _new(self, text: str, is_first: bool) -> dict[str, Any]:  # noqa: ARG002
        return {"text": text}

    def _logprobs(self, scored: list[Scored]) -> dict[str, Any]:
        return {
            "tokens": [one.text for one in scored],
            "token_logprobs": [max(one.logprob, _LOWEST) for one in scored],
            # Of tokens that read alike, such as parts of characters, the likeliest.
            "top_logprobs": [
                {text: max(value, _LOWEST) for text, value in reversed(one.likeliest)} for one in scored
            ],
            "text_offset": [one.start for one in scored],
        }


R = TypeVar("R", bound=BaseRequest)


def read(kind: type[R], body: bytes) -> R:
    """A request of this kind.

    Raises:
        Refused: the body is none.
    """
    try:
        return kind.model_validate(json.loads(body))
    except ValidationError as error:
        raise _refusal(error) from None
    except (ValueError, RecursionError) as error:
        raise APIError(f"the body is not JSON: {error}") from None


def frame(name: str, model: str) -> dict[str, Any]:
    """What every answer begins with, and every chunk of one."""
    return {"id": f"{name}-{uuid.uuid4().hex}", "object": name, "created": int(time.time()), "model": model}
