"""Streamers: what a terminal emulator shows, and what strategies stream."""

import io
import os
import re
from collections import defaultdict
from functools import partial
from unittest.mock import patch

import pyte
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thinkers import TAGS, thinking_tokenizer
from wcwidth import wcwidth

from self_speculation import SpeculativeTextStreamer, StandardTextStreamer
from self_speculation.text.texts import OutputReader, Thinking


class Screen(pyte.Screen):
    """Corrects pyte at the margin: wide characters wrap as a whole, accents stay on their letter. Keeps the
    rows that leave at the top: a draft below the last row scrolls, too.
    """

    def __init__(self, *size):
        self.above = []
        super().__init__(*size)

    def index(self):
        if self.cursor.y == self.lines - 1:
            self.above.append(self.display[0])
        super().index()

    def draw(self, data):
        for char in data:
            if wcwidth(char) == 0 and self.cursor.x == self.columns:
                line = self.buffer[self.cursor.y]
                last = self.columns - (1 if line[self.columns - 1].data else 2)
                line[last] = line[last]._replace(data=line[last].data + char)
                continue
            if wcwidth(char) == 2 and self.cursor.x == self.columns - 1:
                self.cursor.x = self.columns
            super().draw(char)


@pytest.fixture(autouse=True)
def environment():
    """Undoes what `Terminal` sets."""
    with patch.dict(os.environ):
        os.environ.pop("NO_COLOR", None)
        yield


class Terminal(io.StringIO):
    """A file that is the terminal, of the given size."""

    def __init__(self, columns=40, lines=60):
        super().__init__()
        os.environ.update(COLUMNS=str(columns), LINES=str(lines))
        self.screen = Screen(columns, lines)
        self.screen.set_mode(pyte.modes.LNM)  # as a tty turns \n into \r\n
        self._stream = pyte.Stream(self.screen)

    def isatty(self):
        return True

    def write(self, text):
        self._stream.feed(text)
        return super().write(text)

    def shown(self):
        return "\n".join(line.rstrip() for line in [*self.screen.above, *self.screen.display]).rstrip()

    def colors(self):
        """Colour -> the text of the first line in it."""
        found = defaultdict(str)
        for column in range(self.screen.columns):
            cell = self.screen.buffer[0][column]
            found[cell.fg] += cell.data.strip()
        return found


def wrapped(text, width):
    """The text with a line break before each word that would pass the edge, and without spaces beyond it."""
    lines = []
    for line in text.split("\n"):
        rows = [""]
        column = 0
        for part in re.findall(r" \u0301*|[日🙂]\u0301*|(?:(?![ 日🙂]).)+", line):
            size = sum(map(wcwidth, part))
            if part[0] == " ":
                rows[-1] += part if column < width else ""
                column += size
                continue
            if column and column + size > width:
                rows.append("")
                column = 0
            for char in part:
                if column and wcwidth(char) and column + wcwidth(char) > width:
                    rows.append("")
                    column = 0
                rows[-1] += char
                column += wcwidth(char)
        lines += rows
    return "\n".join(lines)


def streamer_of(tokenizer, kind, file, stop_words=(), thinks=False):
    """A streamer whose answers end at stop words, and may think."""
    streamer = kind(tokenizer, file)
    thinking = Thinking.of(tokenizer, "") if thinks else None
    streamer.begin(OutputReader(tokenizer, stop_words, thinking=thinking))
    return streamer


def play(streamer, rounds, ids, check=lambda number: None):
    """Stream ids as a strategy does, in rounds of (wrong draft ids, number of right ones before them).

    `check` gets the number of ids that are shown, but where a draft is wrong.
    """
    done = 0
    for wrong, num_right in rounds:
        drafts = [*ids[done : done + num_right], *wrong]
        for draft in drafts:
            streamer.put([draft], is_draft=True)
        if not wrong:
            check(done + len(drafts))
        streamer.delete(len(drafts), is_draft=True)
        streamer.put(torch.tensor(ids[done : done + num_right + 1]))
        done += num_right + 1
        check(done)
    streamer.put(ids[done:])
    streamer.end()


