"""Who may send requests, and how."""

import asyncio
import contextlib
import gzip
import threading
from concurrent.futures import ThreadPoolExecutor

import requests
from helpers import watch
from servers import CHAT, HELLO, Served, held, post, raw_request, refused, send, tiny_generator, until

from self_speculation.machine.devices import RESERVED_ADDRESSES
from self_speculation.models.families import context_length
from serving.answers import Answer
from serving.app import allowed_hosts, check_key
from serving.errors import APIError
from serving.protocol import CompletionRequest


def status(key=None, path="/v1/models", *authorization):
    """The status of a rejected request, or None."""
    try:
        check_key({"path": path, "headers": [(b"authorization", value) for value in authorization]}, key)
    except APIError as error:
        return error.status
    return None


def test_a_loopback_address_rejects_other_names(served):
    """A website can point a host name here. Guards against a check at 127.0.0.1 alone, and against a check
    that rejects the server's address.
    """
    allowed = ["localhost", "LOCALHOST:80", "127.0.0.1:8000", "[::1]", "[::1]:8000"]
    refused = ["elsewhere:8000", "10.0.0.1", "localhost.elsewhere", "127.0.0.1.elsewhere", "", "[::2]"]
    refused += ["127.0.0.1:8000/health?", "localhost:x", "localhost/", "a@localhost"]
    for names, status in ((allowed, 200), (refused, 400)):
        found = [requests.get(f"{served.url}/health", headers={"Host": name}) for name in names]
        assert {response.status_code for response in found} == {status}
    assert {"127.0.0.2", "mine"} <= {*allowed_hosts("127.0.0.2", "mine")}
    assert "[::1]" in allowed_hosts("::1", "")
    assert allowed_hosts("0.0.0.0", "mine") == ["*"]


def test_only_the_key_opens_a_server():
    """Guards against a check of the URL's path, which Starlette before 1.0.1 makes from the Host header,
    against non-ASCII characters, which HTTP decodes otherwise, and against two keys of which a proxy may
    check the other one.
    """
    assert status("sesame") == 401
    assert status("sesame", "/health") is None
    for key, expected in ((b"s\xc3\xa9same\xff", None), (b"s\xe9same\xff", 401), (b"", 401)):
        for scheme in (b"Bearer ", b"bearer ", b"BEARER  "):
            assert status("sésame\udcff", "/x", scheme + key) == expected
    assert status("sesame", "/x", b"Basic sesame") == 401
    for words in ((b"Bearer x", b"Bearer sesame"), (b"Bearer sesame", b""), (b"Bear", b"er sesame")):
        for key, path in (("sesame", "/x"), (None, "/x"), ("sesame", "/health")):
            assert status(key, path, *words) == 400


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
    assert len(long.headers["x-request-id"]) == 200
    for method, path, status, says in (
        ("POST", "/v1/answers", 404, "there is no such path; there are /, /health, "),
        ("POST", "/answers", 404, "there is no such path"),
        ("GET", "/v1/", 404, "there is no such path"),
        ("GET", "/v1/completions", 405, "the method must be POST"),
        ("DELETE", "/health", 405, "the method must be GET or HEAD"),
    ):
        found = requests.request(method, f"{served.url}{path}", json={})
        message = found.json()["error"]["message"]
        assert (found.status_code, message.startswith(f"{method} {path}: {says}")) == (status, True), message
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


def test_requests_are_refused_while_addresses_are_few(served, monkeypatch):
    """Guards against libraries in Rust that end the server where they get no memory for a request."""
    free = RESERVED_ADDRESSES / 2 + 128 * 1000
    monkeypatch.setattr("serving.app.free_addresses", lambda: free)
    body = b'{"prompt": "x", "max_tokens": 1}'
    for content, status in ((body.ljust(1000), 200), (body.ljust(1001), 503), (iter([body]), 503)):
        answer = send(served, content)
        assert answer.status_code == status
        assert answer.ok or (answer.headers["Retry-After"], "ulimit -v" in answer.text) == ("1", True)
    free = 0
    statuses = [requests.get(f"{served.url}/{path}").status_code for path in ("", "health", "metrics")]
    assert statuses == [503, 200, 200]


def test_a_compressed_body_is_named(served):
    """Guards against advice about JSON for a body that is JSON, in gzip."""
    body = b'{"prompt": "x", "max_tokens": 1}'
    for encoding, content, status in (("gzip", gzip.compress(body), 415), ("identity", body, 200)):
        response = send(served, content, **{"Content-Encoding": encoding})
        assert response.status_code == status
        assert response.ok or "Content-Encoding 'gzip': must be identity" in response.text


def test_a_request_that_waits_at_the_end_of_the_server(served):
    """Guards against a traceback and status 500: uvicorn cancels what reads the body."""

    async def receive():
        raise asyncio.CancelledError

    async def send(message):
        sent.append(message)

    sent = []
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/completions", "headers": headers, "state": {}}
    asyncio.run(served.app(scope, receive, send))
    assert sent[0]["status"] == 503


