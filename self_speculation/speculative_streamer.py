"""Streamers: print an answer while it is generated, as plain text or with drafts on a terminal.

They draw what an `OutputReader` reads; the generator has one for each request. A character of several
tokens is shown with the last byte. Text that may become a stop word is held back.
"""

import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from itertools import chain, groupby, takewhile
from operator import eq, itemgetter
from typing import NamedTuple, TextIO

from torch import Tensor
from transformers import PreTrainedTokenizerBase
from wcwidth import wcwidth

from self_speculation.text.texts import OutputReader, Part

_COLORS = {"draft": "\x1b[33m", "accepted": "\x1b[32m", "target": ""}
_DIM = "\x1b[2m"
_RESET = "\x1b[0m"

# Characters that do more to a terminal than to move the cursor right or to the next line -> what is printed.
_PRINTED = {code: chr(0x2400 + code) for code in range(0x20)}  # pictures of control characters
_PRINTED |= dict.fromkeys(range(0x7F, 0xA0), "\ufffd") | {9: "    ", 10: "\n", 13: ""}


class Cell(NamedTuple):
    """One character."""

    char: str
    style: str  # a key of _COLORS
    is_thinking: bool = False


class StandardTextStreamer:
    """Prints committed text. On a terminal thinking is dim; a file gets the answer alone.

    Args:
        tokenizer: the model's, for answers that no generator reads.
        file: standard output by default.
        end_with: printed after the answer.
        non_blocking, skip_prompt: ignored; scripts for the paper's code base pass them.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        file: TextIO | None = None,
        end_with: str = "\n",
        non_blocking: bool = False,  # noqa: ARG002
        skip_prompt: bool = False,  # noqa: ARG002
    ) -> None:
        self._tokenizer = tokenizer
        self._file = file or sys.stdout
        self._end_with = end_with
        self._on_terminal = self._file.isatty() and os.environ.get("TERM") != "dumb"
        self.begin(OutputReader(tokenizer))

    def begin(self, reader: OutputReader) -> None:
        """Begin an answer, whose ids `reader` turns into text."""
        self._reader = reader
        self._ids = list[int]()
        self._was_thinking = False  # in what was shown last
        self._screen = _Screen(self._file)
        self._held: list[Cell] = []  # decided, but is a stop word or may become one
        self._num_shown = 0  # characters of the answer
        self._drafts: list[int] = []
        self._verified: list[int] = []  # deleted drafts; the next decided ids are compared with them

    def put(self, ids: Iterable[int]) -> None:
        """Show decided tokens. A prompt, [1, P], is not shown: `generate` of transformers puts it first.

        Raises:
            ValueError: there are prompts of several rows.
        """
        if isinstance(ids, Tensor) and ids.ndim == 2:
            if len(ids) != 1:
                raise ValueError(f"a streamer shows one answer, not {len(ids)} at once")
            self.begin(OutputReader(self._tokenizer, prompt=ids[0].tolist()))
            return
        ids = [*map(int, ids)]
        before = len(self._ids)
        num_accepted = sum(takewhile(bool, map(eq, ids, self._verified)))
        self._ids += ids
        self._reader.read(self._ids)
        for position, parts in enumerate(self._reader.parts[before : len(self._ids)]):
            self._held += _cells(parts, "accepted" if position < num_accepted else "target")
        self._drafts = []
        self._verified = []
        self._flush()

    def end(self) -> None:
        """Show the text that is held back, end the line, and get ready for the next answer."""
        self._drafts = []
        self._held += _cells(self._reader.end(self._ids), "target")
        self._flush()
        self._file.write(self._end_with)
        self._file.flush()
        self.begin(OutputReader(self._tokenizer))

    def _flush(self) -> None:
        """Show decided text that cannot become a stop word."""
        shown = self._visible([])
        self._held = self._held[len(shown) :]
        self._num_shown += sum(not cell.is_thinking for cell in shown)
        self._show(shown)

    def _show(self, cells: list[Cell]) -> None:
        """Show decided cells, and on a terminal the drafts after them. The server overrides this."""
        if self._on_terminal:
            self._screen.show(_printed(self._parted(cells)), _printed(self._pending()))
        else:
            self._file.write(_text(cell for cell in cells if not cell.is_thinking))
            self._file.flush()

    def _pending(self) -> list[Cell]:
        """The drafts to be shown, after decided text that is held back."""
        if not self._drafts:
            return []
        return self._visible(_cells(self._reader.preview(self._drafts), "draft"))

    def _visible(self, drafts: list[Cell]) -> list[Cell]:
        """The text that is held back and drafts after it, without stop words, the text after them and, until
        the end, what may become one.
        """
        cells = [*self._held, *drafts]
        num_thinking = sum(cell.is_thinking for cell in cells)
        more = _text(cell for cell in drafts if not cell.is_thinking)
        return cells[: num_thinking + self._reader.num_settled(more) - self._num_shown]

    def _parted(self, cells: list[Cell]) -> Iterator[Cell]:
        """Decided cells, with an empty line between thinking and answer."""
        for cell in cells:
            if self._was_thinking and not cell.is_thinking:
                yield from _cells([("\n\n", True)], "target")
            self._was_thinking = cell.is_thinking
            yield cell


class SpeculativeTextStreamer(StandardTextStreamer):
    """Shows drafts before they are verified.

    On a terminal drafted tokens are yellow. Accepted ones turn green, rejected ones vanish, and the full
    model's own tokens have the terminal's colour. A file gets decided text only. The environment variable
    `NO_COLOR` turns colours off.
    """

    def put(self, ids: Iterable[int], is_draft: bool = False) -> None:
        """Show decided tokens, or drafted ones after them."""
        if is_draft:
            self._drafts += map(int, ids)
            self._flush()
        else:
            super().put(ids)

    def delete(self, num_tokens: int, is_draft: bool = False) -> None:
        """Delete the last drafted tokens. The next `put` erases them, so accepted ones do not flicker.

        Raises:
            ValueError: more tokens than there are drafted ones, or decided tokens.
        """
        number = len(self._drafts)
        if not is_draft or not 0 <= num_tokens <= number:
            raise ValueError(f"cannot delete {num_tokens} tokens: only drafted ones, and there are {number}")
        self._verified = self._drafts[number - num_tokens :]
        del self._drafts[number - num_tokens :]

    @property
    def legend(self) -> str:
        """What the colours mean; empty if drafts are not shown."""
        if not self._on_terminal:
            return ""
        names = {"draft": "drafted", "accepted": "accepted", "target": "the full model's own"}
        return " ".join(self._screen.colored(name, style) for style, name in names.items())


def _cells(parts: Iterable[Part], style: str) -> list[Cell]:
    return [Cell(char, style, is_thinking) for text, is_thinking in parts for char in text]


def _text(cells: Iterable[Cell]) -> str:
    return "".join(cell.char for cell in cells)


def _printed(cells: Iterable[Cell]) -> list[Cell]:
    return [cell._replace(char=char) for cell in cells for char in cell.char.translate(_PRINTED)]


class _Screen:
    """Decided text on a terminal, and drafts after it that can be replaced.

    To erase drafts, the cursor goes back to the row in which the decided text ends, and draws this row again:
    a draft may be an accent on the last character.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._is_colored = "NO_COLOR" not in os.environ
        self._kept: list[Cell] = []  # decided text from the start of a row on
        self._drawn: list[Cell] = []  # it and the drafts, as printed
        self._num_below = 0  # rows below the first one of `_drawn`

    def show(self, decided: list[Cell], drafts: list[Cell]) -> None:
        """Append decided cells and replace the drafts."""
        width, height = shutil.get_terminal_size()
        cells = [*self._kept, *decided]
        rows = kept = _rows(cells, width)
        # An accent at the start of a row may change the row above.
        last = max((i for i, row in enumerate(kept) if row and wcwidth(row[0].char)), default=0)
        while drafts and len(rows := _rows([*cells, *drafts], width)) - last >= height:
            drafts = drafts[:-1]  # lost rows cannot be erased
            rows = kept
        drawn = _drawn(rows, width)
        unchanged = len(self._drawn)
        if drawn[:unchanged] != self._drawn:
            unchanged = 0
            up = f"\x1b[{self._num_below}A" if self._num_below else ""
            self._file.write(f"\r{up}\x1b[J")
        for (style, is_thinking), run in groupby(drawn[unchanged:], key=itemgetter(1, 2)):
            self._file.write(self.colored(_text(run), style, is_thinking))
        self._file.flush()
        self._kept = [*chain(*kept[last:])]
        self._drawn = _drawn(rows[last:], width)
        self._num_below = len(rows) - 1 - last

    def colored(self, text: str, style: str, is_thinking: bool = False) -> str:
        color = (_COLORS[style] + _DIM * is_thinking) if self._is_colored else ""
        return f"{color}{text}{_RESET}" if color else text


