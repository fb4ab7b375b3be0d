"""Shows an answer while it is written: as plain text, or with its drafts, acceptances and erasures on a
terminal.

Knows nothing of models. A streamer is told token ids; it turns them into text that is right at every moment:
characters that are spread over tokens wait for their last byte, and text that may yet become a stop word
waits until it can't.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from transformers import PreTrainedTokenizerBase
from wcwidth import wcwidth

from self_speculation.decoding.stopping import StopWords, continuation, decode

Cell = tuple[str, str]  # one character and its style

_COLORS = {"draft": "\x1b[33m", "accepted": "\x1b[32m", "target": "", "": ""}
_RESET = "\x1b[0m"
_CONTEXT = 8  # tokens with text that are decoded before a new one, so that it reads as it does there
_RECENT = 64  # decided tokens kept besides those a stop word could need; older ones are never touched again


@dataclass(frozen=True)
class _Token:
    id: int
    text: str  # the characters that this token completes; may be none, or several
    style: str = ""


class StandardTextStreamer:
    """Prints text as it is decided, and nothing that is not part of the answer.

    Args:
        tokenizer: the model's.
        stop_words: the words that end the answer; they are never shown, not even in part.
        file: where to print; standard output by default.
        end_with: printed after the answer.
        prompt: the ids that the answer follows; they tell how its first token reads.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_words: Iterable[str] | None = None,
        file: TextIO | None = None,
        end_with: str = "\n",
        prompt: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._stop_words = StopWords(tokenizer, stop_words or ())
        self._file = file or sys.stdout
        self._end_with = end_with
        self._recent = _RECENT + max((len(word) for word in self._stop_words.words), default=0)
        self._on_terminal = self._file.isatty() and os.environ.get("TERM") != "dumb"
        self._before = list(prompt)  # ids before those in `_decided`, as far as they matter
        self._decided: list[_Token] = []
        self._printed = 0  # characters of the text of `_decided`

    def put(self, ids: Iterable[int]) -> None:
        """Show decided tokens. A prompt, which `generate` of transformers puts first, as [1, P], is kept as
        what the answer follows, and not shown.
        """
        if self._is_prompt(ids):
            return
        self._append(self._decided, ids, "target")
        self._show(self._visible(self._decided, finished=False))

    def end(self) -> None:
        """Show what was held back, end the line, and be ready for the next answer."""
        done, waiting = self._context(self._decided)
        if incomplete := continuation(self._tokenizer, done, waiting):
            self._decided.append(_Token(-1, incomplete, "target"))
        self._show(self._visible(self._decided, finished=True))
        self._file.write(self._end_with)
        self._file.flush()
        self._before, self._decided, self._printed = [], [], 0

    def _is_prompt(self, ids: Any) -> bool:
        """Whether these are [1, P] ids of a prompt; keeps them.

        Raises:
            ValueError: there are several rows.
        """
        if getattr(ids, "ndim", 1) != 2:
            return False
        if len(ids) != 1:
            raise ValueError(f"a streamer shows one answer, not {len(ids)} at once")
        self._before = ids[0].tolist()
        return True

    def _append(
        self, tokens: list[_Token], ids: Iterable[int], style: str, after: Sequence[_Token] = ()
    ) -> None:
        for id in map(int, ids):
            done, waiting = self._context([*after, *tokens])
            known = decode(self._tokenizer, done)
            text = decode(self._tokenizer, [*done, *waiting, id])
            tokens.append(_Token(id, "" if text.endswith("\ufffd") else text[len(known) :], style))

    def _context(self, tokens: Sequence[_Token]) -> tuple[list[int], list[int]]:
        """Ids before a new one: some whose text is complete, and after them those whose text is not yet.

        The first begin where a character begins: a decoder may turn all bytes of a broken run to replacement
        characters, also those of whole characters in it.
        """
        complete = [i for i, token in enumerate(tokens) if token.text]
        if not complete:
            return self._before, [token.id for token in tokens]
        end = complete[-1] + 1
        start = complete[-_CONTEXT - 1] + 1 if len(complete) > _CONTEXT else 0
        before = self._before if start == 0 else []
        return [*before, *(token.id for token in tokens[start:end])], [token.id for token in tokens[end:]]

    def _visible(self, tokens: list[_Token], finished: bool) -> list[Cell]:
        """The characters that may be shown: none of a stop word or after one."""
        text = "".join(token.text for token in tokens)
        shown = self._stop_words.cut(text)
        if len(shown) == len(text) and not finished:
            shown = self._stop_words.settled(text)
        return [(char, token.style) for token in tokens for char in token.text][: len(shown)]

    def _show(self, cells: list[Cell]) -> None:
        self._write(cells[self._printed :])
        self._printed = max(self._printed, len(cells))
        if len(self._decided) > 2 * self._recent:
            self._printed -= len(self._retire())

    def _write(self, cells: list[Cell]) -> None:
        """Show decided text, after all that was shown."""
        text = "".join(char for char, _ in cells)
        self._file.write("".join(map(_printable, text)) if self._on_terminal else text)
        self._file.flush()

    def _retire(self) -> str:
        """Forget old tokens; their text."""
        old, self._decided = self._decided[: -self._recent], self._decided[-self._recent :]
        self._before = [token.id for token in old[-_CONTEXT:]]
        return "".join(token.text for token in old)


