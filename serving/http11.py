"""HTTP/1.1 where uvicorn is lenient: what a request may be, and how many connections may wait."""

import asyncio
import re
import resource

import h11
from h11 import _readers
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

# h11 takes any character but a line feed in a chunk's extension. A carriage return ends a line elsewhere.
_readers.chunk_header_re = re.compile(
    rb"(?P<chunk_size>[0-9A-Fa-f]{1,20})(?P<chunk_ext>;[\t\x20-\x7e\x80-\xff]*)?[ \t]*\r\n"
)
_TOO_LONG = b"431 Request Header Fields Too Large"
_ABSOLUTE = re.compile(rb"https?://([^/?]*)(.*)", re.IGNORECASE)  # a target with a host
_REQUEST_SECONDS = 60  # a connection may wait this long for a complete request
_PROBE_SECONDS = 0.5  # between interim responses to a client that sends no more
_DRAIN_SECONDS = 2  # in which a refused client may read why
_MAX_HEAD = 65_536  # bytes of names and values of headers
_RESERVED = 32  # descriptors for files and pipes


class StrictConnection(h11.Connection):
    """Refuses requests with two lengths, long headers, and other versions than 1; takes targets with a host
    (RFC 9112: 6.1, 2.3, 3.2.2; RFC 6585: 5).
    """

    refused_with = b"400 Bad Request"

    def next_event(self) -> h11.Event | type[h11.NEED_DATA | h11.PAUSED]:
        try:
            event = super().next_event()
        except h11.RemoteProtocolError as error:
            if error.error_status_hint == 431:
                self.refused_with = _TOO_LONG
            raise
        if not isinstance(event, h11.Request):
            return event
        if sum(len(name) + len(value) for name, value in event.headers) > _MAX_HEAD:
            self.refused_with = _TOO_LONG
            raise h11.RemoteProtocolError("headers of more bytes than h11 waits for")
        if {b"content-length", b"transfer-encoding"} <= {name for name, _ in event.headers}:
            raise h11.RemoteProtocolError("Content-Length and Transfer-Encoding")
        if not event.http_version.startswith(b"1."):
            self.refused_with = b"505 HTTP Version Not Supported"
            raise h11.RemoteProtocolError("not HTTP/1")
        if not (found := _ABSOLUTE.fullmatch(event.target)):
            return event
        headers = [(b"host", found[1]), *(pair for pair in event.headers if pair[0] != b"host")]
        target = found[2] if found[2].startswith(b"/") else b"/" + found[2]
        version = event.http_version
        return h11.Request(method=event.method, target=target, headers=headers, http_version=version)


def most_connections() -> tuple[int, int]:
    """Return the most connections, and how many more asyncio may accept at once. The limit leaves descriptors
    for files: without a free one, reading a file fails, and asyncio logs hundreds of errors a second.
    """
    room = max(2, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _RESERVED)
    at_once = min(50, room // 2)
    return room - at_once, at_once


class StrictProtocol(H11Protocol):
    """Closes connections that send no complete request, the oldest one as soon as there are too many."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.conn = StrictConnection(h11.SERVER, _MAX_HEAD)
        self._is_refused = False
        self._since = self.loop.time()
        self._timer = self.loop.call_later(_REQUEST_SECONDS, self._end_if_unfinished, None)
        every = [each for each in self.connections if isinstance(each, StrictProtocol)]
        connections = [each for each in every if not each.transport.is_closing()]
        if len(connections) > most_connections()[0]:
            unfinished = [each for each in connections if each.is_unfinished]
            min(unfinished, key=lambda each: each._since).transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._timer.cancel()  # the timer refers to this object
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._is_refused:
            super().data_received(data)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Answer a client that sends no more after a complete request. Returns whether the connection stays.
        Before an answer begins, HTTP/1.0 has no way to find out whether the client is there.
        """
        if self.is_unfinished or not (self.cycle.response_started or self.scope["http_version"] == "1.1"):
            return False
        self.cycle.keep_alive = False
        self._probe()
        return True

    def _probe(self) -> None:
        """Send interim responses until the answer begins. A client ignores them. The machine of a client that
        is gone resets the connection, so the second response fails.
        """
        if not (self.cycle.response_started or self.transport.is_closing()):
            interim = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
            self.transport.write(self.conn.send(interim) or b"")
            self.loop.call_later(_PROBE_SECONDS, self._probe)

    @property
    def is_unfinished(self) -> bool:
        """Whether the client has sent no complete request since the last answer."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002
        """Refuse the connection, and read on: closing with unread bytes makes the client's machine drop the
        answer.
        """
        assert isinstance(self.conn, StrictConnection)
        self.transport.write(b"HTTP/1.1 %s\r\nConnection: close\r\n\r\n" % self.conn.refused_with)
        self.transport.write_eof()
        self._is_refused = True
        self.loop.call_later(_DRAIN_SECONDS, self.transport.close)

    def _end_if_unfinished(self, before: RequestResponseCycle | None) -> None:
        """Close the connection if `before`, the unfinished request of the last check, is unfinished still."""
        if self.is_unfinished and self.cycle is before:
            self.transport.close()
        else:
            self._timer = self.loop.call_later(_REQUEST_SECONDS, self._end_if_unfinished, self.cycle)
