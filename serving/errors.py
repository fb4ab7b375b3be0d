"""Errors as clients see them."""

from __future__ import annotations

import logging
import reprlib
from asyncio import CancelledError

from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from arguments import JSONObject
from runs.failures import reason
from self_speculation.text.grammar_sandbox import GrammarError
from serving.engine import QueueFull, RequestTimeout, ServerShutdown

_log = logging.getLogger(__name__)
_STATUS: dict[type[BaseException], int] = {
    QueueFull: 429,
    ClientDisconnect: 499,
    ServerShutdown: 503,
    CancelledError: 503,  # the server ends
    ChildProcessError: 503,  # the process that tries grammars
    RequestTimeout: 504,
}
_PATHS = """
    / /health /metrics /v1/models /v1/completions /v1/chat/completions /v1/responses /tokenize /detokenize
"""
# Messages of pydantic's kinds of errors.
_PROBLEMS = {
    "missing": "is required",
    "string_type": "must be a text",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "finite_number": "must be a finite number",
    "literal_error": "must be {expected}",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "too_short": "must not be empty",
    "too_long": "must have at most {max_length} items",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must match {pattern}",
    "json_invalid": "must be JSON: {error}",
    "json_type": "must be a text that is JSON",
}


class APIError(Exception):
    """An error as a client sees it; `param` is the field at fault."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    @classmethod
    def at(cls, param: str, value: object, problem: str) -> APIError:
        """The error of a field's value."""
        return cls(f"{param} {reprlib.repr(value):.60}: {problem}", param=param)

    @classmethod
    def of(cls, error: BaseException) -> APIError:
        """Turn any error into the one that the client gets."""
        if isinstance(error, APIError):
            return error
        if type(error) in _STATUS:
            return cls(str(error), _STATUS[type(error)])
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False)[0]
            message = _PROBLEMS.get(first["type"], first["msg"].removeprefix("Value error, "))
            problem = message.format(**first.get("ctx", {}))
            # A name in brackets is a mark of pydantic, such as the mark of a bad key.
            path = ".".join(name for name in map(str, first["loc"]) if "[" not in name)[:100]
            if path and first["type"] != "missing":
                return cls.at(path, first["input"], problem)
            return cls(f"{path or 'the body'}: {problem}", param=path or None)
        if isinstance(error, GrammarError):
            return cls(f"response_format, structured_outputs or tools: {error}")
        if isinstance(error, ValueError):  # the scheduler raises it for an invalid request
            return cls(str(error))
        if (why := reason(error, less="a shorter prompt or less max_tokens")) is None:
            _log.error("a request failed", exc_info=error)
        return cls(why or "the server failed at this request", 500)

    @property
    def body(self) -> JSONObject:
        """The JSON that a client gets."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def event(self) -> JSONObject:
        """The last event of a stream: `body`, and the fields that the Responses API has instead."""
        return {**self.body, "type": "error", "message": str(self), "param": self.param, "code": self.code}


def unrouted(error: HTTPException, method: str, path: str) -> APIError:
    """The error of a path or a method that the server does not have."""
    place = f"{method} {path[:100]}"
    allowed = (error.headers or {}).get("Allow")
    if error.status_code == 405 and allowed:
        return APIError(f"{place}: the method must be {' or '.join(sorted(allowed.split(', ')))}", 405)
    if error.status_code == 404:
        return APIError(f"{place}: there is no such path; there are {', '.join(_PATHS.split())}", 404)
    return APIError(f"{place}: {error.detail}", error.status_code)