def test_limits_and_key(text_model, byte_tokenizer):
    """Guards against a body that is read before the key is checked, and against a body without a length."""
    with Served(tiny_generator(text_model, byte_tokenizer), api_key="sesame", max_body=1000) as served:
        assert len(served.client.completions.create(model="tiny", prompt="x", max_tokens=10).choices) == 1
        for path in ("v1/completions", "v1/models", "metrics"):
            response = requests.get(f"{served.url}/{path}", headers={"Authorization": "Bearer sesam"})
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
            assert response.headers["WWW-Authenticate"] == "Bearer"
        for path in ("health", "", "page.css", "page.js", "markdown-it.umd.min.js"):
            response = requests.get(f"{served.url}/{path}")
            policy = response.headers["Content-Security-Policy"]
            assert (response.status_code, policy[:20]) == (200, "default-src 'none'; ")
            assert "unsafe" not in policy
            assert response.headers["X-Content-Type-Options"] == "nosniff"
        for content in (b"x" * 2000, iter([b"x" * 600] * 4)):  # with a length, and in chunks
            response = send(served, content, Authorization="Bearer sesame")
            assert (response.status_code, "1000 bytes" in response.text) == (413, True)
        longest = b'{"prompt": "x", "max_tokens": 1}'.ljust(1000)
        assert send(served, longest, Authorization="Bearer sesame").status_code == 200


def test_a_long_request_blocks_no_other(served, monkeypatch):
    """It is validated, tokenized and prepared in another thread. Guards against work on the event loop."""
    threads = []
    generator = served.generator
    for owner, name in (
        (CompletionRequest, "model_validate_json"),
        (generator, "encode"),
        (generator, "tokenize"),
    ):
        watch(monkeypatch, owner, name, lambda *_, **__: threads.append(threading.current_thread().name))
    assert post(served, prompt="x").status_code == 200
    assert len(threads) >= 3
    assert all(name.startswith(("bodies_", "answers_")) for name in threads)  # names of workers


def test_what_cannot_fit_is_measured_only(served, monkeypatch):
    """Guards against seconds and gigabytes for a body whose prompt or tools no context can hold."""
    lengths = []
    rendered = watch(monkeypatch, served.generator.tokenizer, "apply_chat_template")
    encode = served.generator.tokenizer.encode
    monkeypatch.setattr(
        served.generator.tokenizer,
        "encode",
        lambda text, **how: (lengths.append(len(text)), encode(text, **how))[1],
    )
    monkeypatch.setattr("self_speculation.generator_base._longest_token", lambda *_: 100)
    context = context_length(served.generator.model.config)
    for size in (20 * context, 500 * context):
        message = refused(served, prompt="1 a" * (size // 3))
        assert f"maximum context length is {context} tokens" in message
    properties = {f"property_{i}": {"type": "string"} for i in range(20_000)}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": properties}}}
    assert f"more than the {8 * context} characters" in refused(served, CHAT, messages=HELLO, tools=[tool])
    assert max(lengths) <= 8 * context
    assert not rendered


def test_one_request_leaves_room_in_the_queue(text_model, byte_tokenizer):
    """Guards against a request of many prompts or choices that fills the queue, so that the next client gets
    status 429, a limit in the message that is not the one in effect, and answers as long as the context.
    """
    with Served(
        tiny_generator(text_model, byte_tokenizer), batch_size=2, max_waiting=4, max_answer_tokens=5
    ) as served:
        for fields, name in (({"prompt": ["x"] * 4}, "prompt 4"), ({"prompt": ["x"] * 2, "n": 2}, "n 2")):
            assert f"{name}: must be at most 3 answers" in refused(served, max_tokens=2, **fields)
        with ThreadPoolExecutor(2) as clients, held(served.engine) as at_rest:
            answers = [clients.submit(post, served, prompt="x", n=3, max_tokens=2) for _ in range(2)]
            assert at_rest.wait(60)
            until(lambda: served.num_jobs == 6)
            assert post(served, prompt="x", max_tokens=2).status_code == 429
        assert [each.result().status_code for each in answers] == [200, 200]
        assert "6: must be at most 5" in refused(served, prompt="x", max_tokens=6)
        assert post(served, prompt="x", max_tokens=5).status_code == 200


def test_bodies_wait_in_a_queue_that_is_bounded(text_model, byte_tokenizer, monkeypatch):
    """Guards against bodies that are parsed for clients that have left, and more at once than two."""
    go_on = threading.Event()
    began = []
    parse = Answer.parse
    monkeypatch.setattr(Answer, "parse", lambda *args: (began.append(args), go_on.wait(60), parse(*args))[2])
    request = {"prompt": "x", "max_tokens": 2}
    with (
        Served(tiny_generator(text_model, byte_tokenizer), batch_size=1, max_waiting=4) as served,
        contextlib.ExitStack() as gone,
        ThreadPoolExecutor(2) as clients,
    ):
        try:
            for n in range(7):
                gone.enter_context(raw_request(served.url, request))
                until(lambda n=n: len(began) == min(n + 1, 2))
            until(lambda: post(served, **request).status_code == 429)
            gone.close()
            until(lambda: 'status="499"} 7.0' in requests.get(f"{served.url}/metrics").text)
            answers = [clients.submit(post, served, **request) for _ in range(2)]
            until(lambda: all(each.running() for each in answers))
            assert len(began) == 2
        finally:
            go_on.set()
        assert [each.result().status_code for each in answers] == [200, 200]
    assert len(began) == 4
