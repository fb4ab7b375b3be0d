"""What scripts say while they work."""

import sys
import threading

import forks
from conftest import ROOT
from helpers import custom_data

from runs import status


def test_bars_in_a_file_are_lines(model_folder, tmp_path):
    """Guards against one long line of carriage returns, and against a line for every example."""
    result = forks.run(
        ROOT / "benchmark.py", "--model", model_folder, "--output_dir", tmp_path, "--max_steps", "4",
        "--dataset", "custom_jsonl", "--data_path", custom_data(tmp_path),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "\r" not in result.stderr
    assert "\x1b" not in result.stderr
    bars = [line for line in result.stderr.splitlines() if line.startswith("examples:")]
    assert "| 0/12 [" in bars[0]
    assert "| 12/12 [" in bars[-1]
    assert "tokens/s" in bars[-1]


def test_slow_work_is_named_and_quick_work_is_not(capsys, monkeypatch):
    """Neither half waits for the clock: the one until it was said, the other is over at once."""
    monkeypatch.setattr(status, "_SILENCE", 0.0)
    said = threading.Event()
    write = sys.stderr.write
    monkeypatch.setattr(sys.stderr, "write", lambda text: (write(text), said.set()))
    with status.says_if_slow("thinking"):
        assert said.wait(forks.HANGS)
    assert capsys.readouterr().err == "thinking ...\n"
    monkeypatch.setattr(status, "_SILENCE", forks.HANGS)
    with status.says_if_slow("thinking"):
        pass
    assert capsys.readouterr().err == ""


def test_a_bar_is_for_terminals_and_for_work_that_lasts(capsys, monkeypatch):
    """Guards against silence while weights are packed, and against a flash of a bar for each small model."""

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
