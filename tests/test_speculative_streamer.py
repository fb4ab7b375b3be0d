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
from conftest import Recorder, generate, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from thinkers import TAGS, thinking_tokenizer
from wcwidth import wcwidth

from self_speculation import SpeculativeTextStreamer, StandardTextStreamer
from self_speculation.decoding.texts import OutputReader, Thinking, decode


class Screen(pyte.Screen):
    """Corrects pyte at the margin: wide characters wrap as a whole, accents stay on their letter."""

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
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    def colors(self):
        """Colour -> the text of the first line in it."""
        found = defaultdict(str)
        for column in range(self.screen.columns):
            cell = self.screen.buffer[0][column]
            found[cell.fg] += cell.data.strip()
        return found


def streamer_of(tokenizer, kind, file, stop_words=(), thinks=False):
    """A streamer whose answers end at stop words, and may think."""
    streamer = kind(tokenizer, file)
    thinking = Thinking.of(tokenizer, "") if thinks else None
    streamer.begin(OutputReader(tokenizer, stop_words, thinking=thinking))
    return streamer


def play(streamer, rounds, ids):
    """Stream ids as a strategy does, in rounds of (wrong draft ids, number of right ones before them)."""
    for wrong, num_right in rounds:
        drafts = [*ids[:num_right], *wrong]
        for draft in drafts:
            streamer.put([draft], is_draft=True)
        streamer.delete(len(drafts), is_draft=True)
        streamer.put(torch.tensor(ids[: num_right + 1]))
        ids = ids[num_right + 1 :]
    streamer.put(ids)
    streamer.end()


@settings(max_examples=150)
@given(
    name=st.sampled_from(["byte_tokenizer", "sentencepiece_tokenizer"]),
    text=st.text(st.sampled_from("ab \n日é🙂\u0301xyz"), max_size=60),
    rounds=st.lists(
        st.tuples(st.lists(st.integers(3, 320), max_size=5), st.integers(0, 5)), min_size=1, max_size=20
    ),
    size=st.tuples(st.integers(3, 30), st.integers(2, 60)),
    stop_words=st.sampled_from([[], ["xy", "a\nb"], ["y日"]]),
)
def test_a_terminal_shows_the_answer_alone_in_the_end(request, name, text, rounds, size, stop_words):
    """Guards against parts of drafts that remain, after wrapped lines, wide and combining characters,
    newlines or the end of the screen, and against text after a stop word.
    """
    tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode(text, add_special_tokens=False)
    terminal, other, printed = (Terminal(*size) for _ in range(3))
    play(streamer_of(tokenizer, SpeculativeTextStreamer, terminal, stop_words), rounds, ids)
    text = OutputReader(tokenizer, stop_words).cut(decode(tokenizer, ids))
    printed.write(wrapped(text, size[0]) + "\n")
    assert terminal.shown() == printed.shown()
    streamer = streamer_of(tokenizer, StandardTextStreamer, other, stop_words)
    for id_ in ids:
        streamer.put([id_])
    streamer.end()
    assert other.shown() == printed.shown()


def wrapped(text, width):
    """The text with a line break before each word that would be divided at the edge."""
    shown = ""
    for line in text.split("\n"):
        column = 0
        for part in re.findall(r"[ 日🙂\u0301]\u0301*|[^ 日🙂\u0301][^ 日🙂]*", line):
            size = sum(max(0, wcwidth(char)) for char in part)
            if column + size > width and part[0] == " ":
                part, size, column = part[1:], 0, -1
            if column + size > width and size > 0 < column:
                column = -1
            shown += "\n" * (column < 0) + part
            column = max(column, 0) + size
            column = (column - 1) % width + 1 if column > width else column
        shown += "\n"
    return shown.removesuffix("\n")


def test_words_are_not_divided_at_the_edge(byte_tokenizer):
    """Guards against words that break at the edge, a draft that moves a word for good, and one that is taller
    than the terminal.
    """
    terminal, encode = Terminal(10, 5), byte_tokenizer.encode
    streamer = SpeculativeTextStreamer(byte_tokenizer, file=terminal)
    streamer.put(encode("zero\none two th"))
    for draft, shown in (("\n" * 9, "zero\none two th"), ("umb", "zero\none two\nthumb")):
        for id_ in encode(draft):
            streamer.put([id_], is_draft=True)
        assert terminal.shown() == shown
        streamer.delete(len(encode(draft)), is_draft=True)
    streamer.put(encode(" ree"))
    streamer.end()
    assert terminal.shown() == "zero\none two th\nree"


@pytest.mark.parametrize("kind", ["added", "spelled"])
def test_drafts_of_thinking_have_no_tags(byte_tokenizer, kind):
    """Guards against tags that are shown until they are verified."""
    tokenizer, terminal = thinking_tokenizer(byte_tokenizer, kind=kind), Terminal()
    streamer = streamer_of(tokenizer, SpeculativeTextStreamer, terminal, thinks=True)
    ids = tokenizer.encode(f"{TAGS[0]}\nHm\n{TAGS[1]}\n\nYes", add_special_tokens=False)
    for num_decided in range(3):
        streamer.put(ids[:num_decided])
        for id_ in ids[num_decided:]:
            streamer.put([id_], is_draft=True)
        assert terminal.shown() == "HmYes"
        streamer.delete(len(ids) - num_decided, is_draft=True)
        ids = ids[num_decided:]


KINDS = pytest.mark.parametrize("kind", [StandardTextStreamer, SpeculativeTextStreamer])


