"""Who may send requests, the id of each request, and its body."""

from __future__ import annotations

import codecs
import hmac
import os
import re
import uuid
from collections.abc import Awaitable, Callable
from ipaddress import ip_address

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.flags import ServeArguments
from serving.protocol import APIError

_FILES = ("page.css", "page.js", "markdown-it.umd.min.js")
PAGE_FILES = {"/": "page.html"} | {f"/{name}": name for name in _FILES}
_PUBLIC_PATHS = (*PAGE_FILES, "/health")  # need no key
_HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(:\d*)?")  # a name or an address, and a port


class AccessMiddleware:
    """Checks the API key and, if only this machine can reach the server, the Host header. Answers errors, and
    adds x-request-id to each response.
    """

    def __init__(
        self,
        app: ASGIApp,
        args: ServeArguments,
        is_local: bool,
        on_error: Callable[[HTTPRequest, Exception], Awaitable[Response]],
    ) -> None:
        self._app, self._args, self._is_local, self._on_error = app, args, is_local, on_error
        # Headers are bytes; a key may hold non-ASCII characters or bytes that are no characters.
        self._key = None if args.key is None else os.fsencode(args.key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = Headers(scope=scope).get("x-request-id") or uuid.uuid4().hex
        has_begun = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            if has_begun:
                raise
            response = await self._on_error(HTTPRequest(scope), error)
            await response(scope, receive, send_with_id)

    def _check(self, scope: Scope) -> None:
        """Raises APIError if the request is rejected."""
        headers = dict(scope["headers"])
        # Another site can point its own name at this machine (DNS rebinding).
        if self._is_local and not self._names_this_machine(headers.get(b"host", b"").decode("latin-1")):
            raise APIError("Host: must be localhost or this machine's loopback address")
        # The router uses this path. Starlette makes that of `Request.url` from the Host header.
        if self._key is None or scope["path"] in _PUBLIC_PATHS:
            return
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._key):
            raise APIError("Authorization: must be Bearer and the API key", 401, code="invalid_api_key")

    def _names_this_machine(self, host: str) -> bool:
        if (match := _HOST.fullmatch(host)) is None:
            return False
        name = match[1].removeprefix("[").removesuffix("]").lower()
        return name in ("localhost", self._args.host.lower()) or is_loopback(name)


def is_loopback(address: str) -> bool:
    """Whether this is a loopback IP address, such as 127.0.0.2 or ::1."""
    try:
        ip = ip_address(address)
    except ValueError:
        return False
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


async def read_body(http: HTTPRequest, max_bytes: int) -> bytes:
    """Read a body of JSON. Pages of other sites cannot send this content type."""
    content_type = http.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != "application/json":
        raise APIError(f"Content-Type {content_type[:60]!r}: must be application/json")
    body = bytearray()
    async for part in http.stream():
        body += part
        if len(body) > max_bytes:
            raise APIError(f"the request has more than {max_bytes} bytes", 413)
    return bytes(body.removeprefix(codecs.BOM_UTF8))  # of some clients on Windows
