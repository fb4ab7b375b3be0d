"""Who may send requests, the id of each request, and its body."""

from __future__ import annotations

import codecs
import hmac
import os
import uuid
from collections.abc import Awaitable, Callable
from ipaddress import ip_address

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.protocol import APIError

_FILES = ("page.css", "page.js", "markdown-it.umd.min.js")
PAGE_FILES = {"/": "page.html"} | {f"/{name}": name for name in _FILES}
_PUBLIC_PATHS = (*PAGE_FILES, "/health")  # need no key
_LONGEST_ID = 200  # characters of a client's x-request-id


class AccessMiddleware:
    """Checks the API key, answers errors, and adds x-request-id to each response."""

    def __init__(
        self,
        app: ASGIApp,
        key: str | None,
        on_error: Callable[[HTTPRequest, Exception], Awaitable[Response]],
    ) -> None:
        self._app, self._on_error = app, on_error
        # Headers are bytes; a key may hold non-ASCII characters or bytes that are no characters.
        self._key = None if key is None else os.fsencode(key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = Headers(scope=scope).get("x-request-id", "")
        if not 0 < len(request_id) <= _LONGEST_ID:
            request_id = uuid.uuid4().hex
        scope.setdefault("state", {})["id"] = request_id
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
        """Raises APIError if the request lacks the key."""
        # The router uses this path. Starlette makes that of `Request.url` from the Host header.
        if self._key is None or scope["path"] in _PUBLIC_PATHS:
            return
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) > 1:
            raise APIError(f"Authorization: must be one header, not {len(given)}")
        scheme, _, key = b"".join(given).partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._key):
            raise APIError("Authorization: must be Bearer and the API key", 401, code="invalid_api_key")


def host_check(address: str, host: str) -> list[Middleware]:
    """The check of the Host header at an address that only this machine reaches: another site can point its
    own name at it (DNS rebinding). `host` is another name that is allowed.
    """
    try:
        is_local = ip_address(address).is_loopback
    except ValueError:
        is_local = False
    own = [name for each in (address, host) for name in (each, f"[{each}]")]
    allowed = ["localhost", "127.0.0.1", "[::1]", *own]
    check = Middleware(TrustedHostMiddleware, allowed_hosts=allowed, www_redirect=False)
    return [check] if is_local else []


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
