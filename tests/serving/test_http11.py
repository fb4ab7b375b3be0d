"""Requests that a proxy before the server may read in another way."""

import contextlib
import socket
import time

import pytest

from serving.http11 import most_connections

CHUNKED = b"2\r\n{}\r\n0\r\n\r\n"
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BODY = b'{"prompt": "x", "max_tokens": 1}'
GOOD = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


@pytest.fixture(scope="module")
def address(served):
    return "127.0.0.1", int(served.url.rpartition(":")[2])


def statuses(address, *parts):
    """Those of all answers until the server closes the connection."""
    answers = b""
    with socket.create_connection(address, timeout=60) as connection:
        for part in parts:
            connection.sendall(part)
        with contextlib.suppress(ConnectionResetError):  # it was closed with bytes that nobody read
            while part := connection.recv(65536):
                answers += part
    return [int(answer.split()[0]) for answer in answers.split(b"HTTP/1.1 ")[1:]]


@pytest.mark.parametrize(
    "refused",
    [
        HEAD + b"Content-Length: 12\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKED,
        HEAD + b"transfer-encoding: chunked\r\ncontent-length: 12\r\n\r\n" + CHUNKED,
        b"GET /health HTTP/1.1\nHost: localhost\n\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\nX: y\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKED[:-2] + b"\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKED[:-2] + b"X: y\n\n",
        b"PRI * HTTP/2.0\r\n\r\n",
    ],
)
def test_ambiguous_requests_are_refused_and_close(address, refused):
    """Also after a good one. Guards against a second request that hides in the first one, and another version
    of HTTP.
    """
    status = 505 if b"HTTP/2" in refused else 400
    assert statuses(address, refused, HEALTH) == [status]
    assert statuses(address, GOOD + refused + HEALTH) == [200, status]


def test_a_target_may_name_its_host(address):
    """Guards against requests by a proxy that get status 404, and another site's name in one."""
    for host, status in ((b"localhost:80", 200), (b"elsewhere", 400)):
        target = b"http://" + host
        for path in (b"/health", b"/health?x=/") if status == 200 else (b"/health",):
            assert statuses(address, HEALTH.replace(b"/health", target + path)) == [status]
    assert statuses(address, HEALTH.replace(b"/health", b"HTTP://localhost?x")) == [200]


def test_requests_in_pieces_and_in_a_row(address):
    """Guards against a good request that is refused: line ends in two packets, LF in a body."""
    body = BODY.replace(b" ", b"\n")
    request = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    assert statuses(address, request[:30], request[30:], GOOD, HEALTH) == [200, 200, 200]
    at = request.index(b"\r\n") + 1
    assert statuses(address, request[:at], request[at:] + HEALTH) == [200, 200]


@pytest.mark.parametrize("sent", [b"", HEAD, GOOD + HEAD])
def test_a_connection_without_a_whole_head_ends(address, monkeypatch, sent):
    """Guards against idle connections that use up the server's descriptors."""
    monkeypatch.setattr("serving.http11._HEAD_SECONDS", 0.5)
    with socket.create_connection(address, timeout=60) as connection:
        connection.sendall(sent)
        while connection.recv(65536):
            pass


SLOW = HEAD + b"Content-Length: 2000\r\n\r\n{"


@pytest.mark.parametrize("sent", [b"", SLOW])
def test_unfinished_requests_leave_room_for_others(address, monkeypatch, sent):
    """Guards against clients that are refused, and files that cannot be read, because somebody has opened as
    many connections as the process may have descriptors.
    """
    monkeypatch.setattr("serving.http11.most_connections", lambda: (3, 1))
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection(address, timeout=60)) for _ in range(5)]
        for each in idle:
            with contextlib.suppress(ConnectionError):  # it is closed already
                each.sendall(sent)
        assert statuses(address, HEALTH) == [200]
        for each in idle[:3]:
            with contextlib.suppress(ConnectionResetError):
                assert each.recv(1) == b""


def test_connections_leave_descriptors_for_other_things(monkeypatch):
    """Guards against hundreds of errors a second where few descriptors are allowed."""
    for allowed in (64, 256, 1024):
        monkeypatch.setattr("resource.getrlimit", lambda _, allowed=allowed: (allowed, allowed))
        most, at_once = most_connections()
        assert most + at_once <= allowed - 32
        assert min(most, at_once) >= 12


def test_a_body_that_does_not_come(address, monkeypatch):
    """Guards against a connection that lasts for ever by a byte now and then."""
    monkeypatch.setattr("serving.app._BODY_SECONDS", 0.3)
    assert statuses(address, SLOW) == [408]
    with socket.create_connection(address, timeout=60) as connection:

        def send_slowly():
            connection.sendall(SLOW)
            for _ in range(999):
                connection.sendall(b" ")
                time.sleep(0.05)

        with pytest.raises(ConnectionError):
            send_slowly()
