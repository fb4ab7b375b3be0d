"""The programs that draw the pictures of the pages."""

import importlib.util

import pyte
from conftest import ROOT

spec = importlib.util.spec_from_file_location("record_streamer", ROOT / "docs" / "record_streamer.py")
record_streamer = importlib.util.module_from_spec(spec)
spec.loader.exec_module(record_streamer)


def test_lines_of_the_film_break_between_words():
    """Guards against words that the edge of a terminal cuts, and against a long word that never ends."""
    screen = pyte.Screen(40, 1)
    pyte.Stream(screen).feed("  one two three abcdefghijklm")
    cells = [screen.buffer[0][column] for column in range(40)]
    lines = ["".join(cell.data for cell in line) for line in record_streamer.wrapped(cells, 10)]
    assert lines == ["  one two", "three", "abcdefghij", "klm"]
    assert record_streamer.wrapped(cells[29:], 10) == [[]]
