"""The fields of requests: OpenAI's, and fields that vLLM adds.

The server ignores an unknown field and names it in the log, as vLLM does. An unknown field is an error if it
would change the answer, or if the name looks like the name of a known field.
"""

from __future__ import annotations

import json
from difflib import get_close_matches
from typing import Annotated, ClassVar, Literal

from llguidance import regex_to_lark
from pydantic import (
    AfterValidator,
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
)  # fmt: skip

from arguments import JSONObject
from self_speculation.config import check_template_kwargs
from self_speculation.text.grammar import MAX_CHARACTERS, json_rule
from serving.errors import APIError

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

_LIKE = 0.88  # the least likeness of a misspelt name
# Limits besides --max_body, because each item takes time to validate. With fail_fast, validation of a list
# stops at the first fault.
MAX_ITEMS = 2048  # of a list
MAX_OBJECTS = 100_000  # texts with names, lists and objects of a body
MAX_VALUES = 500_000  # of a body, such as token ids
_MAX_FIELDS = 100  # of an object

# Fields that other servers have (vLLM, llama.cpp, SGLang, TGI, Ollama) and this one refuses, because they
# would change the answer: the name, what to use instead ("": nothing), and values that ask for nothing.
# Without a value: false, 0 and empty values ask for nothing. With None, an empty object asks for something:
# as a schema it allows anything. A field that only adds to one of them, such as `mirostat_tau`, is ignored.
_Row = tuple[str, str] | tuple[str, str, object] | tuple[str, str, object, object]
_REFUSED: list[_Row] = [
    ("adapter_id", ""),
    ("adaptive_target", "temperature", -1),
    ("add_generation_prompt", "chat_template_kwargs", True),
    ("allowed_token_ids", "logit_bias"),
    ("audio", ""),
    ("bad_words", "logit_bias"),
    ("ban_eos_token", "ignore_eos and max_tokens"),
    ("best_of", "", 1),
    ("chat_template", "chat_template_kwargs"),
    ("continue_final_message", "chat_template_kwargs"),
    ("custom_logit_processor", "logit_bias"),
    ("custom_params", ""),
    ("decoder_input_details", "logprobs"),
    ("do_sample", "temperature", True),
    ("documents", "chat_template_kwargs"),
    ("dry_multiplier", "repetition_penalty"),
    ("dynatemp_range", "temperature"),
    ("ebnf", "structured_outputs with json, regex or choice"),
    ("echo", ""),
    ("enable_thinking", "chat_template_kwargs", True),
    ("epsilon_cutoff", "top_p or min_p"),
    ("eta_cutoff", "top_p or min_p"),
    ("format", "response_format with a json_schema", None),
    ("function_call", "tools and tool_choice", "none", "auto"),
    ("functions", "tools"),
    ("grammar", "structured_outputs with json, regex or choice"),
    ("guided_choice", "structured_outputs with json, regex or choice"),
    ("guided_grammar", "structured_outputs with json, regex or choice"),
    ("guided_json", "structured_outputs with json, regex or choice", None),
    ("guided_regex", "structured_outputs with json, regex or choice"),
    ("guideline", "messages"),
    ("image_data", "messages"),
    ("images", "messages"),
    ("include_stop_str_in_output", "stop"),
    ("input_ids", "/v1/completions with the ids as prompt"),
    ("json_schema", "response_format with a json_schema", None),
    ("length_penalty", "", 1),
    ("logits_processors", "logit_bias"),
    ("logprob_token_ids", "logprobs"),
    ("lora", ""),
    ("lora_path", ""),
    ("max_new_tokens", "max_tokens"),
    ("max_output_tokens", "max_tokens"),
    ("min_keep", "top_p or min_p", 0, 1),
    ("min_new_tokens", "ignore_eos and max_tokens"),
    ("min_tokens", "ignore_eos and max_tokens"),
    ("mirostat", "top_p or min_p"),
    ("modalities", "", ["text"]),
    ("n_cmpl", "n", 1),
    ("n_indent", ""),
    ("n_predict", "max_tokens"),
    ("n_probs", "logprobs"),
    ("negative_prompt", "messages"),
    ("no_repeat_ngram_size", "repetition_penalty"),
    ("no_stop_trim", "stop"),
    ("num_beams", "", 1),
    ("num_predict", "max_tokens"),
    ("options", "temperature"),
    ("parse_tool_calls", "tool_choice", True),
    ("penalize_nl", "repetition_penalty"),
    ("post_sampling_probs", "logprobs"),
    ("prefix", ""),
    ("prompt_embeds", ""),
    ("prompt_logprobs", "logprobs"),
    ("random_seed", "seed"),
    ("reasoning", "reasoning_effort"),
    ("reasoning_budget", "reasoning_effort or max_tokens", -1),
    ("reasoning_budget_tokens", "reasoning_effort or max_tokens", -1),
    ("reasoning_format", "include_reasoning", "auto", "deepseek"),
    ("regex", "structured_outputs with json, regex or choice"),
    ("repeat_last_n", "repetition_penalty", -1),
    ("repeat_penalty", "repetition_penalty", 1),
    ("repetition_detection", "stop or max_tokens"),
    ("response_fields", ""),
    ("return_full_text", ""),
    ("return_hidden_states", ""),
    ("return_input_ids_in_sglext", "/tokenize"),
    ("return_meta_info", "logprobs"),
    ("return_output_ids_in_sglext", "logprobs"),
    ("return_prompt_text", ""),
    ("return_prompt_token_ids", "/tokenize"),
    ("return_routed_experts", ""),
    ("return_sampling_mask", "logprobs"),
    ("return_token_ids", "logprobs"),
    ("return_tokens", "logprobs"),
    ("return_tokens_as_token_ids", "logprobs"),
    ("safe_prompt", "messages"),
    ("samplers", "top_p, top_k or min_p"),
    ("sampling_logprobs_mode", "logprobs"),
    ("sampling_params", "temperature"),
    ("schema", "response_format with a json_schema", None),
    ("separate_reasoning", "include_reasoning", True),
    ("session_params", "messages"),
    ("skip_special_tokens", "", True),
    ("smoothing_factor", "temperature"),
    ("spaces_between_special_tokens", "", True),
    ("stop_regex", "stop"),
    ("stop_sequences", "stop"),
    ("stream_reasoning", "include_reasoning", True),
    ("structural_tag", "structured_outputs with json, regex or choice"),
    ("suffix", ""),
    ("system", "messages"),
    ("system_prompt", "messages"),
    ("t_max_predict_ms", "max_tokens", -1, 0),
    ("tfs_z", "top_p or min_p", 1),
    ("think", "chat_template_kwargs", True),
    ("thinking", "chat_template_kwargs"),
    ("thinking_budget", "reasoning_effort or max_tokens", -1),
    ("thinking_budget_tokens", "reasoning_effort or max_tokens", -1),
    ("thinking_token_budget", "reasoning_effort or max_tokens", -1),
    ("tool_prompt", "messages"),
    ("top_a", "top_p or min_p"),
    ("top_n_sigma", "top_p or min_p", -1, 0),
    ("top_n_tokens", "logprobs"),
    ("truncate", "", False, True),
    ("truncate_prompt_tokens", "", -1),
    ("typical_p", "top_p or min_p", 1),
    ("use_beam_search", ""),
    ("verbosity", "messages", "medium"),
    ("vllm_xargs", ""),
    ("watermark", ""),
    ("watermarking", ""),
    ("web_search_options", "tools", None),
    ("xtc_probability", "top_p or min_p"),
]
# More of them in the Responses API.
_REFUSED_IN_RESPONSES: list[_Row] = [
    ("add_special_tokens", "/v1/completions"),
    ("background", ""),
    ("conversation", ""),
    ("logprobs", "include with message.output_text.logprobs, and top_logprobs"),
    ("max_completion_tokens", "max_output_tokens"),
    ("max_tokens", "max_output_tokens"),
    ("messages", "input with all items so far"),
    ("n", "", 1),
    ("previous_response_id", "input with all items so far"),
    ("prompt", ""),
    ("reasoning_effort", "reasoning with effort"),
    ("response_format", "text with format"),
    ("store", ""),
    ("stream_drafts", ""),
    ("truncation", "", "disabled"),
]
REFUSED = {row[0]: row[1] for row in _REFUSED}
REFUSED_IN_RESPONSES = {row[0]: row[1] for row in [*_REFUSED, *_REFUSED_IN_RESPONSES]}
_NEUTRAL = {row[0]: row[2:] for row in [*_REFUSED, *_REFUSED_IN_RESPONSES] if len(row) > 2}