class SpeculativeTextStreamer(StandardTextStreamer):
    """Shows drafts as they are guessed, then what became of them.

    On a terminal a drafted token appears in one colour; once verified it turns into another (accepted), or
    vanishes (rejected); the target's own tokens have the terminal's colour. Elsewhere, only decided text is
    printed. `NO_COLOR` in the environment leaves the colours out.

    Args:
        non_blocking, skip_prompt: change nothing, since nothing here waits for a device or shows the prompt;
            scripts written for the paper's code base pass them.
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
    ) -> None:
        super().__init__(tokenizer, stop_words, file, end_with, prompt)
        self._drafts: list[_Token] = []
        self._verified: list[int] = []  # the drafted ids that the next decided ones are compared with
        self._screen = _Screen(self._file)

    def put(self, ids: Iterable[int], is_draft: bool = False) -> None:
        """Show tokens, decided or drafted. Drafts come after everything decided."""
        if is_draft:
            self._append(self._drafts, ids, "draft", after=self._decided)
            self._refresh()
            return
        if self._is_prompt(ids):
            return
        ids = [int(id) for id in ids]
        num_accepted = 0
        for id, guess in zip(ids, self._verified, strict=False):
            if id != guess:
                break
            num_accepted += 1
        self._verified = []
        self._append(self._decided, ids[:num_accepted], "accepted")
        self._append(self._decided, ids[num_accepted:], "target")
        self._refresh()

    def delete(self, num_tokens: int, is_draft: bool = False) -> None:
        """Take back the last tokens; of drafts, those that the next decided tokens agree with count as
        accepted.

        Raises:
            ValueError: there are not so many, or they were printed where nothing can be erased.
        """
        tokens = self._drafts if is_draft else self._decided
        if not 0 <= num_tokens <= len(tokens):
            raise ValueError(f"cannot delete {num_tokens} of {len(tokens)} tokens")
        kept = len(tokens) - num_tokens
        if is_draft:
            # Drawn anew by the `put` that follows, in one go: accepted ones do not flicker.
            self._verified, self._drafts = [token.id for token in tokens[kept:]], tokens[:kept]
            return
        if not self._on_terminal:
            raise ValueError("decided text was printed already; only a terminal can erase it")
        self._decided = tokens[:kept]
        self._refresh()

    def end(self) -> None:
        """Show what was held back without drafts, end the line, and be ready for the next answer."""
        self._drafts, self._verified = [], []
        super().end()
        self._screen = _Screen(self._file)

    @property
    def legend(self) -> str:
        """What the colours mean, in these colours; empty where nothing but decided text is shown."""
        if not self._on_terminal:
            return ""
        names = {"draft": "drafted", "accepted": "accepted", "target": "the full model's own"}
        cells = [(char, style) for style, name in names.items() for char in [*name, " "]]
        return "".join(self._screen.drawn(cells)).rstrip()

    def _refresh(self) -> None:
        self._show(
            self._visible([*self._decided, *self._drafts] if self._on_terminal else self._decided, False)
        )

    def _show(self, cells: list[Cell]) -> None:
        if not self._on_terminal:
            super()._show(cells)
            return
        self._screen.update([(_printable(char), style) for char, style in cells if _printable(char)])
        if len(self._decided) > 2 * self._recent and not self._drafts:
            self._screen.settle(sum(map(bool, map(_printable, self._retire()))))


def _printable(char: str) -> str:
    """A character that moves the cursor right or to the next line, and does nothing else to a terminal."""
    if char in "\n\t" or not ("\x00" <= char < "\x20" or "\x7f" <= char < "\xa0"):
        return char
    if char == "\r":
        return ""
    return chr(0x2400 + ord(char)) if char < "\x20" else "\ufffd"  # a picture of the control character


class _Screen:
    """Characters on a terminal that wraps lines; replaces the tail of what it shows.

    Only the part that changed is drawn: the cursor goes back to the first difference and clears the rest.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._start_column = 0
        self._colored = "NO_COLOR" not in os.environ
        self.cells: list[Cell] = []

    def update(self, cells: list[Cell]) -> None:
        """Show `cells` instead of what is shown."""
        width, height = self._size()
        same = next((i for i, (a, b) in enumerate(zip(self.cells, cells, strict=False)) if a != b), None)
        if same is None:
            same = min(len(self.cells), len(cells))
        new = self._positions(cells, width)
        if same < len(self.cells):
            old = self._positions(self.cells, width)
            # Draw the character before the difference again where the cursor cannot be put after it: at the
            # margin, where it hangs, and where the difference is an accent on that character.
            while same and (old[same][1] >= width or old[same] == old[same + 1]):
                same -= 1
            row, column = old[same]
            up = min(old[-1][0] - row, height - 1)
            self._file.write(
                (f"\x1b[{up}A" if up else "") + "\r" + (f"\x1b[{column}C" if column else "") + "\x1b[J"
            )
        # What scrolls off the top could never be taken back.
        while (
            len(cells) > same and cells[-1][1] == "draft" and new[len(cells)][0] - new[same][0] > height - 2
        ):
            cells = cells[:-1]
        self._file.write("".join(self.drawn(cells[same:], [column for _, column in new[same:]])))
        self._file.flush()
        self.cells = cells

    def settle(self, num_cells: int) -> None:
        """Never touch the first `num_cells` again."""
        self._start_column = self._positions(self.cells, self._size()[0])[num_cells][1]
        self.cells = self.cells[num_cells:]

    def drawn(self, cells: list[Cell], columns: list[int] | None = None) -> Iterable[str]:
        """What to write for cells that begin at the given columns, which only tabs need to know."""
        width = self._size()[0]
        shown_style = ""
        for (char, style), column in zip(cells, columns or [0] * len(cells), strict=False):
            if self._colored and _COLORS[style] != _COLORS[shown_style]:
                yield _RESET + _COLORS[style]
                shown_style = style
            yield " " * _tab_width(column, width) if char == "\t" else char
        if _COLORS[shown_style]:
            yield _RESET

    def _positions(self, cells: list[Cell], width: int) -> list[tuple[int, int]]:
        """(row, column) of the cursor before each cell and after the last; column `width` at a full line."""
        row, column = 0, self._start_column
        positions = [(row, column)]
        for char, _ in cells:
            if char == "\n":
                row, column = row + 1, 0
            else:
                advance = _tab_width(column, width) if char == "\t" else max(0, wcwidth(char))
                if column + advance > width:
                    row, column = row + 1, 0
                column += advance
            positions.append((row, column))
        return positions

    def _size(self) -> tuple[int, int]:
        try:
            size = os.get_terminal_size(self._file.fileno())
        except (OSError, ValueError):  # a stand-in for a terminal, or one that has no size
            return int(os.environ.get("COLUMNS", 80)), int(os.environ.get("LINES", 24))
        return size.columns or 80, size.lines or 24


def _tab_width(column: int, width: int) -> int:
    """Spaces to the next multiple of 8, at most to the margin; from the margin, those of a new line."""
    column %= width
    return min(8 - column % 8, width - column)
