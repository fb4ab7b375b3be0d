"""HTTP/1.1 to the letter, where a proxy and a lenient server could disagree about where a request ends."""

from __future__ import annotations

import asyncio
import math
import re
import resource
import socket
import time
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

_BARE_LF = re.compile(rb"(?<!\r)\n")
_HEAD_SECONDS = 30  # until a connection without a whole head ends
BACKLOG = 50  # connections that asyncio accepts at once
_RESERVED = 50 + BACKLOG  # descriptors, also for files
_ROUND_TRIPS = (0.02, 0.2, 1, 5)  # seconds after which a closed socket may have refused


class StrictConnection(h11.Connection):
    """Refuses lines that end with LF alone, and requests with two lengths (RFC 9112, 2.2 and 6.1)."""

    def next_event(self) -> Any:
        before, _ = self.trailing_data
        event = super().next_event()
        # The lines of a head, or those after the last chunk of a body.
        if isinstance(event, h11.Request | h11.EndOfMessage):
            lines = before[: len(before) - len(self.trailing_data[0])]
            if _BARE_LF.search(lines):
                raise h11.RemoteProtocolError("a line ends with LF alone")
        if isinstance(event, h11.Request):
            names = {name for name, _ in event.headers}
            if {b"content-length", b"transfer-encoding"} <= names:
                raise h11.RemoteProtocolError("Content-Length and Transfer-Encoding")
        return event


def most_connections() -> float:
    """As many as leave descriptors for other things: without any, reading a file fails, and asyncio logs
    hundreds of errors a second.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return math.inf if soft == resource.RLIM_INFINITY else max(1, soft - _RESERVED)


class StrictProtocol(H11Protocol):
    """Answers what `StrictConnection` refuses with status 400, and closes the connection. Closes those that
    send no head, the oldest one as soon as there are too many.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = StrictConnection(h11.SERVER)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._since = time.perf_counter()
        self._timer = self.loop.call_later(_HEAD_SECONDS, self._end_if_idle, None)
        every = [each for each in self.connections if isinstance(each, StrictProtocol)]
        connections = [each for each in every if not each.transport.is_closing()]
        if len(connections) > most_connections():
            idle = [each for each in connections if each.is_idle]  # this one, too
            min(idle, key=lambda each: each._since).transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()  # it would keep this object
        super().connection_lost(exc)

    @property
    def is_idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def _end_if_idle(self, before: RequestResponseCycle | None) -> None:
        """End a connection that is idle, and whose last request is still that of the last check, `before`."""
        if self.cycle is before and self.is_idle:
            self.transport.close()
        else:
            self._timer = self.loop.call_later(_HEAD_SECONDS, self._end_if_idle, self.cycle)

    def eof_received(self) -> bool | None:  # type: ignore[override]
        """The client is gone, or sends no more and waits: an interim answer, which a closed socket refuses,
        tells. Clients of HTTP/1.0 do not know interim answers. True keeps the other direction open.
        """
        if self.is_idle or self.scope["http_version"] != "1.1":
            return None
        self.cycle.keep_alive = False
        if not self.cycle.response_started:
            self.transport.write(b"HTTP/1.1 102 Processing\r\n\r\n")
            for seconds in _ROUND_TRIPS:
                self.loop.call_later(seconds, self._end_if_refused)
        return True

    def _end_if_refused(self) -> None:
        connection = self.transport.get_extra_info("socket")
        is_open = not self.transport.is_closing()
        if is_open and connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
