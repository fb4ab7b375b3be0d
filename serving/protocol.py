"""OpenAI's protocol: requests, and the JSON of answers. Knows nothing of HTTP or the model."""

from __future__ import annotations

import dataclasses
import json
import time
import uuid
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Annotated, ClassVar

from pydantic import Field, model_validator
from transformers import PreTrainedTokenizerBase

from arguments import JSONObject
from self_speculation.config import GenerationConfig
from self_speculation.text.grammar import Grammar, GrammarError
from serving import fields
from serving.errors import APIError
from serving.streaming import Delta, TokenLogprob
from serving.tools import CallReader, call_grammar

FINISH_REASONS = {"eos": "stop", "stop_word": "stop", "max_steps": "length", "context": "length"}
# Fields of a chat that `TokenizeRequest` has, too.
_CHAT_FIELDS = (
    "messages",
    "tools",
    "chat_template_kwargs",
    "add_generation_prompt",
    "continue_final_message",
)
_REASONING = ("reasoning_content", "reasoning")  # DeepSeek's name, and vLLM's


class SharedFields(fields.Fields):
    """The fields that all kinds of requests share. Only this server has `drafts` and `stream_drafts`."""

    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=2)  # as in OpenAI's
    top_k: int | None = Field(None, ge=-1)  # -1: off, as in vLLM
    top_p: float | None = Field(None, ge=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: fields.Penalty = None
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: fields.LogitBias = Field({})
    structured_outputs: fields.StructuredOutputs = fields.StructuredOutputs()
    prediction: fields.Prediction | None = None
    stop: fields.Words | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = Field([], max_length=fields.MAX_ITEMS)
    ignore_eos: bool = False
    seed: int | None = None
    stream: bool = False
    drafts: bool = True


class BaseRequest(SharedFields, ABC):
    """A request for choices."""

    object_name: ClassVar[str]
    chunk_name: ClassVar[str]
    id_prefix: ClassVar[str]
    prompt_field: ClassVar[str]

    max_tokens: fields.Limit = None
    max_completion_tokens: fields.Limit = None
    response_format: fields.ResponseFormat = fields.ResponseFormat()
    n: int = Field(1, ge=1)
    stream_options: fields.StreamOptions = fields.StreamOptions()
    stream_drafts: bool = False

    @property
    def max_new_tokens(self) -> int | None:
        """The lower one of the request's limits. None: the server's default."""
        return min(filter(None, (self.max_tokens, self.max_completion_tokens)), default=None)

    def generation_config(self, default: GenerationConfig) -> GenerationConfig:
        """Return the server's configuration with the fields of the request."""
        given: JSONObject = {
            **self.model_dump(include={each.name for each in dataclasses.fields(default)}),
            "max_steps": self.max_new_tokens,
            "sample": None if self.temperature is None else self.temperature > 0,
            "top_k": None if self.top_k is None else max(0, self.top_k),
            "stop_words": self.stop,
            "stop_token_ids": self.stop_token_ids or None,
        }
        given = {name: value for name, value in given.items() if value is not None}
        return dataclasses.replace(default, **given)

    @property
    def rule(self) -> str | None:
        """The answer's rule in Lark. None: any text. Raises GrammarError for a schema that is too large."""
        rules = [*self.response_format.rules, *self.structured_outputs.rules]
        if len(rules) > 1:
            raise GrammarError("must be one of them, with one of json, json_object, regex and choice")
        return rules[0] if rules else None

    def grammar(self, tokenizer: PreTrainedTokenizerBase) -> Grammar | None:  # noqa: ARG002
        """Return the grammar of the output. None: any text. Raises GrammarError for an invalid schema."""
        return Grammar.lark(f"start: {rule}") if (rule := self.rule) else None

    def writer(self, model: str) -> ChoicesWriter:
        """Return the object that writes the answer."""
        head = {
            "id": f"{self.id_prefix}-{uuid.uuid4().hex}",
            "object": self.chunk_name if self.stream else self.object_name,
            "created": int(time.time()),
            "model": model,
        }
        return ChoicesWriter(self, head)

    def choice(
        self,
        index: int,
        delta: Delta,
        logprobs: list[TokenLogprob] | None = None,
        stop_reason: str | None = None,
    ) -> JSONObject:
        """Return a choice of a chunk if the request streams, or else a complete choice."""
        finish_reason = stop_reason and FINISH_REASONS[stop_reason]
        choice = {
            "index": index,
            "logprobs": None if logprobs is None else self._logprobs(logprobs),
            "finish_reason": finish_reason,
            **self._content(delta, finish_reason),
        }
        if self.stream_drafts:
            choice["draft"] = {"accepted": delta.accepted, "pending": delta.pending}
        return choice

    def call_reader(self) -> CallReader | None:
        """Return the object that finds calls in an answer. None: there are no calls."""
        return None

    @abstractmethod
    def _content(self, delta: Delta, finish_reason: str | None) -> JSONObject: ...

    @abstractmethod
    def _logprobs(self, tokens: list[TokenLogprob]) -> JSONObject: ...


class ChatRequest(BaseRequest):
    """A request for the next turn of a conversation."""

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    prompt_field = "messages"
    id_prefix = "chatcmpl"

    messages: fields.Messages
    add_generation_prompt: bool | None = None  # of vLLM; None: unless the final message is continued
    continue_final_message: bool = False  # of vLLM
    add_special_tokens: bool = False  # of vLLM; besides those of the template
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    tools: list[fields.Tool] = Field([], max_length=128)
    tool_choice: fields.ToolChoice = "auto"
    parallel_tool_calls: bool = True
    chat_template_kwargs: fields.TemplateKwargs = Field({})
    reasoning_effort: fields.Effort | None = None
    include_reasoning: bool = True  # of vLLM

    @model_validator(mode="after")
    def _check_final_message(self) -> ChatRequest:
        name = "continue_final_message"
        value = self.continue_final_message
        if value and self.add_generation_prompt:
            raise APIError.at(name, value, "not with add_generation_prompt, which begins another message")
        if value and self.messages[-1].role != "assistant":
            raise APIError.at(name, value, "the last message must be the assistant's")
        return self

    @property
    def num_top_logprobs(self) -> int | None:
        """Number of likely tokens to return at each position. None: return no log-probabilities."""
        return self.top_logprobs if self.logprobs else None

    @cached_property
    def tools_for_template(self) -> list[JSONObject]:
        """The tools that the model may call."""
        none = self.tool_choice == "none"
        return [] if none else [tool.for_template for tool in self.tools]

    @property
    def template_kwargs(self) -> JSONObject:
        """Variables of the template. An effort also turns thinking on or off, as in vLLM."""
        effort = self.reasoning_effort
        found = {"reasoning_effort": effort, "enable_thinking": effort != "none"} if effort else {}
        return {**found, **self.chat_template_kwargs}

    def grammar(self, tokenizer: PreTrainedTokenizerBase) -> Grammar | None:
        """Return the grammar of a call if there must be one, or else of a call or an answer with a schema."""
        tools = self.tools_for_template
        choice = self.tool_choice
        rule = self.rule
        if tools and "tools" not in (tokenizer.chat_template or ""):
            raise APIError("tools: the chat template of this model knows no tools", param="tools")
        if choice == "auto" and tools and (rule or any(tool.function.strict for tool in self.tools)):
            return call_grammar(tools, tokenizer, answer=rule or "", several=self.parallel_tool_calls)
        if choice in ("none", "auto"):
            return super().grammar(tokenizer)
        name = choice.function.name if isinstance(choice, fields.Tool) else None
        if not any(name in (None, tool["function"]["name"]) for tool in tools):
            raise APIError("tool_choice: names no tool of this request", param="tool_choice")
        return call_grammar(tools, tokenizer, name)

    def call_reader(self) -> CallReader | None:
        """See `BaseRequest`."""
        tools = self.tools_for_template
        return CallReader(tools, self.parallel_tool_calls) if tools else None

    def _content(self, delta: Delta, finish_reason: str | None) -> JSONObject:
        has_reasoning = delta.thinking and self.include_reasoning
        reasoning = dict.fromkeys(_REASONING, delta.thinking) if has_reasoning else {}
        message = JSONObject(content=delta.text)
        if delta.calls:
            without = () if self.stream else ("index",)  # other servers reject a message that has it
            calls = [{name: call[name] for name in call if name not in without} for call in delta.calls]
            message = {"content": delta.text or None, "tool_calls": calls}
        if delta.has_calls and finish_reason == "stop":
            finish_reason = "tool_calls"
        if not self.stream:
            message = {"role": "assistant", **message, **reasoning, "refusal": None}
        elif delta.thinking:
            message = reasoning
        return {"delta" if self.stream else "message": message, "finish_reason": finish_reason}

    def _logprobs(self, tokens: list[TokenLogprob]) -> JSONObject:
        content = [{**token.chosen, "top_logprobs": token.top} for token in tokens]
        return {"content": content, "refusal": None}


class CompletionRequest(BaseRequest):
    """A request for continuations of prompts."""

    object_name = "text_completion"
    chunk_name = "text_completion"
    prompt_field = "prompt"
    id_prefix = "cmpl"

    prompt: fields.Prompts
    add_special_tokens: bool = True  # of vLLM; to a text
    logprobs: int | None = Field(None, ge=0, le=5)

    @property
    def num_top_logprobs(self) -> int | None:
        """See `ChatRequest`."""
        return self.logprobs

    def _content(self, delta: Delta, finish_reason: str | None) -> JSONObject:  # noqa: ARG002
        return {"text": delta.text}

    def _logprobs(self, tokens: list[TokenLogprob]) -> JSONObject:
        return {
            "tokens": [token.chosen["token"] for token in tokens],
            "token_logprobs": [token.chosen["logprob"] for token in tokens],
            # Tokens may have the same text, such as parts of characters: the most likely one stays.
            "top_logprobs": [
                {likely["token"]: likely["logprob"] for likely in reversed(token.top)} for token in tokens
            ],
            "text_offset": [token.offset for token in tokens],
        }


class TokenizeRequest(fields.Fields):
    """A request for the token ids of a text or of a chat's prompt, as in vLLM."""

    model: str | None = None
    prompt: str | None = None
    messages: fields.Messages | None = None
    add_special_tokens: bool | None = None  # default: to a text
    return_token_strs: bool = False
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    tools: list[fields.Tool] = Field([], max_length=128)
    chat_template_kwargs: fields.TemplateKwargs = Field({})

    @model_validator(mode="after")
    def _check_prompt(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise APIError("prompt, messages: must be one of them", param="prompt")
        return self

    @property
    def chat(self) -> ChatRequest:
        """The chat of the same messages."""
        return ChatRequest(**{name: getattr(self, name) for name in _CHAT_FIELDS})


class DetokenizeRequest(fields.Fields):
    """A request for the text of token ids, as in vLLM."""

    model: str | None = None
    tokens: fields.Ids


class ChoicesWriter:
    """Writes choices as chunks of a stream, or as one JSON object at the end."""

    def __init__(self, request: BaseRequest, head: JSONObject) -> None:
        self._request = request
        self._head = head  # the first fields of the answer, or of each chunk
        self._choices = dict[int, JSONObject]()  # index -> the last choice
        self._has_usage = request.stream_options.include_usage

    def add(self, choice: JSONObject) -> str:
        """Add new text of a choice, or the complete choice."""
        request = self._request
        index = choice["index"]
        is_first = index not in self._choices
        self._choices[index] = choice
        if not request.stream:
            return ""
        chunk = self._chunk([choice])
        if is_first and isinstance(request, ChatRequest):  # the role comes before the text
            role = {"role": "assistant", "content": ""}
            chunk = self._chunk([{**request.choice(index, Delta("")), "delta": role}]) + chunk
        return chunk

    def end(self, figures: JSONObject) -> str:
        """End the answer, with `usage` and `metrics`."""
        if not self._request.stream:
            choices = [self._choices[index] for index in sorted(self._choices)]
            return json.dumps({**self._head, "choices": choices, **figures})
        return (self._chunk([], **figures) if self._has_usage else "") + "data: [DONE]\n\n"

    def _chunk(self, choices: list[JSONObject], **figures: object) -> str:
        figures = {"usage": None, **figures} if self._has_usage else {}
        return server_sent({**self._head, "choices": choices, **figures})


def server_sent(content: JSONObject) -> str:
    """Return an event of a stream."""
    return f"data: {json.dumps(content)}\n\n"