@KINDS
@pytest.mark.parametrize("no_color", [False, True])
def test_thinking_is_dim_and_not_in_a_file(byte_tokenizer, kind, no_color):
    """Guards against tags on the screen, thinking in a pipe, stop words that hide it, and escape codes in
    spite of NO_COLOR.
    """
    os.environ |= {"NO_COLOR": "1"} if no_color else {}
    tokenizer = thinking_tokenizer(byte_tokenizer, kind="spelled")
    ids = tokenizer.encode(f"{TAGS[0]}\nHm stop\n{TAGS[1]}\n\nYes stop no", add_special_tokens=False)
    for file, expected in ((io.StringIO(), "Yes \n"), (Terminal(), None)):
        streamer = streamer_of(tokenizer, kind, file, ["stop"], thinks=True)
        for id_ in ids:
            streamer.put([id_])
        streamer.end()
        if file.isatty():
            assert file.shown() == "Hm stop\n\nYes"
            assert ("\x1b[2m" in file.getvalue()) != no_color
        else:
            assert file.getvalue() == expected


@pytest.mark.parametrize("no_color", [False, True])
def test_colors_of_drafted_accepted_and_own_tokens(byte_tokenizer, monkeypatch, no_color):
    """Guards against drafts that stay, against wrong colours, and against colours where NO_COLOR is set."""
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    terminal, encode = Terminal(), byte_tokenizer.encode
    streamer = SpeculativeTextStreamer(byte_tokenizer, file=terminal)
    streamer.put(encode("A"))
    for id in [*encode("b"), *encode("c"), *encode("d")]:
        streamer.put([id], is_draft=True)
    assert terminal.colors() == ({"default": "Abcd"} if no_color else {"default": "A", "brown": "bcd"})
    streamer.delete(3, is_draft=True)
    streamer.put([*encode("b"), *encode("X")])
    assert terminal.colors() == ({"default": "AbX"} if no_color else {"default": "AX", "green": "b"})


def test_no_part_of_a_drafted_stop_word_or_character_is_shown(byte_tokenizer):
    """Guards against a shown beginning of a stop word, and against drafts after one."""
    terminal = Terminal()
    streamer = streamer_of(byte_tokenizer, SpeculativeTextStreamer, terminal, ["Human:"])
    streamer.put(byte_tokenizer.encode("A man"))
    streamer.put(byte_tokenizer.encode("🙂")[:1], is_draft=True)
    assert terminal.shown() == "A man"
    streamer.delete(1, is_draft=True)
    streamer.put(byte_tokenizer.encode(". Hu"))
    streamer.put(byte_tokenizer.encode("m"), is_draft=True)
    assert terminal.shown() == "A man."
    streamer.put(byte_tokenizer.encode("an: secret"), is_draft=True)
    assert terminal.shown() == "A man."
    assert "H" not in terminal.getvalue()


@KINDS
def test_control_characters_do_not_reach_a_terminal(byte_tokenizer, kind):
    """Guards against a model that rings, moves the cursor or changes colours."""
    terminal = Terminal()
    streamer = kind(byte_tokenizer, file=terminal)
    streamer.put(byte_tokenizer.encode("a\x1b[31mb\x07\x9bc\r\nd\te"))
    streamer.end()
    assert terminal.shown() == "a\u241b[31mb\u2407\ufffdc\nd    e"


def test_only_drafts_can_be_deleted(byte_tokenizer):
    """Guards against decided text that disappears."""
    terminal = Terminal()
    streamer = SpeculativeTextStreamer(byte_tokenizer, file=terminal)
    streamer.put(byte_tokenizer.encode("ab"))
    streamer.put(drafts := byte_tokenizer.encode("xyz"), is_draft=True)
    for number, is_draft in ((1, False), (len(drafts) + 1, True)):
        with pytest.raises(ValueError, match=f"cannot delete {number} tokens: only drafted ones"):
            streamer.delete(number, is_draft)
    streamer.delete(1, is_draft=True)
    streamer.put([], is_draft=True)
    assert terminal.shown() == "ab" + byte_tokenizer.decode(drafts[:-1])


@pytest.mark.parametrize("agreement", ["sometimes", "always"])
def test_strategies_stream_what_they_return(agreement):
    """Guards against an id that is streamed twice, out of order or after the end, against a shown end id, and
    against drafts that are not deleted or that follow a drafted end id.
    """
    model = tiny_llama(agreement=agreement, initializer_range=0.5)
    ids = generate(model, [4, 5, 6], max_steps=8, eos=[]).predicted_tokens
    end = next(i for i in range(2, 6) if ids[i] not in ids[:i])
    for eos in ([], [ids[end]]):
        for drafts in ({}, {"exit_layer": 2, "num_speculations": 7}):
            recorder = Recorder()
            result = generate(model, [4, 5, 6], max_steps=9, eos=eos, streamer=recorder, **drafts)
            assert recorder.decided == result.predicted_tokens
            assert (recorder.drafts, recorder.ended) == ([], 1)
    if agreement == "always":
        assert recorder.num_drafted == end - 1  # the first token is not drafted


def test_arguments_of_the_papers_code_base_and_a_prompt(sentencepiece_tokenizer, capsys):
    """Guards against arguments that are refused, a prompt [1, P] that is shown, and an indentation of three
    instead of four: ids that are decoded alone lose a space.
    """
    streamer = SpeculativeTextStreamer(sentencepiece_tokenizer, non_blocking=True, skip_prompt=True)
    encode = partial(sentencepiece_tokenizer.encode, add_special_tokens=False, return_tensors="pt")
    prompt = encode("def a:")
    streamer.put(prompt)
    streamer.put(encode("def a:    return")[0, prompt.shape[1] :])
    streamer.end()
    assert capsys.readouterr().out == "    return\n"
    with pytest.raises(ValueError, match="one answer, not 2"):
        streamer.put(prompt.repeat(2, 1))
