"""The HTTP server: turns requests into jobs of the engine, and results into responses."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import math
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route

import self_speculation
from self_speculation import GenerationConfig, GenerationStrategyResult, HuggingfaceLlamaGenerator
from self_speculation.decoding.grammar import GrammarError
from self_speculation.model.families import context_length
from serving.access import PAGE_FILES, AccessMiddleware, host_check, read_body
from serving.engine import Engine, Job, QueueFull, RequestTimeout
from serving.flags import ServeArguments
from serving.metrics import FinishedRequest, Metrics, figures
from serving.prompts import Prompt, encode
from serving.protocol import APIError, BaseRequest, ChatRequest, CompletionRequest
from serving.request_log import RequestLog
from serving.responses import AnswerResponse, api_error
from serving.streaming import Delta, DeltaStreamer, DraftDeltaStreamer, LogprobCollector

_PAGE_POLICY = (  # nothing comes from elsewhere, whatever a model writes
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_NO_SNIFFING = {"X-Content-Type-Options": "nosniff"}
_HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "1"}}
_SEEDS = 2**63
_PATHS = "/, /health, /metrics, /v1/models, /v1/chat/completions, /v1/completions"

_AnyRequest = ChatRequest | CompletionRequest


@dataclass
class _Choice:
    """One answer to a request, and its state."""

    index: int
    job: Job
    logprobs: LogprobCollector | None
    echo: str  # the prompt, if the answer repeats it, or else empty
    num_chars: int = 0  # of the text so far
    finished: FinishedRequest | None = None

    def as_json(self, request: BaseRequest, delta: Delta) -> dict[str, Any]:
        """Format new text: that of a chunk, or the whole answer."""
        stop_reason = self.finished and self.finished.result.stop_reason
        self.num_chars += len(delta.text)
        logprobs = None
        if self.logprobs:
            # The tokens of a stop word are not part of the answer.
            end = self.num_chars if stop_reason in (None, "stop_word") else math.inf
            logprobs = self.logprobs.take(end)
        return request.choice(self.index, delta, logprobs, stop_reason)


# Choices and their new text. A choice that finishes has `finished`, and all its text if it is not streamed.
Events = AsyncGenerator[tuple[_Choice, Delta]]


class App(Starlette):
    """The server of one model; `config` has the defaults for what requests leave out."""

    def __init__(
        self,
        generator: HuggingfaceLlamaGenerator,
        engine: Engine,
        config: GenerationConfig,
        args: ServeArguments,
        name: str,
        address: str,
    ) -> None:
        self._generator, self._engine, self._config, self._name = generator, engine, config, name
        self._args, self._metrics = args, Metrics(engine, name)
        owner, context = "self-speculation", context_length(generator.model.config)
        self._entry = {"id": name, "object": "model", "created": int(time.time()), "owned_by": owner}
        self._entry["max_model_len"] = context
        self._compiling, self._num_guided = asyncio.Lock(), 0
        generator.use_sandbox()
        backend = (self_speculation.__version__, name, generator.model.dtype, config)
        self._fingerprint = f"fp_{hashlib.sha256(repr(backend).encode()).hexdigest()[:10]}"
        self._log = RequestLog(args.log_requests)
        engine.on_result = self._count
        api = [
            Route("/models", self._models),
            Route("/models/{name:path}", self._model),
            Route("/chat/completions", partial(self._respond, ChatRequest), methods=["POST"]),
            Route("/completions", partial(self._respond, CompletionRequest), methods=["POST"]),
        ]
        access = Middleware(AccessMiddleware, key=args.key, on_error=self._respond_error)
        super().__init__(
            routes=[
                *(Route(path, self._page) for path in PAGE_FILES),
                Route("/health", self._health),
                Route("/metrics", self._exposition),
                Mount("/v1", routes=api),
                *api,
            ],
            middleware=[access, *host_check(address, args.host)],
            exception_handlers={HTTPException: self._respond_error},
        )

    async def _page(self, http: HTTPRequest) -> Response:
        headers = {"Content-Security-Policy": _PAGE_POLICY, "Cache-Control": "no-cache", **_NO_SNIFFING}
        return FileResponse(Path(__file__).with_name(PAGE_FILES[http.scope["path"]]), headers=headers)

    async def _health(self, _: HTTPRequest) -> Response:
        if self._engine.accepts_jobs:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "shutting down"}, 503)

    async def _exposition(self, _: HTTPRequest) -> Response:
        return Response(generate_latest(self._metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def _models(self, _: HTTPRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._entry]})

    async def _model(self, http: HTTPRequest) -> Response:
        self._check_model(http.path_params["name"])
        return JSONResponse(self._entry)

    async def _respond_error(self, http: HTTPRequest, exception: Exception) -> Response:
        if isinstance(exception, HTTPException) and exception.status_code == 404:
            exception.detail = f"no such path: this server has {_PATHS}"
        error = self._count_error(exception, _origin(http))
        headers = getattr(exception, "headers", None) or _HEADERS.get(error.status)
        return JSONResponse(error.body, error.status, headers)

    def _count_error(self, exception: Exception, origin: str) -> APIError:
        error = api_error(exception)
        self._metrics.count_error(error.status)
        self._log.write(origin, f"{error.status}, {error}")
        return error

    def _count(self, job: Job, result: GenerationStrategyResult) -> None:
        """Count what a job generated, also one that is cancelled. Called by the engine's thread."""
        finished = FinishedRequest.of(job, result)
        self._metrics.count(finished)
        self._log.write(job.origin, finished)

    def _check_model(self, name: str) -> None:
        if name != self._name:
            message = f"model {name!r}: this server has {self._name!r}"
            raise APIError(message, 404, "model", "model_not_found")

    def _check(self, request: BaseRequest, num_prompts: int) -> None:
        self._check_model(request.model or self._name)
        limit = self._args.max_tokens
        if limit is not None and (request.max_new_tokens or 0) > limit:
            message = f"max_tokens {request.max_new_tokens}: must be at most {limit}"
            raise APIError(message, param="max_tokens")
        if num_prompts * request.n > (limit := self._engine.max_jobs):
            message = f"n {request.n}, for {num_prompts} prompts: must be at most {limit} answers together"
            raise APIError(message, param="n")
        size = self._generator.model.config.vocab_size
        if any(id_ >= size for id_ in request.logit_bias):
            raise APIError(f"logit_bias: must be by token ids below {size}", param="logit_bias")

    async def _respond(self, kind: type[_AnyRequest], http: HTTPRequest) -> Response:
        """Generate the choices of a request."""
        body = await read_body(http, self._args.max_body)
        arrival, loop = time.perf_counter(), asyncio.get_running_loop()
        queue = asyncio.Queue[tuple[int, Any]]()

        def emit(index: int, event: Any) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(queue.put_nowait, (index, event))

        # In threads: a long request takes a while to parse, check and tokenize.
        request, prompts, shared = await asyncio.to_thread(self._parse, kind, body)
        submit = partial(self._submit, request, prompts, shared, arrival, _origin(http), emit)
        with _naming_field(request):
            async with self._turn(http, arrival) if shared.grammar else nullcontext():
                choices = await asyncio.to_thread(submit)
        events = self._events(request, choices, queue)
        parts = (self._chunks if request.stream else self._whole)(request, choices, events)
        media_type = "text/event-stream" if request.stream else "application/json"
        return AnswerResponse(parts, media_type, [choice.job for choice in choices])

    @asynccontextmanager
    async def _turn(self, http: HTTPRequest, arrival: float) -> AsyncGenerator[None]:
        """The turn of a request whose grammar is compiled: one at a time, since others need threads too."""
        if self._num_guided >= self._engine.max_jobs:
            raise QueueFull(f"{self._num_guided} grammars wait already: try again later")
        self._num_guided += 1
        try:
            async with self._compiling:
                if await http.is_disconnected():
                    raise ClientDisconnect("the client has disconnected")
                if time.perf_counter() > arrival + self._args.max_time:
                    raise RequestTimeout(f"no answer after {self._args.max_time:g} seconds")
                yield
        finally:
            self._num_guided -= 1

    def _parse(
        self, kind: type[_AnyRequest], body: bytes
    ) -> tuple[_AnyRequest, list[Prompt], self_speculation.Request]:
        """A request, its prompts, and what all its choices share."""
        ignored, generator = set[str](), self._generator
        request = kind.model_validate_json(body, context=ignored)
        self._log.name_ignored(ignored)
        self._check(request, 1 if isinstance(request, ChatRequest) else len(request.prompt))
        prompts, thinking = encode(request, generator, self._args)
        config, bias = request.generation_config(self._config), dict(request.logit_bias)
        if request.ignore_eos:
            bias |= dict.fromkeys(generator.eos_token_ids, -math.inf)
        drafts = request.drafts_with(config)
        predicted = None
        if request.prediction and drafts:
            predicted = generator.encode_prediction(request.prediction.content, config)
        with _naming_field(request):
            grammar = request.grammar(generator.tokenizer)
        given = {"prediction": predicted, "grammar": grammar, "thinking": thinking, "drafts": drafts}
        shared = self_speculation.Request([], config=config, logit_bias=bias, **given)
        return request, prompts, shared

    def _submit(
        self,
        request: _AnyRequest,
        prompts: Sequence[Prompt],
        shared: self_speculation.Request,
        arrival: float,
        origin: str,
        emit: Callable[[int, Any], None],
    ) -> list[_Choice]:
        """Submit a job per choice; `emit` gets its index, and each `Delta` and the result of its job."""
        self._engine.check_room(len(prompts) * request.n)
        tokenizer, config = self._generator.tokenizer, shared.config
        assert config is not None
        seed = secrets.randbelow(_SEEDS) if request.seed is None else request.seed
        choices = []
        for index, ((ids, echo), nth) in enumerate(itertools.product(prompts, range(request.n))):
            streamer, logprobs, to_queue = None, None, partial(emit, index)
            if request.stream:
                kind = DraftDeltaStreamer if request.stream_drafts else DeltaStreamer
                streamer = kind(tokenizer, config.stop_words, ids, shared.thinking, to_queue)
            own = replace(shared, prompt=ids, streamer=streamer, seed=(seed + nth) % _SEEDS)
            prepared = self._generator.tokenize(own, config)
            if request.num_top_logprobs is not None:
                reader = prepared.stop_words.reader
                logprobs = LogprobCollector(tokenizer, request.num_top_logprobs, reader)
                prepared = replace(prepared, stopping_criteria=logprobs)
            job = Job(prepared, to_queue, self._args.max_time, arrival, origin=origin)
            choices.append(_Choice(index, job, logprobs, echo))
        self._engine.submit([choice.job for choice in choices])
        return choices

    async def _events(
        self, request: BaseRequest, choices: list[_Choice], queue: asyncio.Queue[tuple[int, Any]]
    ) -> Events:
        """Yield what the engine emits until all choices finish. Raises the error of a choice."""
        unfinished = len(choices)
        while unfinished:
            index, event = await queue.get()
            choice, job = choices[index], choices[index].job
            if isinstance(event, Exception):
                with _naming_field(request):
                    raise event
            if isinstance(event, GenerationStrategyResult):
                unfinished -= 1
                delta = Delta("")
                if not request.streams_text:
                    whole = job.request.finish(event)
                    delta = Delta(whole.decoded_prediction, thinking="" if request.stream else whole.thinking)
                choice.finished, event = FinishedRequest.of(job, event), delta
            elif not (request.streams_text or event.thinking):
                continue  # the whole text comes at the end
            yield choice, event

    async def _whole(
        self, request: BaseRequest, choices: list[_Choice], events: Events
    ) -> AsyncGenerator[str]:
        """Format the choices as one JSON object."""
        by_index = {
            choice.index: choice.as_json(request, delta._replace(text=choice.echo + delta.text))
            async for choice, delta in events
        }
        head = request.head(self._name, self._fingerprint)
        whole = [by_index[choice.index] for choice in choices]
        yield json.dumps({**head, "choices": whole, **_figures(request, choices)})

    async def _chunks(
        self, request: BaseRequest, choices: list[_Choice], events: Events
    ) -> AsyncGenerator[str]:
        """Format the choices as server-sent events. An error after the first one is the last one."""
        head, begun = request.head(self._name, self._fingerprint), set[int]()
        has_usage = request.stream_options.include_usage

        def chunk(choices: list[dict[str, Any]], **figures: Any) -> str:
            figures = {"usage": None, **figures} if has_usage else {}
            return _server_sent({**head, "choices": choices, **figures})

        try:
            async for choice, delta in events:
                if choice.index not in begun:
                    begun.add(choice.index)
                    if first := request.first_choice(choice.index, choice.echo):
                        yield chunk([first])
                yield chunk([choice.as_json(request, delta)])
        except Exception as exception:
            if not begun:
                raise
            yield _server_sent(self._count_error(exception, choices[0].job.origin).body)
            return
        if has_usage:
            yield chunk([], **_figures(request, choices))
        yield "data: [DONE]\n\n"


@contextmanager
def _naming_field(request: BaseRequest) -> Iterator[None]:
    """Errors of a grammar name the field that it is made from."""
    try:
        yield
    except GrammarError as error:
        (name,) = request.guides
        raise APIError(f"{name}: {error}", param=name) from error


def _origin(http: HTTPRequest) -> str:
    return f"{http.method} {http.scope['path']} {http.state.id}"


def _server_sent(content: Any) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _figures(request: BaseRequest, choices: Sequence[_Choice]) -> dict[str, Any]:
    return figures([choice.finished for choice in choices if choice.finished], request.n)
