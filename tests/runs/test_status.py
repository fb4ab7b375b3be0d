"""Lines about slow work, as text and as objects."""

import json
import logging
import warnings

import pytest

from runs import status


@pytest.fixture
def as_json(monkeypatch):
    monkeypatch.setattr(status, "_is_json", False)
    root = logging.getLogger()
    handlers = root.handlers[:]
    level = root.level
    status.log_as_json()
    yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.usefixtures("as_json")
def test_every_line_is_an_object(capsys):
    """Guards against tracebacks and warnings of several lines among them, and characters that end a line."""
    status.print_status("\nserving x\u2028", port=80)
    try:
        raise ValueError("wrong")
    except ValueError:
        logging.getLogger("serving.engine").exception("a step failed")
    warnings.warn("mind", stacklevel=1)
    served, failed, warned = map(json.loads, capsys.readouterr().err.split("\n")[:-1])
    assert (served["message"], served["port"]) == ("serving x", 80)
    assert (failed["message"], failed["level"]) == ("a step failed", "error")
    assert failed["traceback"].endswith("ValueError: wrong\n")
    assert "mind" in warned["message"]


class _Unprintable:
    def __str__(self):
        raise RuntimeError("no text")


@pytest.mark.usefixtures("as_json")
@pytest.mark.parametrize(
    ("call", "error"),
    [
        (("%d tokens", "five"), "TypeError"),
        (("%s and %s", 1), "TypeError"),
        ((_Unprintable(),), "RuntimeError: no text"),
    ],
)
def test_a_mistaken_log_call_raises_nothing(capsys, monkeypatch, call, error):
    """Python's handlers print a traceback. Guards against a request that fails because of a line about it."""
    root = logging.getLogger()
    ours = [handler for handler in root.handlers if type(handler) is status._JSONHandler]
    monkeypatch.setattr(root, "handlers", ours)  # pytest's raises
    logging.getLogger("serving.engine").error(*call)
    line = json.loads(capsys.readouterr().err)
    assert line["message"].startswith("a mistaken log call at ")
    assert "test_status.py" in line["message"]
    assert error in line["traceback"]
