"""HTTP/1.1 to the letter, where a proxy and a lenient server could disagree about where a request ends."""

from __future__ import annotations

import re
from typing import Any

import h11
from h11._receivebuffer import ReceiveBuffer
from uvicorn.protocols.http.h11_impl import H11Protocol

_BARE_LF = re.compile(rb"(?<!\r)\n")


class _StrictLines(ReceiveBuffer):
    """The lines of a head, and those after the last chunk of a body, do not end with LF alone."""

    def maybe_extract_lines(self) -> list[bytearray] | None:
        before = bytes(self)
        lines = super().maybe_extract_lines()
        if lines is not None and _BARE_LF.search(before, 0, len(before) - len(self)):
            raise h11.RemoteProtocolError("a line ends with LF alone")
        return lines


class StrictConnection(h11.Connection):
    """Refuses lines that end with LF alone, and requests with two lengths (RFC 9112, 2.2 and 6.1)."""

    def __init__(self, our_role: type[h11.SERVER]) -> None:
        super().__init__(our_role)
        self._receive_buffer = _StrictLines()

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            names = {name for name, _ in event.headers}
            if {b"content-length", b"transfer-encoding"} <= names:
                raise h11.RemoteProtocolError("Content-Length and Transfer-Encoding")
        return event


class StrictProtocol(H11Protocol):
    """Answers what `StrictConnection` refuses with status 400, and closes the connection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = StrictConnection(h11.SERVER)
