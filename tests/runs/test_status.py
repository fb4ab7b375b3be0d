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
