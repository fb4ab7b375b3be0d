"""Sends answers and errors to clients."""

from __future__ import annotations

import logging
import reprlib
from collections.abc import AsyncGenerator, Sequence

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from runs.failures import reason
from serving.engine import Job, QueueFull, RequestAborted, RequestTimeout, ServerShutdown
from serving.protocol import APIError

_log = logging.getLogger(__name__)
_STATUS = {QueueFull: 429, ClientDisconnect: 499, ServerShutdown: 503, RequestTimeout: 504}


class AnswerResponse(StreamingResponse):
    """Begins with its first part, so that an error before has a status of its own. Its end cancels the jobs,
    also when the client disconnects.
    """

    def __init__(self, parts: AsyncGenerator[str], media_type: str, jobs: Sequence[Job]) -> None:
        super().__init__(parts, headers={"Cache-Control": "no-cache"}, media_type=media_type)
        self._parts, self._jobs, self._has_begun = parts, jobs, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for job in self._jobs:
                job.is_cancelled = True
        if not self._has_begun:
            raise ClientDisconnect("the client has disconnected")

    async def stream_response(self, send: Send) -> None:
        async for part in self._parts:
            body = part.encode()
            if not self._has_begun:
                if self.media_type == "application/json":  # in one part
                    self.headers["Content-Length"] = str(len(body))
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            self._has_begun = True
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def api_error(error: Exception) -> APIError:
    """Turn any error into the one that the client gets."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, HTTPException):
        return APIError(error.detail, error.status_code)
    if isinstance(error, RequestAborted | ClientDisconnect):
        return APIError(str(error), _STATUS[type(error)])
    if isinstance(error, ValidationError):
        return _validation_error(error)
    if isinstance(error, ValueError):  # the scheduler raises it for an invalid request
        return APIError(str(error))
    if (why := reason(error, less="a shorter prompt or less max_tokens")) is None:
        _log.error("a request failed", exc_info=error)
    return APIError(why or "the server failed at this request", 500)


def _validation_error(error: ValidationError) -> APIError:
    """Of pydantic's first error."""
    first = error.errors(include_url=False)[0]
    path = [part for part in first["loc"] if part != "[key]"]  # pydantic's mark of a bad key
    param = ".".join(map(str, path))[:100]
    value = "" if first["type"] in ("missing", "json_invalid") else f" {reprlib.repr(first['input']):.60}"
    message = first["msg"].removeprefix("Value error, ")
    return APIError(f"{param or 'the body'}{value}: {message}", param=param or None)
