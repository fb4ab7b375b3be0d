"""Progress bars."""

import sys

import forks

from runs import status


def test_bars_are_for_terminals_and_long_work(capsys, monkeypatch):
    """Guards against a flash of a bar for small models, and control characters in a log file."""

    def shown(seconds, on_terminal):
        monkeypatch.setattr(status, "_SECONDS_WITHOUT_BAR", seconds)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: on_terminal)
        with status.work_bar("packing weights", 5_000_000, "B") as advance:
            for _ in range(5):
                advance(1_000_000)
        return capsys.readouterr().err

    assert "packing weights:   0%|" in shown(0.0, on_terminal=True)
    assert shown(forks.HANGS, on_terminal=True) == ""
    assert shown(0.0, on_terminal=False) == ""
