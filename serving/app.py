"""What is served over HTTP: who may ask, how requests become jobs of the engine, how answers go back."""

from __future__ import annotations

import asyncio
import hmac
import itertools
import json
import logging
import math
import os
import re
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import TemplateError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import self_speculation
from runs.failures import reason
from self_speculation import GenerationConfig, GenerationStrategyResult, HuggingfaceLlamaGenerator
from self_speculation.decoding.stopping import StopWords
from serving.engine import (
    ClientDisconnected,
    Engine,
    Job,
    QueueFull,
    RequestEnded,
    RequestTimeout,
    ServerShutdown,
)
from serving.feeds import Delta, DraftFeed, LogprobCollector, Scored, TextFeed
from serving.flags import ServeArguments
from serving.metrics import FinishedRequest, Metrics, metrics, usage
from serving.protocol import APIError, BaseRequest, ChatRequest, CompletionRequest, frame, read

_log = logging.getLogger(__name__)
_PAGE = {"/": "page.html"} | {f"/{name}": name for name in ("page.css", "page.js", "markdown-it.umd.min.js")}
_PAGE_POLICY = (  # nothing comes from elsewhere, whatever a model writes
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_OPEN = (*_PAGE, "/health")  # to whoever has no key
_HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(:\d*)?")  # a name or an address, and a port
_STATUS = {QueueFull: 429, ClientDisconnected: 499, ServerShutdown: 503, RequestTimeout: 504}
_RETRY = {"Retry-After": "1"}  # seconds
_SEEDS = 2**63

Events = AsyncGenerator[tuple[int, Delta | FinishedRequest]]  # each with the index of its choice
T = TypeVar("T")
R = TypeVar("R", bound=BaseRequest)


def make_app(
    generator: HuggingfaceLlamaGenerator,
    engine: Engine,
    config: GenerationConfig,
    args: ServeArguments,
    name: str,
    address: str,
) -> Starlette:
    """The server of one model.

    Args:
        config: how answers are generated whose requests do not say otherwise.
        name: the model's.
        address: IP address that it listens at.
    """
    server = _Server(generator, engine, config, args, name)
    kinds = (APIError, HTTPException, Exception)
    return Starlette(
        routes=[
            *(Route(path, server.page) for path in _PAGE),
            Route("/health", server.health),
            Route("/metrics", server.exposition),
            Route("/v1/models", server.models),
            Route("/v1/chat/completions", server.chat, methods=["POST"]),
            Route("/v1/completions", server.complete, methods=["POST"]),
        ],
        middleware=[Middleware(_Gate, args=args, is_local=is_loopback(address), refuse=server.refuse)],
        exception_handlers=dict.fromkeys(kinds, server.refuse),
    )


@dataclass
class _Choice:
    """An answer on its way."""

    job: Job
    stop_words: StopWords
    scores: LogprobCollector | None
    is_begun: bool = False
    length: int = 0  # characters that were sent

    def scored(self, text: str, stop_reason: str | None = None) -> list[Scored] | None:
        """The tokens of new text, if they are wanted; at the end, all that are no part of a stop word."""
        self.length += len(text)
        is_whole = stop_reason not in (None, "stop_word")
        return self.scores.take(math.inf if is_whole else self.length) if self.scores else None


class _Server:
    """See `make_app`."""

    def __init__(
        self,
        generator: HuggingfaceLlamaGenerator,
        engine: Engine,
        config: GenerationConfig,
        args: ServeArguments,
        name: str,
    ) -> None:
        self._generator, self._engine, self._config, self._name = generator, engine, config, name
        self._args, self._metrics, self._began = args, Metrics(engine), int(time.time())

    async def page(self, http: Request) -> Response:
        headers = {"Content-Security-Policy": _PAGE_POLICY, "Cache-Control": "no-cache"}
        return FileResponse(Path(__file__).with_name(_PAGE[http.scope["path"]]), headers=headers)

    async def health(self, _: Request) -> Response:
        if self._engine.is_up:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "shutting down"}, 503)

    async def exposition(self, _: Request) -> Response:
        return Response(self._metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    async def models(self, _: Request) -> Response:
        model = {"id": self._name, "object": "model", "created": self._began, "owned_by": "self-speculation"}
        return JSONResponse({"object": "list", "data": [model]})

    async def chat(self, http: Request) -> Response:
        return await self._answer(http, ChatRequest, self._of_chat)

    async def complete(self, http: Request) -> Response:
        return await self._answer(http, CompletionRequest, self._of_texts)

    async def refuse(self, _: Request, error: Exception) -> Response:
        """The response to a request that gets no answer."""
        if isinstance(error, HTTPException):
            error = APIError(error.detail, error.status_code)
        elif not isinstance(error, APIError):
            error = APIError("the server failed at this request", 500)
        self._metrics.count_refused(error.status)
        # JSON in ASCII: what a request said may be no valid text.
        return Response(
            json.dumps(error.body),
            error.status,
            headers=_RETRY if error.status in (429, 503) else None,
            media_type="application/json",
        )

    def _of_texts(self, asked: CompletionRequest) -> list[list[int]]:
        """The prompts' ids."""
        self._check(asked, len(asked.prompt))
        try:
            return [self._generator.encode(prompt) for prompt in asked.prompt]
        except ValueError as error:
            raise APIError(str(error), param="prompt") from error

    def _of_chat(self, asked: ChatRequest) -> list[list[int]]:
        """The ids of the one prompt."""
        self._check(asked, 1)
        tokenizer = self._generator.tokenizer
        if not tokenizer.chat_template:
            raise APIError("messages: the model has no chat template, use /v1/completions", param="messages")
        messages = [message.for_template for message in asked.messages]
        applied = partial(tokenizer.apply_chat_template, messages, add_generation_prompt=True)
        try:
            prompt = applied(tokenize=False)
            if self._args.sanitize_control_tokens and not self._generator.is_far_too_long(prompt):
                prompt = applied(sanitize_control_tokens=True, return_dict=False)  # ids
            return [self._generator.encode(prompt, special_tokens=False)]  # the template has them
        except (TemplateError, ValueError) as error:
            raise APIError(f"messages: {error}", param="messages") from error

    def _check(self, asked: BaseRequest, num_prompts: int) -> None:
        if asked.model not in (None, self._name):
            message = f"model {asked.model!r}: this server has {self._name!r}"
            raise APIError(message, 404, "model", "model_not_found")
        most = self._args.max_tokens
        if most is not None and (asked.max_tokens or 0) > most:
            raise APIError(f"max_tokens {asked.max_tokens}: must be at most {most}", param="max_tokens")
        if num_prompts * asked.n > (room := self._engine.most_jobs):
            message = f"n {asked.n}, for {num_prompts} prompts: must be at most {room} answers together"
            raise APIError(message, param="n")

    async def _answer(
        self, http: Request, kind: type[R], prompts: Callable[[R], list[list[int]]]
    ) -> Response:
        """Have the engine answer.

        Args:
            kind: of the request.
            prompts: request -> ids of its prompts.
        """
        body, loop = await _body(http), asyncio.get_running_loop()

        def begin() -> tuple[R, list[_Choice], Events]:
            asked = read(kind, body)
            return asked, *self._begin(asked, prompts(asked), loop)

        # In another thread, so that nobody waits while a long request is parsed, checked and tokenized.
        asked, choices, events = await asyncio.to_thread(begin)
        if asked.stream:
            chunks = self._chunks(asked, choices, events)
            # The first one is waited for, so that what is refused until then has a status of its own.
            return _Stream(await _unless_gone(http, anext(chunks)), chunks)
        answers = await _unless_gone(http, _answers(events))
        said = []
        for index, (choice, answer) in enumerate(zip(choices, answers, strict=True)):
            stop_reason = answer.result.stop_reason
            scored = choice.scored(answer.text, stop_reason)
            said.append(asked.choice(index, answer.text, scored, stop_reason))
        figures = {"usage": usage(answers, asked.n), "metrics": metrics(answers)}
        return JSONResponse({**frame(asked.object_name, self._name), "choices": said, **figures})

    async def _chunks(
        self, asked: BaseRequest, choices: list[_Choice], events: Events
    ) -> AsyncGenerator[str]:
        """The answers as server-sent events.

        Raises:
            Refused: there is no answer, and nothing of one was sent.
        """
        start = frame(asked.chunk_name, self._name)
        has_usage = asked.stream_options is not None and asked.stream_options.include_usage
        answers: dict[int, FinishedRequest] = {}

        def chunk(said: list[dict[str, Any]], **more: Any) -> str:
            more = {"usage": None, **more} if has_usage else {}
            return _event({**start, "choices": said, **more})

        async with aclosing(events):
            try:
                async for index, what in events:
                    choice, piece, stop_reason = choices[index], Delta(""), None
                    if isinstance(what, FinishedRequest):
                        answers[index], stop_reason = what, what.result.stop_reason
                    else:
                        piece = what
                    is_first, choice.is_begun = not choice.is_begun, True
                    scored = choice.scored(piece.text, stop_reason)
                    yield chunk([asked.part(index, piece, scored, is_first, stop_reason)])
            except APIError as refused:
                if not any(choice.is_begun for choice in choices):
                    raise
                self._metrics.count_refused(refused.status)
                yield _event(refused.body)
                return
        if has_usage:
            in_order = [answers[index] for index in range(len(choices))]
            yield chunk([], usage=usage(in_order, asked.n), metrics=metrics(in_order))
        yield "data: [DONE]\n\n"

    def _begin(
        self, asked: BaseRequest, prompts: list[list[int]], loop: asyncio.AbstractEventLoop
    ) -> tuple[list[_Choice], Events]:
        """Submit jobs to the engine: the choices, and what becomes of them as it happens.

        Args:
            loop: where that is listened to.

        Raises:
            Refused: the engine does not take them.
        """
        config, queue = asked.config(self._config), asyncio.Queue[tuple[int, Any]]()
        seed = secrets.randbelow(_SEEDS) if asked.seed is None else asked.seed
        choices = []
        for index, (ids, nth) in enumerate(itertools.product(prompts, range(asked.n))):

            def tell(what: Any, index: int = index) -> None:
                with suppress(RuntimeError):  # the loop has ended, and nobody listens
                    loop.call_soon_threadsafe(queue.put_nowait, (index, what))

            choices.append(self._choice(asked, ids, (seed + nth) % _SEEDS, config, tell))
        try:
            self._engine.submit([choice.job for choice in choices])
        except RequestEnded as error:
            raise _refused(error) from error
        return choices, self._events(choices, queue)

    def _choice(
        self,
        asked: BaseRequest,
        ids: list[int],
        seed: int,
        config: GenerationConfig,
        tell: Callable[[Any], None],
    ) -> _Choice:
        tokenizer, feed, scores = self._generator.tokenizer, None, None
        if asked.stream:
            kind = DraftFeed if asked.stream_drafts else TextFeed
            feed = kind(tokenizer, config.stop_words, ids, tell)
        if asked.num_likeliest is not None:
            scores = LogprobCollector(tokenizer, asked.num_likeliest)
        given = self_speculation.Request(
            ids, stopping_criteria=scores, streamer=feed, seed=seed, config=config
        )
        request, stop_words = self._generator.prepared(given, config)
        return _Choice(Job(request, tell, self._args.max_time), stop_words, scores)

    async def _events(self, choices: list[_Choice], queue: asyncio.Queue[tuple[int, Any]]) -> Events:
        """Up to the end of the last choice; whoever stops listening before ends them all.

        Raises:
            Refused: one of them failed.
        """
        left = len(choices)
        try:
            while left:
                index, what = await queue.get()
                if isinstance(what, Exception):
                    raise _refused(what)
                if isinstance(what, GenerationStrategyResult):
                    left -= 1
                    what = self._answered(choices[index], what)
                yield index, what
        finally:
            for choice in choices:
                choice.job.is_gone = True

    def _answered(self, choice: _Choice, result: GenerationStrategyResult) -> FinishedRequest:
        job = choice.job
        text = self._generator.answer(result, job.arrived, job.request.ids, choice.stop_words)
        answered = FinishedRequest(job, result, text.decoded_prediction)
        self._metrics.count(answered)
        return answered


class _Gate:
    """Lets in who has the key and asks for this machine, and bodies that are not too large.

    It comes before anything that reads a body.

    Args:
        is_local: whether only this machine reaches the server.
        refuse: makes the response to a request that is not let in.
    """

    def __init__(
        self,
        app: ASGIApp,
        args: ServeArguments,
        is_local: bool,
        refuse: Callable[[Request, Exception], Awaitable[Response]],
    ) -> None:
        self._app, self._args, self._is_local, self._refuse = app, args, is_local, refuse
        # Bytes, as headers are: a key may have characters that are not ASCII, or no characters at all.
        self._authorization = None if args.key is None else b"Bearer " + os.fsencode(args.key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if (refused := self._refusal(scope)) is not None:
            response = await self._refuse(Request(scope), refused)
            await response(scope, receive, send)
            return
        length, most = 0, self._args.max_body

        async def counting() -> Message:
            nonlocal length
            message = await receive()
            length += len(message.get("body", b""))
            if length > most:
                raise HTTPException(413, f"the request has more than {most} bytes")
            return message

        await self._app(scope, counting, send)

    def _refusal(self, scope: Scope) -> APIError | None:
        """Why a request is not let in, or None.

        The path is the one that is routed. That of a request's URL, which is made of Host, may be another.
        """
        headers = dict(scope["headers"])
        # A page of another site can have its own name lead to this machine.
        if self._is_local and not self._is_named(headers.get(b"host", b"").decode("latin-1")):
            return APIError("Host: must be localhost or this machine's loopback address")
        if self._authorization is None or scope["path"] in _OPEN:
            return None
        if hmac.compare_digest(headers.get(b"authorization", b""), self._authorization):
            return None
        return APIError("Authorization: must be Bearer and the API key", 401, None, "invalid_api_key")

    def _is_named(self, host: str) -> bool:
        """Whether a header Host names this machine."""
        if (found := _HOST.fullmatch(host)) is None:
            return False
        name = found[1].removeprefix("[").removesuffix("]").lower()
        return name in ("localhost", self._args.host.lower()) or is_loopback(name)


class _Stream(StreamingResponse):
    """Server-sent events; when the client goes away, it listens to no more of them."""

    def __init__(self, first: str, rest: AsyncGenerator[str]) -> None:
        async def chunks() -> AsyncGenerator[str]:
            yield first
            async for chunk in rest:
                yield chunk

        super().__init__(chunks(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._rest):
            await super().__call__(scope, receive, send)


def is_loopback(address: str) -> bool:
    """Whether this is an IP address that only this machine itself reaches, such as 127.0.0.2 or ::1."""
    try:
        ip = ip_address(address)
    except ValueError:
        return False
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


async def _body(http: Request) -> bytes:
    """What a client sent as JSON.

    Raises:
        Refused: it is called something else, as pages of other sites have to, or the client is gone.
    """
    given = http.headers.get("content-type", "")
    if given.partition(";")[0].strip().lower() != "application/json":
        raise APIError(f"Content-Type {given[:60]!r}: must be application/json")
    try:
        return await http.body()
    except ClientDisconnect:
        raise _refused(ClientDisconnected("nobody waits for the answer")) from None


def _event(content: Any) -> str:
    return f"data: {json.dumps(content)}\n\n"


async def _answers(events: Events) -> list[FinishedRequest]:
    """All answers, in the order of the choices."""
    async with aclosing(events):
        answers = {index: what async for index, what in events if isinstance(what, FinishedRequest)}
    return [answers[index] for index in range(len(answers))]


async def _unless_gone(http: Request, work: Coroutine[Any, Any, T]) -> T:
    """What the work gives, which ends when the client goes away.

    Raises:
        Refused: it did.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(http.receive())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise _refused(ClientDisconnected("nobody waits for the answer"))
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


def _refused(error: Exception) -> APIError:
    """What a client is told of an error of the engine."""
    if isinstance(error, RequestEnded):
        return APIError(str(error), _STATUS[type(error)])
    if isinstance(error, ValueError):  # such as a prompt that is too long
        return APIError(str(error))
    if (why := reason(error, less="a shorter prompt or less max_tokens")) is None:
        _log.error("a request failed", exc_info=error)
    return APIError(why or "the server failed at this request", 500)