def _rows(cells: list[Cell], width: int) -> list[list[Cell]]:
    """Rows of a terminal. One begins after a line break, and with a word that would pass the edge; a word
    that is longer than a row breaks there. Spaces stay in the row before, even beyond the edge.
    """
    rows = [list[Cell]()]
    column = 0
    for cell in cells:
        size = _width(cell)
        if size and column and column + size > width and cell.char != " ":
            word = _last_word(rows[-1]) if size == 1 else []
            if column == sum(map(_width, word)):  # it fills the row
                word = []
            del rows[-1][len(rows[-1]) - len(word) :]
            rows.append(word)
            column = sum(map(_width, word))
        rows[-1].append(cell)
        column += size
        if cell.char == "\n":
            rows.append([])
            column = 0
    return rows


def _last_word(row: list[Cell]) -> list[Cell]:
    """The cells after the last one that a row may end with: a space, or a wide character with accents."""
    start = len(row)
    while start and row[start - 1].char != " " and _width(row[start - 1]) < 2:
        start -= 1
    while start < len(row) and _width(row[start]) == 0:
        start += 1
    return row[start:]


def _drawn(rows: list[list[Cell]], width: int) -> list[Cell]:
    """The cells to print so that a terminal shows rows: it goes on in the next row after the last column."""
    drawn = []
    for row in rows:
        room = width
        for cell in row:
            room -= _width(cell)
            if room >= 0 or cell.char == "\n":
                drawn.append(cell)
        if row is not rows[-1] and row[-1].char != "\n":
            drawn += [Cell(" ", "target")] * room
    return drawn


def _width(cell: Cell) -> int:
    """Columns of a cell."""
    return max(0, wcwidth(cell.char))
