"""One request, from its body to its answer: prompts, a job of the engine for each choice, and their text."""

import asyncio
import hashlib
import itertools
import json
import math
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

import self_speculation
from self_speculation import GenerationConfig, GenerationStrategyResult, HuggingfaceLlamaGenerator, Request
from self_speculation.decoding.grammar import GrammarError
from self_speculation.decoding.texts import Thinking
from self_speculation.families import context_length
from serving.engine import Engine, Job, RequestTimeout
from serving.errors import APIError
from serving.flags import ServeArguments
from serving.metrics import FinishedRequest, Metrics, figures
from serving.protocol import ChatRequest, CompletionRequest
from serving.streaming import Delta, DeltaStreamer, DraftDeltaStreamer, LogprobCollector

_SEEDS = 2**63


@dataclass(frozen=True)
class ServedModel:
    """A model, its engine, and the defaults for what requests leave out."""

    generator: HuggingfaceLlamaGenerator
    engine: Engine
    config: GenerationConfig
    args: ServeArguments
    name: str

    @cached_property
    def fingerprint(self) -> str:
        """Tells clients that the same seed may give another answer than before."""
        backend = (self_speculation.__version__, self.name, self.generator.model.dtype, self.config)
        return f"fp_{hashlib.sha256(repr(backend).encode()).hexdigest()[:10]}"

    def check_name(self, name: str) -> None:
        """Raises APIError if a client means another model."""
        if name != self.name:
            message = f"model {name!r}: this server has {self.name!r}"
            raise APIError(message, 404, "model", "model_not_found")


@dataclass
class _Choice:
    """One of the answers to a request, and its state."""

    index: int
    job: Job
    logprobs: LogprobCollector | None
    finished: FinishedRequest | None = None


