"""From requests to prompts: token ids, by the chat template or not, that the model's context has room for."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from self_speculation import HuggingfaceLlamaGenerator
from self_speculation.decoding.texts import Thinking, decode
from self_speculation.model.families import context_length
from serving.flags import ServeArguments
from serving.protocol import APIError, ChatRequest, CompletionRequest


class Prompt(NamedTuple):
    ids: list[int]
    echo: str = ""  # its text if the answer repeats it


def encode(
    request: ChatRequest | CompletionRequest, generator: HuggingfaceLlamaGenerator, args: ServeArguments
) -> tuple[list[Prompt], Thinking | None]:
    """The prompts of a request, and how the answer to a chat thinks."""
    if isinstance(request, ChatRequest):
        return _encode_chat(request, generator, args)
    if request.echo and request.logprobs is not None:
        raise APIError("echo: cannot be combined with logprobs", param="echo")
    prompts = []
    for given in request.prompt:
        ids, echo = _encode(generator, given, "prompt"), ""
        if request.echo:
            echo = given if isinstance(given, str) else decode(generator.tokenizer, ids)
        prompts.append(Prompt(ids, echo))
    return prompts, None


def _encode_chat(
    request: ChatRequest, generator: HuggingfaceLlamaGenerator, args: ServeArguments
) -> tuple[list[Prompt], Thinking | None]:
    if not generator.tokenizer.chat_template:
        raise APIError("messages: the model has no chat template, use /v1/completions", param="messages")
    messages = [message.for_template for message in request.messages]
    kwargs = {**args.template_kwargs, **request.template_kwargs}
    render = partial(generator.render_chat, messages, kwargs, tools=request.tools_for_template or None)
    try:
        prompt = render()
        thinking = Thinking.of(generator.tokenizer, prompt)
        if args.sanitize_control_tokens and not generator.is_far_too_long(prompt):
            prompt = render(tokenize=True, sanitize_control_tokens=True, return_dict=False)  # ids
    except ValueError as error:
        raise APIError(f"messages: {error}", param="messages") from error
    # The template adds special tokens.
    return [Prompt(_encode(generator, prompt, "messages", special_tokens=False))], thinking


def _encode(
    generator: HuggingfaceLlamaGenerator, prompt: str | list[int], param: str, special_tokens: bool = True
) -> list[int]:
    length, context = f"{len(prompt)} characters", context_length(generator.model.config)
    if isinstance(prompt, list) or not generator.is_far_too_long(prompt):
        ids = generator.encode(prompt, special_tokens)
        if len(ids) < context:
            return ids
        length = f"{len(ids)} tokens"
    message = f"{param}: this model's maximum context length is {context} tokens, the prompt has {length}"
    raise APIError(message, param=param, code="context_length_exceeded")
