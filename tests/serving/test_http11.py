"""Requests that a proxy before the server may read in another way, and connections without a whole one."""

import contextlib
import socket

import pytest
from servers import held, until

from serving.http11 import most_connections

CHUNKED = b"2\r\n{}\r\n0\r\n\r\n"
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BODY = b'{"prompt": "x", "max_tokens": 1}'
GOOD = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
SLOW = HEAD + b"Content-Length: 2000\r\n\r\n{"
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
    ("request_", "status"),
    [
        (HEAD + b"Content-Length: 12\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKED, 400),
        (HEAD + b"transfer-encoding: chunked\r\ncontent-length: 12\r\n\r\n" + CHUNKED, 400),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKED.replace(b"2", b"2;a\rb", 1), 400),
        (b"PRI * HTTP/2.0\r\n\r\n", 505),
    ],
)
def test_ambiguous_requests_are_refused_and_close(address, request_, status):
    """Also after a good one, in pieces. Guards against a second request that hides in the first one, or in
    what another program takes for the next line, and another version of HTTP.
    """
    assert statuses(address, request_, HEALTH) == [status]
    assert statuses(address, GOOD[:30], GOOD[30:] + request_ + HEALTH) == [200, status]


@pytest.mark.parametrize(
    ("target", "status"),
    [
        (b"http://localhost:80/health", 200),
        (b"http://localhost:80/health?x=/", 200),
        (b"HTTP://localhost?x", 200),
        (b"http://elsewhere/health", 400),
    ],
)
def test_a_target_may_name_its_host(address, target, status):
    """Guards against requests by a proxy that get status 404, and another site's name in one."""
    assert statuses(address, HEALTH.replace(b"/health", target)) == [status]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_may_close_its_side_after_a_whole_request(address, stream):
    """Guards against a half-closed connection that gets no answer."""
    body = BODY.replace(b"1}", b'9, "stream": true}' if stream else b"9}")
    request = GOOD.replace(b"Content-Length: %d" % len(BODY), b"Content-Length: %d" % len(body))
    request = request.replace(BODY, body)
    answer = b""
    with socket.create_connection(address, timeout=60) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        while part := connection.recv(65536):
            answer += part
    assert b"HTTP/1.1 200 OK" in answer
    assert (b"data: [DONE]" if stream else b'"finish_reason": ') in answer


def test_a_client_that_leaves_is_told_from_one_that_has_closed_its_side(address, served):
    """Guards against answers that nobody waits for, which keep their slots to the end."""
    body = BODY.replace(b"1}", b"200}")
    with held(served.engine, num_steps=1) as at_rest:
        with socket.create_connection(address, timeout=60) as connection:
            connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            assert at_rest.wait(60)
            [job] = served.engine.in_flight
        until(job.is_cancelled.is_set)
    until(lambda: not served.num_jobs)


def test_a_declared_length_is_refused_before_the_body(address):
    """Guards against a client that sends gigabytes and reads then that they are too many."""
    assert statuses(address, HEAD + b"Content-Length: 99999999\r\nExpect: 100-continue\r\n\r\n")[0] == 413


@pytest.mark.parametrize("num_bytes", [60_000, 70_000, 200_000, 5_000_000])
def test_long_headers_have_an_answer(address, num_bytes):
    """Guards against a limit that depends on how the network cuts a request, against status 400, and against
    a connection that is reset while the client sends, so that the answer is lost.
    """
    sent = HEALTH.replace(b"Connection", b"X-Long: " + b"x" * num_bytes + b"\r\nConnection")
    for pieces in ([sent], [sent[:100], sent[100:-2], sent[-2:]]):
        with socket.create_connection(address, timeout=60) as connection:
            for piece in pieces:
                connection.sendall(piece)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert answer.split()[1] == (b"431" if num_bytes > 65_536 else b"200")


@pytest.mark.parametrize("sent", [b"", HEAD, GOOD + HEAD, SLOW, GOOD + SLOW])
def test_a_connection_without_a_whole_request_ends(address, monkeypatch, sent):
    """Guards against idle connections and slow bodies that use up the server's descriptors."""
    monkeypatch.setattr("serving.http11._REQUEST_SECONDS", 0.3)
    assert statuses(address, sent) == [200] * sent.startswith(GOOD)


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