class Fields(BaseModel, extra="ignore", strict=True, allow_inf_nan=False):
    """Drops fields that are null or unknown. The context is a set; it gets the names of unknown fields."""

    model_config = ConfigDict(frozen=True)
    refused: ClassVar[dict[str, str]] = REFUSED  # what to use instead

    @model_validator(mode="before")
    @classmethod
    def _drop_unknown(cls, given: object, info: ValidationInfo) -> object:
        if not isinstance(given, dict):
            return given
        given = {name: value for name, value in given.items() if value is not None}
        known = {field.alias or name for name, field in cls.model_fields.items()}
        ignored: set[str] = set() if info.context is None else info.context
        unknown = given.keys() - known - ignored
        if len(unknown) + len(ignored) > _MAX_FIELDS:  # each name takes time to compare
            raise ValueError(f"must have at most {_MAX_FIELDS} unknown fields together")
        for name in unknown:
            if why := _why_refused(name, given, known, cls.refused):
                raise APIError.at(name, given[name], why)
        ignored.update(unknown - cls.refused.keys())
        return given


def _why_refused(name: str, given: JSONObject, known: set[str], refused: dict[str, str]) -> str | None:
    if name not in refused:
        near = get_close_matches(name[:50], known, 1, cutoff=_LIKE)
        return f"there is no such field, did you mean {near[0]}?" if near else None
    value = given[name]
    instead = refused[name]
    is_neutral = value in _NEUTRAL[name] if name in _NEUTRAL else not value
    # With `ignore_eos`, an answer always has the most tokens, so a minimum asks for nothing.
    if is_neutral or (name.startswith("min_") and given.get("ignore_eos") is True):
        return None
    return f"this server does not have it, {f'use {instead}' if instead else 'leave it out'}"


