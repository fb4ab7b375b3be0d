"""Who may send requests, without a server."""

import pytest

from serving.access import AccessMiddleware, is_loopback
from serving.flags import ServeArguments
from serving.protocol import APIError


def status(address, key=None, path="/v1/models", **headers):
    """The status of a rejected request, or None."""
    args = ServeArguments(host=address, api_key=key)
    access = AccessMiddleware(None, args, is_loopback(address), None)
    try:
        access._check({"path": path, "headers": [(k.encode(), v) for k, v in headers.items()]})
    except APIError as error:
        return error.status
    return None


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2", "::1"])
def test_a_loopback_address_rejects_other_names(address):
    """Another site can point its name here. Guards against a check at 127.0.0.1 alone, and against a check
    that rejects the server's own address.
    """
    own = ["localhost", "LOCALHOST:80", "127.0.0.1:8000", "127.9.9.9", "[::1]", "[::1]:8000"]
    others = ["elsewhere:8000", "10.0.0.1", "localhost.elsewhere", "127.0.0.1.elsewhere", "", "[::2]"]
    others += ["127.0.0.1:8000/health?", "localhost:x", "localhost/", "a@localhost"]
    assert {status(address, host=name.encode()) for name in own} == {None}
    assert {status(address, host=name.encode()) for name in others} == {400}
    assert {status("0.0.0.0", host=name.encode()) for name in others} == {None}


def test_only_the_key_opens_a_server(monkeypatch):
    """Guards against a check of the URL's path, which Starlette before 1.0.1 makes from the Host header,
    against non-ASCII characters, which HTTP decodes otherwise, and against a key of the environment that is
    not asked for.
    """
    for host in (b"127.0.0.1:8000/health?", b"localhost/health#", b"127.0.0.1/?", b"x/health?"):
        assert status("0.0.0.0", "sesame", host=host) == 401
    assert status("0.0.0.0", "sesame", "/health", host=b"x") is None
    for key, expected in ((b"s\xc3\xa9same\xff", None), (b"s\xe9same\xff", 401), (b"", 401)):
        for scheme in (b"Bearer ", b"bearer ", b"BEARER  "):
            assert status("0.0.0.0", "sésame\udcff", authorization=scheme + key) == expected
    assert status("0.0.0.0", "sesame", authorization=b"Basic sesame") == 401
    monkeypatch.setenv("SELF_SPECULATION_API_KEY", "sesame")
    assert (status("0.0.0.0"), status("0.0.0.0", authorization=b"Bearer sesame")) == (401, None)
