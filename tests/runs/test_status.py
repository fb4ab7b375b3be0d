"""Progress bars and lines."""

import sys
from types import SimpleNamespace

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


def test_others_are_told_of_once_and_not_in_the_middle_of_an_answer(capsys):
    """Guards against a slow program that says nothing, one that says it again and again, and a line in a
    text that grows on the same terminal.
    """
    notice = status.FewerThreads()
    governor = SimpleNamespace(others=1.26, num_processors=2, num_threads=1, most=2)
    with status.status_held(True):
        notice(governor)
        notice(governor)
        assert capsys.readouterr().err == ""
    said = "other programs use 1.3 of 2 processors: decoding is slower, with 1 of 2 threads while they do\n"
    assert capsys.readouterr().err == said
    with status.status_held(False):
        status.FewerThreads()(governor)
        assert capsys.readouterr().err == said