def check_number_of_values(body: bytes) -> None:
    """Raises APIError for a body of more values than a request needs. Making objects of JSON keeps the
    interpreter for seconds, and streams wait; counting takes milliseconds.
    """
    unescaped = body.replace(rb"\\", b"").replace(rb"\"", b"") if b"\\" in body else body
    number = unescaped.count(b'"') // 2
    if number <= MAX_OBJECTS:
        outside = b"".join(unescaped.split(b'"')[::2])
        number += outside.count(b"[") + outside.count(b"{")
        if outside.count(b",") > MAX_VALUES:
            raise APIError(f"the body: must have at most {MAX_VALUES} values")
    if number > MAX_OBJECTS:
        raise APIError(f"the body: must have at most {MAX_OBJECTS} texts, lists and objects together")


Limit = Annotated[int | None, Field(ge=1)]
Penalty = Annotated[float | None, Field(ge=0.01, le=100)]
_Id = Annotated[str, Field(pattern="^[0-9]{1,9}$"), AfterValidator(int)]  # a key
LogitBias = Annotated[dict[_Id, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)]
_Word = Annotated[str, Field(min_length=1, max_length=256)]
_as_list = BeforeValidator(lambda given: [given] if isinstance(given, str) else given)
Words = Annotated[list[_Word], Field(max_length=128), _as_list]


class StreamOptions(Fields):
    include_usage: bool = False


def _check_kind(given: object) -> object:
    if given not in ("text", "input_text", "output_text", "reasoning_text", "summary_text"):
        raise ValueError("this model reads text only")
    return given


class _TextPart(Fields):
    type: Annotated[str, BeforeValidator(_check_kind)]
    text: str


_parts = TypeAdapter(Annotated[list[_TextPart], Field(max_length=MAX_ITEMS, fail_fast=True)])


