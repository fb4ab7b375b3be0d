"""The HTTP server: who may send requests, paths, errors, and the way of a request to an answer."""

import asyncio
import codecs
import hmac
import math
import os
import time
import uuid
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from threading import Barrier
from typing import TypeVar

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount, Route, Router
from starlette.staticfiles import StaticFiles
from starlette.types import Message, Receive, Scope, Send

from self_speculation.machine.devices import RESERVED_ADDRESSES, free_addresses
from self_speculation.models.families import context_length
from serving.answers import Answer, AnswerResponse, RequestKind, ServedModel
from serving.engine import QueueFull
from serving.errors import APIError, unrouted
from serving.metrics import Metrics, Origin
from serving.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    server_sent,
)  # fmt: skip
from serving.responses import ResponsesRequest

_PAGE = Path(__file__).with_name("page")
_PUBLIC_PATHS = {"/", "/health", *(f"/{file.name}" for file in _PAGE.iterdir())}  # need no key
_ALL_HEADERS = {
    "Content-Security-Policy": (  # the page loads nothing from elsewhere, whatever a model writes
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
}
_HEADERS = {
    401: {"WWW-Authenticate": "Bearer"},
    429: {"Retry-After": "1"},
    503: {"Retry-After": "1"},
}
_LONGEST_ID = 200  # characters that the server keeps of a client's x-request-id
_BYTES_PER_BYTE = 128  # memory that two bodies take while they are parsed, per byte of one

Result = TypeVar("Result")


class App:
    """The server of one model at an address."""

    def __init__(self, served: ServedModel, address: str) -> None:
        args = served.args
        model = served.generator.model
        self._served = served
        self._engine = served.engine
        self._key = args.api_key
        self._metrics = Metrics(served.engine, served.name, args.log_requests)
        self._parsing = FairQueue("bodies", served.engine.max_jobs)
        self._compiling = FairQueue("grammars", served.engine.max_jobs)
        self._submitting = FairQueue("answers", served.engine.max_jobs, 1)
        served.engine.on_end = self._metrics.count
        served.engine.on_round = self._metrics.count_round
        served.generator.use_sandbox()
        self._model_entry = {
            "id": served.name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "self-speculation",
            "max_model_len": context_length(model.config),
        }
        api = [
            Route("/models", self._models),
            Route("/models/{name:path}", self._model),
            Route("/chat/completions", partial(self._respond, ChatRequest), methods=["POST"]),
            Route("/completions", partial(self._respond, CompletionRequest), methods=["POST"]),
            Route("/responses", partial(self._respond, ResponsesRequest), methods=["POST"]),
            Route("/tokenize", partial(self._convert, TokenizeRequest), methods=["POST"]),
            Route("/detokenize", partial(self._convert, DetokenizeRequest), methods=["POST"]),
        ]
        routes = [
            Route("/health", self._health),
            Route("/metrics", self._exposition),
            Mount("/v1", routes=api),
            *api,
            Mount("/", StaticFiles(directory=_PAGE, html=True)),
        ]
        self._router = TrustedHostMiddleware(Router(routes), allowed_hosts(address, args.host), False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the key, answer errors, and add headers to each response."""
        if scope["type"] != "http":
            await self._router(scope, receive, send)
            return
        http = HTTPRequest(scope)
        has_begun = False
        request_id = http.headers.get("x-request-id", "")[:_LONGEST_ID] or uuid.uuid4().hex
        http.state.origin = Origin(http.method, http.scope["path"], request_id)

        async def send_with_headers(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                MutableHeaders(scope=message).update({**_ALL_HEADERS, "x-request-id": request_id})
            await send(message)

        scope["app"] = self  # with an app, the router raises errors
        try:
            check_key(scope, self._key)
            _check_memory(http, self._served.args.max_body)
            await self._router(scope, receive, send_with_headers)
        except (Exception, asyncio.CancelledError) as exception:  # at shutdown, uvicorn cancels late requests
            headers = getattr(exception, "headers", None)
            if isinstance(exception, HTTPException):
                if isinstance(scope.get("endpoint"), StaticFiles) and scope["path"] not in _PUBLIC_PATHS:
                    exception = HTTPException(404)  # whatever the method is
                exception = unrouted(exception, http.method, scope["path"])
            error = self._metrics.count_error(exception, http.state.origin)
            exception.with_traceback(None)  # frames keep the body until Python looks for cycles
            if has_begun:  # the error is the last event of the stream
                await send({"type": "http.response.body", "body": server_sent(error.event).encode()})
                return
            headers = headers or _HEADERS.get(error.status)
            await JSONResponse(error.body, error.status, headers)(scope, receive, send_with_headers)

    async def _health(self, _: HTTPRequest) -> Response:
        if self._engine.accepts_jobs:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "shutting down"}, 503)

    async def _exposition(self, _: HTTPRequest) -> Response:
        return Response(generate_latest(self._metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def _models(self, _: HTTPRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_entry]})

    async def _model(self, http: HTTPRequest) -> Response:
        self._served.check_name(http.path_params["name"])
        return JSONResponse(self._model_entry)

    async def _convert(self, kind: type[TokenizeRequest | DetokenizeRequest], http: HTTPRequest) -> Response:
        """Convert text to token ids, or back."""
        answer = Answer(self._served, http.state.origin)
        ignored = set[str]()
        content = await self._parse(http, lambda body: answer.convert(kind, body, ignored))
        self._metrics.name_ignored(ignored)
        return JSONResponse(content)

    async def _respond(self, kind: RequestKind, http: HTTPRequest) -> Response:
        answer = Answer(self._served, http.state.origin)
        self._metrics.name_ignored(await self._parse(http, partial(answer.parse, kind)))
        return AnswerResponse(answer, partial(self._submit, _address(http)))

    async def _parse(self, http: HTTPRequest, work: Callable[[bytes], Result]) -> Result:
        """Run work on the body when the client has a turn. A client that leaves before loses the turn."""
        body = await _read_body(http, self._served.args.max_body)
        parsing = asyncio.create_task(self._parsing.run(_address(http), partial(work, body)))
        leaving = asyncio.create_task(_disconnect(http))
        try:
            await asyncio.wait({parsing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not parsing.done():
                raise ClientDisconnect("the client has disconnected")
            return parsing.result()
        finally:
            leaving.cancel()
            parsing.cancel()

    async def _submit(self, client: str, answer: Answer) -> None:
        queue = self._compiling if answer.is_guided else self._submitting
        await queue.run(client, answer.submit)


class FairQueue:
    """Runs work of requests in a few threads. While all threads are busy, work waits, and clients take turns.
    Beyond the limit, the client with the most work in the queue loses the newest piece, so no client fills
    the queue for all. The threads skip cancelled work.

    Args:
        what: the kind of work, in the plural, for messages.
        max_waiting: most pieces of work that wait.
    """

    def __init__(self, what: str, max_waiting: int, num_threads: int = 2) -> None:
        self._what = what
        self._max_waiting = max_waiting
        self._threads = ThreadPoolExecutor(num_threads, what)
        # Later there may be no memory for threads. A thread that works starts no other one, so all wait.
        begun = Barrier(num_threads)
        try:
            for _ in range(num_threads):
                self._threads.submit(begun.wait)
        except RuntimeError:
            begun.abort()  # else the process waits for threads that have begun
            raise
        self._num_free = num_threads
        # Client -> a future for each piece of work; the next client comes first.
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    async def run(self, client: str, work: Callable[[], Result]) -> Result:
        """Do the work in a thread and return the result. Raises QueueFull."""
        loop = asyncio.get_running_loop()

        def pass_on(_: Future[Result]) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._pass_on)

        if self._num_free:
            self._num_free -= 1
        else:
            await self._turn(client)
        # The work runs to the end, also when the client has left.
        running = self._threads.submit(work)
        running.add_done_callback(pass_on)
        return await asyncio.wrap_future(running)

    async def _turn(self, client: str) -> None:
        """Wait until a thread is free."""
        alive = {
            name: deque(turn for turn in turns if not turn.done()) for name, turns in self._waiting.items()
        }
        self._waiting = {name: turns for name, turns in alive.items() if turns}
        numbers = {client: 0, **{name: len(turns) for name, turns in self._waiting.items()}}
        if (number := sum(numbers.values())) >= self._max_waiting:
            full = QueueFull(f"{number} {self._what} wait already: try again later")
            busiest = max(numbers, key=lambda name: numbers[name])
            if numbers[busiest] <= numbers[client] + 1:
                raise full
            self._waiting[busiest][-1].set_exception(full)
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            # The turn has come, and the client is gone: another client gets the thread.
            if not turn.cancelled() and turn.exception() is None:
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        """Give the thread that has become free to the next client."""
        while self._waiting:
            client, turns = next(iter(self._waiting.items()))
            del self._waiting[client]
            turn = turns.popleft()
            if turns:
                self._waiting[client] = turns  # the last in the order
            if not turn.done():
                turn.set_result(None)
                return
        self._num_free += 1


def check_key(scope: Scope, key: str | None) -> None:
    """Raises APIError if the request lacks the API key, or has two: a proxy may check the other one."""
    given = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(given) > 1:
        raise APIError("Authorization: must be one header, not several")
    # The router uses this path. `Request.url` has another one, made from the Host header.
    if key is None or scope["path"] in _PUBLIC_PATHS:
        return
    scheme, _, word = b"".join(given).partition(b" ")
    # Headers are bytes. A key may hold bytes that are no characters.
    if scheme.lower() != b"bearer" or not hmac.compare_digest(word.strip(), os.fsencode(key)):
        raise APIError("Authorization: must be Bearer and the API key", 401, code="invalid_api_key")


def _check_memory(http: HTTPRequest, max_body: int) -> None:
    """Raises APIError if the request may take more addresses than there are. Without memory, libraries that
    parse and tokenize end the process.
    """
    if http.scope["path"] in ("/health", "/metrics") or (free := free_addresses()) == math.inf:
        return
    size = max_body if "transfer-encoding" in http.headers else int(http.headers.get("content-length", 0))
    if RESERVED_ADDRESSES / 2 + _BYTES_PER_BYTE * min(size, max_body) > free:
        raise APIError("the server is short of memory (ulimit -v): send less, or try again later", 503)


def allowed_hosts(address: str, host: str) -> list[str]:
    """Return the host names that a request may have: any, unless only this machine reaches the address. A
    website can point a host name at this machine (DNS rebinding).
    """
    if not ip_address(address).is_loopback:
        return ["*"]
    given = [name for each in filter(None, (address, host)) for name in (each, f"[{each}]")]
    return ["localhost", "127.0.0.1", "[::1]", *given]


def _address(http: HTTPRequest) -> str:
    """The client's address."""
    return http.client.host if http.client else ""


async def _disconnect(http: HTTPRequest) -> None:
    """Wait until the client disconnects. The body has ended."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _read_body(http: HTTPRequest, max_bytes: int) -> bytes:
    """Read a body of JSON. A page of another website cannot send this content type."""
    content_type = http.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise APIError(f"Content-Type {content_type[:60]!r}: must be application/json")
    encoding = http.headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise APIError(f"Content-Encoding {encoding[:60]!r}: must be identity, a body is not compressed", 415)
    too_long = APIError(f"the request has more than {max_bytes} bytes", 413)
    if int(http.headers.get("content-length", 0)) > max_bytes:
        raise too_long
    body = bytearray()
    async for chunk in http.stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_long
    return bytes(body.removeprefix(codecs.BOM_UTF8))  # clients on Windows may send it