@settings(max_examples=100)
@given(
    name=st.sampled_from(["byte_tokenizer", "sentencepiece_tokenizer"]),
    text=st.text(st.sampled_from("ab \n日é🙂\u0301xyz"), max_size=60),
    rounds=st.lists(
        st.tuples(st.lists(st.integers(3, 320), max_size=5), st.integers(0, 5)), min_size=1, max_size=20
    ),
    size=st.tuples(st.integers(3, 30), st.integers(2, 60)),
    stop_words=st.sampled_from([[], ["xy", "a\nb"], ["y日"], ["aab", "ab ", "abx", "xxx", "日é🙂x"]]),
)
def test_a_terminal_shows_the_answer_and_right_drafts(request, name, text, rounds, size, stop_words):
    """Guards against parts of drafts that remain, after wrapped lines, wide and combining characters,
    newlines or the end of the screen, parts of a character or of a stop word and the text after it, drafted
    or not, and words that are cut at the edge.
    """
    tokenizer = request.getfixturevalue(name)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    starts = [*(start for start, _ in encoded["offset_mapping"]), len(text)]

    def cut(text, finished=False):
        """A text before the first stop word, or what may become one."""
        if found := [text.index(word) for word in stop_words if word in text]:
            return text[: min(found)]
        begun = [n for word in stop_words for n in range(len(word)) if text.endswith(word[:n])]
        return text if finished else text[: len(text) - max(begun, default=0)]

    def printed(text):
        """What a terminal shows of a text that is written at once, with lines that break at words."""
        terminal = Terminal(*size)
        terminal.write(wrapped(text, size[0]))
        return terminal.shown()

    def check(number):
        # A token that ends within a character waits for the rest.
        ends = sorted({*starts[max(0, number - 3) : number + 1]}, reverse=True) or [len(text)]
        if ends[0] < size[1]:  # drafts that are taller than the terminal wait
            seen = (cut(text[:end]) for end in ends)
            assert any(terminal.shown() == printed(each) for each in seen)

    expected = printed(cut(text, finished=True) + "\n")
    terminal = Terminal(*size)
    play(streamer_of(tokenizer, SpeculativeTextStreamer, terminal, stop_words), rounds, ids, check)
    assert terminal.shown() == expected
    terminal = Terminal(*size)
    streamer = streamer_of(tokenizer, StandardTextStreamer, terminal, stop_words)
    for id_ in ids:
        streamer.put([id_])
    streamer.end()
    assert terminal.shown() == expected


@pytest.mark.parametrize("kind", ["added", "spelled"])
def test_thinking_is_dim_and_not_in_a_file(byte_tokenizer, kind):
    """Guards against tags on the screen, drafted ones too, thinking in a pipe, and words that hide it."""
    tokenizer = thinking_tokenizer(byte_tokenizer, kind=kind)
    ids = tokenizer.encode(f"{TAGS[0]}\nHm stop\n{TAGS[1]}\n\nYes stop no", add_special_tokens=False)
    file = io.StringIO()
    terminal = Terminal()
    for each in (file, terminal):
        streamer = streamer_of(tokenizer, SpeculativeTextStreamer, each, ["stop"], thinks=True)
        for id_ in ids:
            streamer.put([id_], is_draft=True)
        drafted = terminal.shown()
        streamer.delete(len(ids), is_draft=True)
        for id_ in ids:
            streamer.put([id_])
        streamer.end()
    assert (file.getvalue(), drafted, terminal.shown()) == ("Yes \n", "Hm stopYes", "Hm stop\n\nYes")
    assert "\x1b[2m" in terminal.getvalue()


@pytest.mark.parametrize("no_color", [False, True])
def test_colors_of_drafted_accepted_and_own_tokens(byte_tokenizer, monkeypatch, no_color):
    """Guards against drafts that stay, against wrong colours, and against colours where NO_COLOR is set."""
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal()
    encode = byte_tokenizer.encode
    streamer = SpeculativeTextStreamer(byte_tokenizer, file=terminal)
    streamer.put(encode("A"))
    for id in [*encode("b"), *encode("c"), *encode("d")]:
        streamer.put([id], is_draft=True)
    assert terminal.colors() == ({"default": "Abcd"} if no_color else {"default": "A", "brown": "bcd"})
    streamer.delete(3, is_draft=True)
    streamer.put([*encode("b"), *encode("X")])
    assert terminal.colors() == ({"default": "AbX"} if no_color else {"default": "AX", "green": "b"})


def test_control_characters_do_not_reach_a_terminal(byte_tokenizer):
    """Guards against a model that rings, moves the cursor or changes colours."""
    terminal = Terminal()
    streamer = StandardTextStreamer(byte_tokenizer, file=terminal)
    streamer.put(byte_tokenizer.encode("a\x1b[31mb\x07\x9bc\r\nd\te"))
    streamer.end()
    assert terminal.shown() == "a\u241b[31mb\u2407\ufffdc\nd    e"


def test_only_drafts_can_be_deleted(byte_tokenizer):
    """Guards against decided text that disappears."""
    streamer = SpeculativeTextStreamer(byte_tokenizer, file=Terminal())
    streamer.put(byte_tokenizer.encode("ab"))
    streamer.put([5, 6], is_draft=True)
    for number, is_draft in ((1, False), (3, True)):
        with pytest.raises(ValueError, match=f"cannot delete {number} tokens: only drafted ones"):
            streamer.delete(number, is_draft)


def test_arguments_of_the_papers_code_base_and_a_prompt(sentencepiece_tokenizer, capsys):
    """Guards against arguments that are refused, a prompt that is shown, and a lost space."""
    streamer = SpeculativeTextStreamer(sentencepiece_tokenizer, non_blocking=True, skip_prompt=True)
    encode = partial(sentencepiece_tokenizer.encode, add_special_tokens=False, return_tensors="pt")
    prompt = encode("def a:")
    streamer.put(prompt)
    streamer.put(encode("def a:    return")[0, prompt.shape[1] :])
    streamer.end()
    assert capsys.readouterr().out == "    return\n"
    with pytest.raises(ValueError, match="one answer, not 2"):
        streamer.put(prompt.repeat(2, 1))