def _joined(given: object) -> str:
    if not isinstance(given, str | list):
        raise ValueError("must be a text or a list of parts")
    return given if isinstance(given, str) else "\n".join(part.text for part in _parts.validate_python(given))


Text = Annotated[str, BeforeValidator(_joined)]


class Prediction(Fields):
    type: Literal["content"]
    content: str


class Called(Fields):
    name: str
    # Clients may send no text for a function without parameters.
    arguments: Annotated[Json[object], BeforeValidator(lambda given: "{}" if given == "" else given)]


class ToolCall(Fields):
    id: str | None = None
    type: Literal["function"] = "function"
    function: Called


class Message(Fields):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text = ""
    tool_calls: list[ToolCall] = Field([], max_length=MAX_ITEMS)
    tool_call_id: str | None = None
    reasoning_content: str = ""  # the thinking of an earlier answer
    reasoning: str = ""  # vLLM's name of the same

    @property
    def for_template(self) -> JSONObject:
        """Fields of the message for a template, which decides whether the model sees earlier thinking."""
        role = "system" if self.role == "developer" else self.role
        message = self.model_dump(exclude={"reasoning"}, exclude_none=True)
        message |= {"role": role, "reasoning_content": self.reasoning_content or self.reasoning}
        return {name: value for name, value in message.items() if value or name == "content"}


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]


class Function(Fields):
    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]  # as in OpenAI's
    description: str | None = None
    parameters: JSONObject | None = None
    strict: bool = False


class Tool(Fields):
    type: Literal["function"] = "function"
    function: Function

    @property
    def for_template(self) -> JSONObject:
        return {
            "type": self.type,
            "function": self.function.model_dump(exclude_unset=True, exclude={"strict"}),
        }


ToolChoice = Literal["none", "auto", "required"] | Tool


class JSONSchema(Fields):
    json_schema: JSONObject = Field(alias="schema")
    name: object = None  # for people
    description: object = None
    strict: object = None  # an answer follows the schema in any case


class ResponseFormat(Fields):
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JSONSchema | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("the type json_schema needs the field json_schema, other types have none")
        return self

    @property
    def rules(self) -> list[str]:
        """Rules in Lark that the answer follows. Raises GrammarError if a schema is too large."""
        if self.type == "text":
            return []
        return [json_rule(self.json_schema.json_schema if self.json_schema else {"type": "object"})]


TemplateKwargs = Annotated[JSONObject, Field(max_length=_MAX_FIELDS), AfterValidator(check_template_kwargs)]


class StructuredOutputs(Fields):
    """vLLM's rules of an answer. A request has one of the fields."""

    json_schema: JSONObject | None = Field(default=None, alias="json")
    json_object: bool = False
    regex: str | None = Field(default=None, max_length=MAX_CHARACTERS)
    choice: list[str] = Field(default=[], max_length=MAX_ITEMS)

    @field_validator("choice")
    @classmethod
    def _check_choice(cls, given: list[str]) -> list[str]:
        if sum(map(len, given)) > MAX_CHARACTERS:
            raise ValueError(f"must have at most {MAX_CHARACTERS} characters together")
        return given

    @property
    def rules(self) -> list[str]:
        """See `ResponseFormat`."""
        rules = list[str]()
        if self.json_schema is not None:
            rules.append(json_rule(self.json_schema))
        if self.json_object:
            rules.append(json_rule({"type": "object"}))
        if self.regex is not None:
            rules.append(f"/{regex_to_lark(self.regex)}/")
        if self.choice:
            rules.append(" | ".join(map(json.dumps, self.choice)))
        return rules


def _as_prompts(given: object, validate: ValidatorFunctionWrapHandler) -> object:
    is_list = isinstance(given, list) and given and not isinstance(given[0], int)
    try:
        return validate(given if is_list else [given])
    except ValidationError:
        raise ValueError(
            f"must be a text, or token ids, or a list of at most {MAX_ITEMS} of either"
        ) from None


Ids = Annotated[list[int], Field(min_length=1, fail_fast=True)]
Prompts = Annotated[list[str | Ids], Field(max_length=MAX_ITEMS, fail_fast=True), WrapValidator(_as_prompts)]
