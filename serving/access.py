"""Who may send requests."""

from __future__ import annotations

import hmac
import os
import re
from collections.abc import Awaitable, Callable
from ipaddress import ip_address

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.flags import ServeArguments
from serving.protocol import APIError

_PUBLIC_PATHS = ("/", "/health")  # need no key
_HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(:\d*)?")  # a name or an address, and a port


class AccessMiddleware:
    """Checks the Host header and the API key.

    Args:
        is_local: only this machine can reach the server.
        on_error: makes the response to a rejected request.
    """

    def __init__(
        self,
        app: ASGIApp,
        args: ServeArguments,
        is_local: bool,
        on_error: Callable[[Request, Exception], Awaitable[Response]],
    ) -> None:
        self._app, self._args, self._is_local, self._on_error = app, args, is_local, on_error
        # Headers are bytes; a key may hold non-ASCII characters or bytes that are no characters.
        self._authorization = None if args.key is None else b"Bearer " + os.fsencode(args.key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http" and (error := self._check(scope)) is not None:
            app = await self._on_error(Request(scope), error)
        await app(scope, receive, send)

    def _check(self, scope: Scope) -> APIError | None:
        headers = dict(scope["headers"])
        # Another site can point its own name at this machine (DNS rebinding).
        if self._is_local and not self._names_this_machine(headers.get(b"host", b"").decode("latin-1")):
            return APIError("Host: must be localhost or this machine's loopback address")
        # The router uses this path. Starlette makes that of `Request.url` from the Host header.
        if self._authorization is None or scope["path"] in _PUBLIC_PATHS:
            return None
        if hmac.compare_digest(headers.get(b"authorization", b""), self._authorization):
            return None
        return APIError("Authorization: must be Bearer and the API key", 401, code="invalid_api_key")

    def _names_this_machine(self, host: str) -> bool:
        if (match := _HOST.fullmatch(host)) is None:
            return False
        name = match[1].removeprefix("[").removesuffix("]").lower()
        return name in ("localhost", self._args.host.lower()) or is_loopback(name)


def is_loopback(address: str) -> bool:
    """Return whether this is a loopback IP address, such as 127.0.0.2 or ::1."""
    try:
        ip = ip_address(address)
    except ValueError:
        return False
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback
