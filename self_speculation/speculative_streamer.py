"""Streamers: print an answer while it is generated, as plain text or with its drafts on a terminal.

They get token ids and know nothing of models. A character of several tokens is shown with its last byte. Text
that may become a stop word is held back.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, takewhile
from operator import eq, itemgetter
from typing import NamedTuple, TextIO

from torch import Tensor
from transformers import PreTrainedTokenizerBase
from wcwidth import wcwidth

from self_speculation.decoding.texts import Detokenizer, Part, Splitter, StopWords, Thinking

_COLORS = {"draft": "\x1b[33m", "accepted": "\x1b[32m", "target": ""}
_DIM, _RESET = "\x1b[2m", "\x1b[0m"

# Characters that do more to a terminal than to move the cursor right or to the next line -> what is printed.
_PRINTED = {code: chr(0x2400 + code) for code in range(0x20)}  # pictures of control characters
_PRINTED |= dict.fromkeys(range(0x7F, 0xA0), "\ufffd") | {9: "    ", 10: "\n", 13: ""}

# Kinds of characters that stay together: a word (a), a wide one (w) or a space, each with its accents (z).
_WORDS = re.compile("a[az]*|[w ]z*|\n|z")


class Cell(NamedTuple):
    """One character."""

    char: str
    style: str  # a key of _COLORS
    is_thinking: bool = False


class StandardTextStreamer:
    """Prints committed text. On a terminal thinking is dim, and the edge divides no word; a file gets the
    answer alone.

    Args:
        tokenizer: the model's.
        stop_words: end the answer; no part of them is shown.
        file: standard output by default.
        end_with: printed after the answer.
        prompt: the ids before the answer; they tell how its first token reads.
        thinking: how outputs think.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_words: Iterable[str] | None = None,
        file: TextIO | None = None,
        end_with: str = "\n",
        prompt: Sequence[int] = (),
        thinking: Thinking | None = None,
    ) -> None:
        self._tokenizer, self._thinking = tokenizer, thinking
        self._stop_words = StopWords(tokenizer, stop_words or ())
        self._file = file or sys.stdout
        self._end_with = end_with
        self._on_terminal = self._file.isatty() and os.environ.get("TERM") != "dumb"
        self._is_colored = "NO_COLOR" not in os.environ
        self._begin(prompt)

    def _begin(self, prompt: Sequence[int] = ()) -> None:
        self._text = Detokenizer(self._tokenizer, prompt)
        self._splitter = Splitter(self._thinking)
        self._was_thinking = False  # in what was shown last
        self._screen = _Screen(self._file, self._is_colored)
        self._held: list[Cell] = []  # decided, but is a stop word or may become one
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
            self._begin(ids[0].tolist())
            return
        ids = list(map(int, ids))
        num_accepted = sum(takewhile(bool, map(eq, ids, self._verified)))
        for position, id_ in enumerate(ids):
            style = "accepted" if position < num_accepted else "target"
            self._held += _cells(self._splitter.add(self._text.add(id_), id_), style)
        self._drafts, self._verified = [], []
        self._flush()

    def end(self) -> None:
        """Show the text that is held back, end the line, and get ready for the next answer."""
        self._drafts = []
        self._held += _cells(self._splitter.add(self._text.rest(), finished=True), "target")
        self._flush(finished=True)
        self._file.write(self._end_with)
        self._file.flush()
        self._begin()

    def _flush(self, finished: bool = False) -> None:
        """Show what cannot become a stop word."""
        shown = self._visible(self._held, finished)
        self._held = self._held[len(shown) :]
        self._show(shown)

    def _visible(self, cells: list[Cell], finished: bool = False) -> list[Cell]:
        """Leave out stop words, the text after them and, unless finished, what may become one."""
        start = sum(cell.is_thinking for cell in cells)
        shown = self._stop_words.cut(_text(cells[start:]))
        return cells[: start + len(shown if finished else self._stop_words.settled(shown))]

    def _pending(self) -> list[Cell]:
        """The drafts to be shown, after decided text that is held back."""
        if not self._drafts:
            return []
        text = self._text.rest(self._drafts).rstrip("\ufffd")  # without an incomplete character
        return self._visible([*self._held, *_cells(self._splitter.preview(text), "draft")])

    def _show(self, cells: list[Cell]) -> None:
        """Print decided cells."""
        if self._on_terminal:
            self._screen.show(_printed(self._parted(cells)), _printed(self._pending()))
        else:
            self._file.write(_text(cell for cell in cells if not cell.is_thinking))
            self._file.flush()

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

    Args:
        non_blocking, skip_prompt: ignored; scripts for the paper's code base pass them.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_words: Iterable[str] | None = None,
        file: TextIO | None = None,
        end_with: str = "\n",
        prompt: Sequence[int] = (),
        non_blocking: bool = False,  # noqa: ARG002
        skip_prompt: bool = False,  # noqa: ARG002
        thinking: Thinking | None = None,
    ) -> None:
        super().__init__(tokenizer, stop_words, file, end_with, prompt, thinking)

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


