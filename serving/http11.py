"""HTTP/1.1 to the letter, where a proxy and a lenient server could disagree about where a request ends."""

import asyncio
import re
import resource
import sys
import time
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

_BARE_LF = re.compile(rb"(?<!\r)\n")
_ABSOLUTE = re.compile(rb"https?://([^/?]*)(.*)", re.IGNORECASE)  # a target with its host
_HEAD_SECONDS = 30  # until a connection without a whole head ends
_RESERVED = 32  # descriptors for other things


class StrictConnection(h11.Connection):
    """Refuses lines that end with LF alone, requests with two lengths, and other versions than 1; takes
    targets with a host (RFC 9112: 2.2, 6.1, 2.3, 3.2.2).
    """

    refused_with = 400

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
            if not event.http_version.startswith(b"1."):
                self.refused_with = 505
                raise h11.RemoteProtocolError("not HTTP/1")
            if found := _ABSOLUTE.fullmatch(event.target):
                headers = [(b"host", found[1]), *(pair for pair in event.headers if pair[0] != b"host")]
                target = found[2] if found[2].startswith(b"/") else b"/" + found[2]
                version = event.http_version
                return h11.Request(method=event.method, target=target, headers=headers, http_version=version)
        return event


def most_connections() -> tuple[int, int]:
    """In all, and of those how many asyncio may accept at once. They leave descriptors for other things:
    without any, reading a file fails, and asyncio logs hundreds of errors a second.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = sys.maxsize if soft == resource.RLIM_INFINITY else max(2, soft - _RESERVED)
    at_once = min(50, room // 2)
    return room - at_once, at_once


class StrictProtocol(H11Protocol):
    """Answers what `StrictConnection` refuses with status 400 or 505, and closes the connection. Closes those
    that send no whole request, the oldest one as soon as there are too many.
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
        if len(connections) > most_connections()[0]:
            unfinished = [
                each for each in connections if each.is_idle or each.cycle.more_body
            ]  # this one, too
            min(unfinished, key=lambda each: each._since).transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()  # it would keep this object
        super().connection_lost(exc)

    @property
    def is_idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def send_400_response(self, msg: str) -> None:
        assert isinstance(self.conn, StrictConnection)
        if self.conn.refused_with == 400:
            super().send_400_response(msg)
        else:
            self.transport.write(b"HTTP/1.1 505 HTTP Version Not Supported\r\nConnection: close\r\n\r\n")
            self.transport.close()

    def _end_if_idle(self, before: RequestResponseCycle | None) -> None:
        """End a connection that is idle, and whose last request is still that of the last check, `before`."""
        if self.cycle is before and self.is_idle:
            self.transport.close()
        else:
            self._timer = self.loop.call_later(_HEAD_SECONDS, self._end_if_idle, self.cycle)
