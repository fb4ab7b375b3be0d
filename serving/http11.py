"""HTTP/1.1 to the letter, where a proxy and a lenient server could disagree about where a request ends."""

from __future__ import annotations

import re
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

_BARE_LF = re.compile(rb"(?<!\r)\n")


class StrictConnection(h11.Connection):
    """Refuses heads whose lines end with LF alone, and requests with two lengths (RFC 9112, 2.2 and 6.1)."""

    def next_event(self) -> Any:
        if self.their_state is h11.IDLE:
            head, *_ = self.trailing_data[0].partition(b"\r\n\r\n")
            if _BARE_LF.search(head):
                raise h11.RemoteProtocolError("a line of the head ends with LF alone")
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