class Answer:
    """The answer to a request: call `parse`, `submit`, then `parts`. The first two raise the errors of an
    invalid request, and take a while for a long one.
    """

    def __init__(self, served: ServedModel, metrics: Metrics, origin: str) -> None:
        self._served, self._generator = served, served.generator
        self._metrics, self._origin = metrics, origin
        self._arrival_time, self._loop = time.perf_counter(), asyncio.get_running_loop()
        # Of a choice: its index, and a `Delta`, its result or its error.
        self._events = asyncio.Queue[tuple[int, Delta | GenerationStrategyResult | Exception]]()
        self._choices, self._is_cancelled = list[_Choice](), False
        self.is_submitted = False  # then the engine says how its jobs end

    def parse(self, kind: type[ChatRequest | CompletionRequest], body: bytes) -> None:
        """Read, check and tokenize the request."""
        generator, ignored = self._generator, set[str]()
        self.request = request = kind.model_validate_json(body, context=ignored)
        self._metrics.name_ignored(ignored)
        self._check()
        if isinstance(request, ChatRequest):
            prompts = [self._encode_chat(request)]
        else:
            prompts = [Request(self._encode(prompt, "prompt")) for prompt in request.prompt]
        config, bias = request.generation_config(self._served.config), dict(request.logit_bias)
        if request.ignore_eos:
            bias |= dict.fromkeys(generator.eos_token_ids, -math.inf)
        predicted = None
        if request.prediction and request.drafts:
            predicted = generator.encode_prediction(request.prediction.content, config)
        with self._naming_field():
            grammar = request.grammar(generator.tokenizer)
        self.is_guided = grammar is not None
        shared = {"config": config, "logit_bias": bias, "drafts": request.drafts}
        shared |= {"prediction": predicted, "grammar": grammar}
        seed = secrets.randbelow(_SEEDS) if request.seed is None else request.seed
        self._given = [
            replace(prompt, **shared, seed=(seed + nth) % _SEEDS)
            for prompt, nth in itertools.product(prompts, range(request.n))
        ]

    def submit(self) -> None:
        """Compile the grammar, and submit a job for each choice."""
        request, generator, engine = self.request, self._generator, self._served.engine
        max_time = self._served.args.max_time
        if time.perf_counter() > self._arrival_time + max_time:  # it has waited for the compiler
            raise RequestTimeout(f"no answer after {max_time:g} seconds")
        engine.check_room(len(self._given))
        for index, given in enumerate(self._given):
            # Nothing of a job leads to this object: finished ones are freed at once.
            streamer, logprobs, emit = None, None, partial(_emit, self._loop, self._events, index)
            if request.stream:
                kind = DraftDeltaStreamer if request.stream_drafts else DeltaStreamer
                streamer = kind(generator.tokenizer, emit)
            with self._naming_field():
                prepared = generator.tokenize(replace(given, streamer=streamer), self._served.config)
            if request.num_top_logprobs is not None:
                logprobs = LogprobCollector(generator.tokenizer, request.num_top_logprobs, prepared.reader)
                prepared = replace(prepared, stopping_criteria=logprobs)
            job = Job(prepared, emit, max_time, self._arrival_time, origin=self._origin)
            self._choices.append(_Choice(index, job, logprobs))
        if not self._is_cancelled:
            engine.submit([choice.job for choice in self._choices])
            self.is_submitted = True
        if self._is_cancelled:  # meanwhile
            self.cancel()

    def cancel(self) -> None:
        """The client is gone, also during `submit`, or has the whole answer."""
        self._is_cancelled = True
        for choice in self._choices:
            choice.job.is_cancelled = True

    def parts(self) -> AsyncGenerator[str]:
        """The choices as one JSON object, or as server-sent events."""
        head = self.request.head(self._served.name, self._served.fingerprint)
        return self._chunks(head) if self.request.stream else self._whole(head)

    async def _whole(self, head: dict[str, Any]) -> AsyncGenerator[str]:
        choices = [dict[str, Any]()] * len(self._choices)
        async for choice, delta in self._deltas():
            choices[choice.index] = self._format(choice, delta)
        yield json.dumps({**head, "choices": choices, **self._figures()})

    async def _chunks(self, head: dict[str, Any]) -> AsyncGenerator[str]:
        """An error after the first event is the last one."""
        begun, has_usage = set[int](), self.request.stream_options.include_usage

        def chunk(choices: list[dict[str, Any]], **figures: Any) -> str:
            figures = {"usage": None, **figures} if has_usage else {}
            return _server_sent({**head, "choices": choices, **figures})

        try:
            async for choice, delta in self._deltas():
                if choice.index not in begun:
                    begun.add(choice.index)
                    if isinstance(self.request, ChatRequest):
                        yield chunk([self.request.first_choice(choice.index)])
                yield chunk([self._format(choice, delta)])
        except Exception as exception:
            if not begun:
                raise
            yield _server_sent(self._metrics.count_error(exception, self._origin).body)
            return
        if has_usage:
            yield chunk([], **self._figures())
        yield "data: [DONE]\n\n"

    async def _deltas(self) -> AsyncGenerator[tuple[_Choice, Delta]]:
        """New text of the choices until all finish. A choice that finishes has `finished`, and all its text
        if that is not streamed. Raises the error of a choice.
        """
        request, unfinished = self.request, len(self._choices)
        while unfinished:
            index, event = await self._events.get()
            choice = self._choices[index]
            if isinstance(event, Exception):
                with self._naming_field():
                    raise event
            if isinstance(event, Delta):
                if request.streams_text or event.thinking:  # other text comes at the end
                    yield choice, event
                continue
            unfinished -= 1
            delta = Delta("")
            if not request.streams_text:
                whole = choice.job.request.finish(event)
                delta = Delta(whole.decoded_prediction, thinking="" if request.stream else whole.thinking)
            choice.finished = FinishedRequest.of(choice.job, event)
            yield choice, delta

    def _format(self, choice: _Choice, delta: Delta) -> dict[str, Any]:
        """Format new text: that of a chunk, or the whole answer."""
        logprobs, stop_reason = None, choice.finished and choice.finished.result.stop_reason
        if choice.logprobs:
            # The tokens of a stop word are not part of the answer.
            logprobs = choice.logprobs.take(len(delta.text), stop_reason not in (None, "stop_word"))
        return self.request.choice(choice.index, delta, logprobs, stop_reason)

    def _figures(self) -> dict[str, Any]:
        return figures([each.finished for each in self._choices if each.finished], self.request.n)

    @contextmanager
    def _naming_field(self) -> Iterator[None]:
        """Errors of a grammar name the field that it is made from."""
        try:
            yield
        except GrammarError as error:
            name = self.request.guided_by
            raise APIError(f"{name}: {error}", param=name) from error

    def _check(self) -> None:
        request, served = self.request, self._served
        served.check_name(request.model or served.name)
        limit = served.args.max_tokens
        if limit is not None and (request.max_new_tokens or 0) > limit:
            message = f"max_tokens {request.max_new_tokens}: must be at most {limit}"
            raise APIError(message, param="max_tokens")
        num_prompts = 1 if isinstance(request, ChatRequest) else len(request.prompt)
        if num_prompts * request.n > (limit := served.engine.max_jobs):
            message = f"n {request.n}, for {num_prompts} prompts: must be at most {limit} answers together"
            raise APIError(message, param="n")
        size = self._generator.model.config.vocab_size
        if any(id_ >= size for id_ in request.logit_bias):
            raise APIError(f"logit_bias: must be by token ids below {size}", param="logit_bias")

    def _encode_chat(self, request: ChatRequest) -> Request:
        """The prompt by the chat template, and how the answer thinks."""
        generator, args = self._generator, self._served.args
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
        return Request(self._encode(prompt, "messages", special_tokens=False), thinking=thinking)

    def _encode(self, prompt: str | list[int], param: str, special_tokens: bool = True) -> list[int]:
        generator = self._generator
        length, context = f"{len(prompt)} characters", context_length(generator.model.config)
        if isinstance(prompt, list) or not generator.is_far_too_long(prompt):
            ids = generator.encode(prompt, special_tokens)
            if len(ids) < context:
                return ids
            length = f"{len(ids)} tokens"
        message = f"{param}: this model's maximum context length is {context} tokens, the prompt has {length}"
        raise APIError(message, param=param, code="context_length_exceeded")


class AnswerResponse(StreamingResponse):
    """Passes a parsed answer to `submit`. Sends the head with the first part, so that an error before can set
    the status. Its end cancels the jobs, also when the client disconnects.
    """

    def __init__(self, answer: Answer, submit: Callable[[Answer], Awaitable[None]]) -> None:
        self._answer, self._submit = answer, submit
        self._parts, self._has_begun = answer.parts(), False
        media_type = "text/event-stream" if answer.request.stream else "application/json"
        super().__init__(self._parts, headers={"Cache-Control": "no-cache"}, media_type=media_type)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.cancel()
        if not (self._has_begun or self._answer.is_submitted):
            raise ClientDisconnect("the client has disconnected")

    async def stream_response(self, send: Send) -> None:
        await self._submit(self._answer)
        async for part in self._parts:
            body = part.encode()
            if not self._has_begun:
                if not self._answer.request.stream:  # it is the only part
                    self.headers["Content-Length"] = str(len(body))
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            self._has_begun = True
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def _emit(loop: asyncio.AbstractEventLoop, events: asyncio.Queue, index: int, event: object) -> None:
    with suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(events.put_nowait, (index, event))


def _server_sent(content: Any) -> str:
    return f"data: {json.dumps(content)}\n\n"
