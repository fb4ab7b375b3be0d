"""Who may send requests, and how."""

import asyncio
import threading
from types import SimpleNamespace

import openai
import pytest
import requests
from helpers import watch
from servers import Served, post, send, tiny_generator

from serving.app import _read_body, allowed_hosts, check_host, check_key
from serving.engine import ServerShutdown
from serving.errors import APIError
from serving.flags import ServeArguments
from serving.protocol import CompletionRequest


def status(key=None, path="/v1/models", *authorization):
    """The status of a rejected request, or None."""
    try:
        check_key({"path": path, "headers": [(b"authorization", value) for value in authorization]}, key)
    except APIError as error:
        return error.status
    return None


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2", "::1"])
def test_a_loopback_address_rejects_other_names(address):
    """Another site can point its name here. Guards against a check at 127.0.0.1 alone, and against a check
    that rejects the server's own address.
    """

    def refused(address, name, host=""):
        try:
            check_host({"headers": [(b"host", name.encode())]}, allowed_hosts(address, host))
        except APIError as error:
            return error.status == 400
        return False

    shown = f"[{address}]" if ":" in address else address
    own = ["localhost", "LOCALHOST:80", "127.0.0.1:8000", "[::1]", "[::1]:8000", shown, f"{shown}:1"]
    others = ["elsewhere:8000", "10.0.0.1", "localhost.elsewhere", "127.0.0.1.elsewhere", "", "[::2]"]
    others += ["127.0.0.1:8000/health?", "localhost:x", "localhost/", "a@localhost"]
    assert {refused(address, name) for name in own} == {False}
    assert {refused(address, name) for name in others} == {True}
    assert not refused(address, "mine:8000", "mine")
    assert {refused("0.0.0.0", name) for name in others} == {False}


def test_only_the_key_opens_a_server(monkeypatch):
    """Guards against a check of the URL's path, which Starlette before 1.0.1 makes from the Host header,
    against non-ASCII characters, which HTTP decodes otherwise, against two keys of which a proxy may check
    the other one, and against a key of the environment that is not asked for.
    """
    assert status("sesame") == 401
    assert status("sesame", "/health") is None
    for key, expected in ((b"s\xc3\xa9same\xff", None), (b"s\xe9same\xff", 401), (b"", 401)):
        for scheme in (b"Bearer ", b"bearer ", b"BEARER  "):
            assert status("sésame\udcff", "/x", scheme + key) == expected
    assert status("sesame", "/x", b"Basic sesame") == 401
    assert status("sesame", "/x", b"Bearer x", b"Bearer sesame") == 400
    monkeypatch.setenv("SELF_SPECULATION_API_KEY", "sesame")
    assert ServeArguments().key == "sesame"


def test_headers_and_methods_that_clients_expect(served, monkeypatch):
    """Guards against health checks by HEAD that fail, errors that cannot be traced, ids that fill a log, a
    wrong path without advice, and requests that forms on pages of other sites can send to this machine.
    """
    for path in ("/", "/health"):
        assert requests.head(served.url + path).status_code == 200
    assert requests.get(f"{served.url}/v1/completions").headers["Allow"] == "POST"
    ids = {requests.get(f"{served.url}/health").headers["x-request-id"] for _ in range(2)}
    assert len(ids) == 2
    long = requests.get(f"{served.url}/health", headers={"X-Request-Id": "x" * 60_000})
    assert len(long.headers["x-request-id"]) == 32
    foreign = requests.get(f"{served.url}/health", headers={"Host": "elsewhere"})
    assert (foreign.status_code, foreign.json()["error"]["message"][:16]) == (400, "Host 'elsewhere'")
    missing = requests.post(f"{served.url}/v1/responses", json={}).json()["error"]["message"]
    assert "for /v1/responses too, /v1/chat/completions" in missing
    monkeypatch.setattr("serving.app.generate_latest", lambda _: 1 / 0)
    named = {"X-Request-Id": "mine", "Origin": "http://elsewhere"}
    for path, status, kind in (("v1/x", 404, "invalid_request_error"), ("metrics", 500, "server_error")):
        failed = requests.get(f"{served.url}/{path}", headers=named)
        assert (failed.status_code, failed.headers["x-request-id"]) == (status, "mine")
        assert failed.json()["error"]["type"] == kind
        assert "access-control-allow-origin" not in failed.headers
    for content_type in ("text/plain", "application/x-www-form-urlencoded"):
        response = send(served, b'{"prompt": "x"}', **{"Content-Type": content_type})
        assert (response.status_code, "application/json" in response.text) == (400, True)


def test_a_body_that_has_not_come_at_the_end_of_the_server():
    """Guards against a traceback and status 500: uvicorn cancels what reads the body."""

    async def stream():
        yield b"{"
        raise asyncio.CancelledError

    http = SimpleNamespace(headers={"content-type": "application/json"}, stream=stream)
    with pytest.raises(ServerShutdown):
        asyncio.run(_read_body(http, 100))


def test_limits_and_key(text_model, byte_tokenizer):
    """Guards against a body that is read before the key is checked, and against a body without a length."""
    args = {"api_key": "sesame", "max_body": 1000, "max_tokens": 10}
    with Served(tiny_generator(text_model, byte_tokenizer), **args) as served:
        assert len(served.client.completions.create(model="tiny", prompt="x", max_tokens=10).choices) == 1
        for path in ("v1/completions", "v1/models", "metrics"):
            response = requests.get(f"{served.url}/{path}", headers={"Authorization": "Bearer sesam"})
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
            assert response.headers["WWW-Authenticate"] == "Bearer"
        for path in ("health", "", "page.css", "page.js", "markdown-it.umd.min.js"):
            response = requests.get(f"{served.url}/{path}")
            assert response.status_code == 200
            policy = response.headers.get("Content-Security-Policy", "")
            assert policy.startswith("default-src 'none'; ") == (path != "health")
            assert "unsafe" not in policy
            assert (response.headers.get("X-Content-Type-Options") == "nosniff") == (path != "health")
        with pytest.raises(openai.BadRequestError, match="max_tokens 11: must be at most 10"):
            served.client.completions.create(model="tiny", prompt="x", max_tokens=11)
        for content in (b"x" * 2000, iter([b"x" * 600] * 4)):  # with a length, and in chunks
            response = send(served, content, Authorization="Bearer sesame")
            assert (response.status_code, "1000 bytes" in response.text) == (413, True)
        longest = b'{"prompt": "x", "max_tokens": 1}'.ljust(1000)
        assert send(served, longest, Authorization="Bearer sesame").status_code == 200


def test_a_long_request_blocks_no_other(served, monkeypatch):
    """It is validated, tokenized and prepared in another thread. Guards against work on the event loop."""
    threads, own = [], served.generator
    for owner, name in ((CompletionRequest, "model_validate_json"), (own, "encode"), (own, "tokenize")):
        watch(monkeypatch, owner, name, lambda *_, **__: threads.append(threading.current_thread().name))
    assert post(served, prompt="x").status_code == 200
    assert len(threads) >= 3
    assert all(name.startswith("asyncio_") for name in threads)  # asyncio's name of a worker
