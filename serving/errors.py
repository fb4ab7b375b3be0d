"""Errors as clients see them."""

from __future__ import annotations

import logging
import reprlib
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from runs.failures import reason
from serving.engine import ClientDisconnected, QueueFull, RequestTimeout, ServerShutdown

_log = logging.getLogger(__name__)
_STATUS = {QueueFull: 429, ClientDisconnect: 499, ClientDisconnected: 499}
_STATUS |= {ServerShutdown: 503, ChildProcessError: 503, RequestTimeout: 504}  # the child tries grammars
_PATHS = "/, /health, /metrics, /v1/models, /v1/completions and, for /v1/responses too, /v1/chat/completions"


class APIError(Exception):
    """An error as a client sees it; `param` is the field at fault."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    @classmethod
    def of(cls, error: Exception) -> APIError:
        """Turn any error into the one that the client gets."""
        if isinstance(error, APIError):
            return error
        if isinstance(error, HTTPException):
            is_lost = error.status_code == 404
            return cls(
                f"no such path: this server has {_PATHS}" if is_lost else error.detail, error.status_code
            )
        if type(error) in _STATUS:
            return cls(str(error), _STATUS[type(error)])
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False)[0]
            path = [part for part in first["loc"] if part != "[key]"]  # pydantic's mark of a bad key
            param = ".".join(map(str, path))[:100] or None
            is_shown = first["type"] not in ("missing", "json_invalid")
            value = f" {reprlib.repr(first['input']):.60}" if is_shown else ""
            return cls(
                f"{param or 'the body'}{value}: {first['msg'].removeprefix('Value error, ')}", param=param
            )
        if isinstance(error, ValueError):  # the scheduler raises it for an invalid request
            return cls(str(error))
        if (why := reason(error, less="a shorter prompt or less max_tokens")) is None:
            _log.error("a request failed", exc_info=error)
        return cls(why or "the server failed at this request", 500)

    @property
    def body(self) -> dict[str, Any]:
        """The JSON that a client gets."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