def _width(cell: Cell) -> int:
    """Columns that it takes."""
    return max(0, wcwidth(cell.char))


def _kind(cell: Cell) -> str:
    """A letter of `_WORDS`."""
    if cell.char in " \n":
        return cell.char
    return "zaw"[_width(cell)]


class _Screen:
    """Decided text on a terminal, and drafts after it that can be replaced. A word that the edge would divide
    begins a line.

    To erase drafts, the cursor goes back to the last decided word and draws it again: a draft may move it or
    be an accent on it, and the cursor cannot be put after a character at the edge.
    """

    def __init__(self, file: TextIO, is_colored: bool) -> None:
        self._file, self._is_colored = file, is_colored
        self._column = 0  # of what can be drawn again
        self._kept: list[Cell] = []  # the last decided word; if it is longer than a line, its last character
        self._is_end = False  # it is such a character: its word has begun a line
        self._drawn: list[Cell] = []  # it and the drafts, with line breaks

    def show(self, decided: list[Cell], drafts: list[Cell]) -> None:
        """Append decided cells and replace the drafts."""
        width, height = shutil.get_terminal_size()
        cells, end = [*self._kept, *decided, *drafts], len(self._kept) + len(decided)
        while True:
            drawn, word, start = self._with_breaks(cells, end, width)
            positions = self._positions(drawn, width)
            if len(cells) == end or positions[-1][0] <= height - 2:
                break
            cells.pop()  # lost lines cannot be erased
        unchanged = len(self._drawn)
        if drawn[:unchanged] != self._drawn:
            unchanged, row = 0, self._positions(self._drawn, width)[-1][0]
            back = (f"\x1b[{row}A" if row else "") + (f"\x1b[{self._column}C" if self._column else "")
            self._file.write(f"\r{back}\x1b[J")
        for (style, is_thinking), run in groupby(drawn[unchanged:], key=itemgetter(1, 2)):
            self._file.write(self.colored(_text(run), style, is_thinking))
        self._file.flush()
        is_long = sum(map(_width, cells[word:end])) > width
        if is_long:
            last = max(i for i in range(word, end) if _width(cells[i]) and cells[i].char != " ")
            start += last - word + (drawn[start].char == "\n")
            word = last
        self._is_end = is_long or (self._is_end and word == 0)
        self._kept, self._drawn, self._column = cells[word:end], drawn[start:], positions[start][1]

    def _with_breaks(self, cells: list[Cell], end: int, width: int) -> tuple[list[Cell], int, int]:
        """Break lines before words and in place of spaces.

        Returns:
            The cells with line breaks. Of the last word that begins before `end`, its place in the given
            cells, and in the returned ones that from which it can be drawn again.
        """
        drawn: list[Cell] = []
        column, word, start = self._column, 0, 0
        for match in _WORDS.finditer("".join(map(_kind, cells))):
            begin, own = match.start(), cells[match.start() : match.end()]
            if match[0] == "\n" or (match[0][0] == " " and column == width):
                drawn += [own[0]._replace(char="\n"), *own[1:]]
                column = 0
                continue
            again, size = len(drawn), sum(map(_width, own))
            is_divided = match[0][0] == "a" and column + size > width
            if is_divided and column > 0 and not (self._is_end and begin == 0):
                drawn.append(own[0]._replace(char="\n"))
                again += column == width  # the cursor cannot be put there again
                column = 0
            drawn += own
            column = self._positions(own, width, column)[-1][1]
            if begin < end and match[0] != "z":
                word, start = begin, again
        return drawn, word, start

    def colored(self, text: str, style: str, is_thinking: bool = False) -> str:
        color = (_COLORS[style] + _DIM * is_thinking) if self._is_colored else ""
        return f"{color}{text}{_RESET}" if color else text

    def _positions(self, cells: list[Cell], width: int, column: int | None = None) -> list[tuple[int, int]]:
        """(row, column) of each cell, and of the cursor after the last; column `width` after a full line."""
        row, column = 0, self._column if column is None else column
        positions = []
        for cell in cells:
            advance = _width(cell)
            if column + advance > width:
                row, column = row + 1, 0
            positions.append((row, column))
            row, column = (row + 1, 0) if cell.char == "\n" else (row, column + advance)
        return [*positions, (row, column)]
