"""Texts of ids: pieces while an answer is decoded, thinking before tags that the chat template knows, and
stop words. This module alone knows the tags.
"""

from __future__ import annotations

import copy
import json
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

_CONTEXT = 8  # runs of ids that are decoded before a new token, whose text depends on them
_OF_PROMPT = 32  # ids of a prompt, of which that is the last run
_BYTES = 4  # of a character, at most
_MOST_WAITING = 32  # ids that complete no character; so many are bytes of none
# Opening and closing tags that templates write without naming them in the tokenizer's config.
_TAGS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))

Part = tuple[str, bool]  # a text, and whether it is thinking


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The exact text of `ids`, special tokens included."""
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def continuation(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text that `ids` add to `before`. Decoded alone, they may lose a leading space."""
    return decode(tokenizer, [*before, *ids])[len(decode(tokenizer, before)) :]


def _num_begun(text: str, words: Sequence[str]) -> int:
    """How many characters at the end of a text, which has none of the sorted words, may begin a word."""
    longest = max(map(len, words), default=0)
    first_characters = {word[:1] for word in words}
    for start in range(max(0, len(text) - longest + 1), len(text)):
        if text[start] in first_characters:
            end = text[start:]
            following = bisect_left(words, end)
            if following < len(words) and words[following].startswith(end):
                return len(end)
    return 0


class Detokenizer:
    """Token ids -> text, token by token.

    Ids of an incomplete character wait, unless they are too many for one. Decoding starts at the start of a
    character: a decoder may replace all bytes of a run if one character in it is incomplete.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        end = [*prompt[-_OF_PROMPT:]]
        while len(end) < len(prompt) and decode(tokenizer, end).startswith("\ufffd"):  # part of a character
            end = end[1:]
        self._pieces = [end]  # runs of ids with complete text
        self._waiting: list[int] = []

    def add(self, id_: int) -> str:
        """The characters that this token completes."""
        self._waiting.append(id_)
        text = self.rest()
        left = list[int]()
        num_pieces = _CONTEXT
        if not text or text.endswith("\ufffd"):
            if len(self._waiting) < _MOST_WAITING:
                return ""
            left = self._waiting[-_BYTES:]
            self._waiting = self._waiting[:-_BYTES]
            text = self.rest()
            num_pieces = 1  # this one is long
        self._pieces = [*self._pieces, self._waiting][-num_pieces:]
        self._waiting = left
        return text

    @property
    def is_waiting(self) -> bool:
        """Whether the last character is incomplete."""
        return bool(self._waiting)

    def rest(self, drafts: Sequence[int] = ()) -> str:
        """The text of the ids that wait, and of drafts after them."""
        known = [id_ for piece in self._pieces for id_ in piece]
        return continuation(self._tokenizer, known, [*self._waiting, *drafts])


class Tag(NamedTuple):
    """A mark in an output, such as `</think>`. If the tokenizer has it as an added token, only that token
    counts; otherwise it is found wherever texts of tokens begin and end.
    """

    text: str
    id: int | None  # of the added token

    @classmethod
    def of(cls, text: str, tokenizer: PreTrainedTokenizerBase) -> Tag:
        return cls(text, tokenizer.get_added_vocab().get(text))

    @property
    def in_grammar(self) -> str:
        """The tag in Lark, as llguidance reads it."""
        return json.dumps(self.text) if self.id is None else f"<[{self.id}]>"

    def find(self, text: str, id_: int | None) -> int:
        """Its position in a text whose last token is `id_`, or -1."""
        if self.id is None:
            return text.find(self.text)
        return text.rfind(self.text) if id_ == self.id else -1


@dataclass(frozen=True)
class Thinking:
    """How the output to a prompt may think."""

    begin: Tag
    end: Tag
    has_begun: bool
    """The prompt ends inside the thinking. Otherwise an output thinks if it starts with the opening tag."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, prompt: str) -> Thinking | None:
        """For a prompt by the chat template; None: the template has no tags, or the prompt ends with an empty
        thinking, as a template may write to turn it off.
        """
        tags = _tags(tokenizer)
        if tags is None or prompt.rstrip().endswith(tags[1]):
            return None
        begin, end = (Tag.of(text, tokenizer) for text in tags)
        return cls(begin, end, has_begun=prompt.rstrip().endswith(begin.text.rstrip()))


def _tags(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str] | None:
    """The tags that the tokenizer's config names, or that the chat template writes or removes."""
    given = getattr(tokenizer, "response_template", None) or {}
    for name in ("reasoning_content", "thinking", "reasoning"):
        field = given.get("fields", {}).get(name, {})
        begin, end = field.get("open"), field.get("close")
        if isinstance(begin, str) and isinstance(end, str):
            return begin, end
    template = str(tokenizer.chat_template or "")
    return next((tags for tags in _TAGS if tags[1] in template), None)


class Splitter:
    """Separates thinking from answer in an output that comes in pieces. Leaves out tags and the line breaks
    next to them, as templates do with earlier answers.

    Args:
        thinking: None: the output is an answer from the start.
    """

    def __init__(self, thinking: Thinking | None) -> None:
        self.in_answer = thinking is None
        self.has_thought = False
        if thinking is not None:
            self._begin = thinking.begin
            self._end = thinking.end
            self.has_thought = thinking.has_begun
        self._held = ""  # may belong to a tag, or is line breaks that may be next to one
        self._at_start = self.has_thought  # of thinking or answer, where line breaks are left out

    def add(self, text: str, id_: int | None = None, finished: bool = False) -> list[Part]:
        """The parts that a new text settles, whose last token is `id_`; if the output has finished, all."""
        settled = self._settle(text, id_)
        if finished:
            text = self._held.rstrip("\n")
            self._held = ""
            settled += self._part(text, is_thinking=self.has_thought)
        return settled

    def preview(self, text: str) -> list[Part]:
        """The parts that drafts of this text would settle; tags in drafts are found by their texts."""
        other = copy.copy(self)
        if not self.in_answer:
            other._begin, other._end = (tag._replace(id=None) for tag in (self._begin, self._end))
        return other.add(text)

    def _settle(self, text: str, id_: int | None) -> list[Part]:
        text = self._held + text
        self._held = ""
        if not (self.has_thought or self.in_answer):
            at = self._begin.find(text, id_)
            self.has_thought = self._at_start = at >= 0 and not text[:at].strip()
            if self.has_thought:
                text = text[at + len(self._begin.text) :]
            elif self._begin.text.startswith(text.lstrip()):
                self._held = text
                return []
            else:
                self.in_answer = True
        if self.in_answer:
            return self._part(text, is_thinking=False)
        if (at := self._end.find(text, id_)) < 0:
            settled = text[: len(text) - _num_begun(text, [self._end.text])].rstrip("\n")
            self._held = text[len(settled) :]
            return self._part(settled, is_thinking=True)
        thought = self._part(text[:at].rstrip("\n"), is_thinking=True)
        self.in_answer = self._at_start = True
        return [*thought, *self._part(text[at + len(self._end.text) :], is_thinking=False)]

    def _part(self, text: str, is_thinking: bool) -> list[Part]:
        text = text.lstrip("\n") if self._at_start else text
        self._at_start = self._at_start and not text
        return [(text, is_thinking)] if text else []


class OutputReader:
    """Reads an output token by token: thinking, answer, and a stop word, at any token boundary, that ends the
    output. Stop words are not searched in the prompt, in thinking or in tags.

    Args:
        words: that end the answer.
        prompt: the ids before the output; how the first token reads depends on them.
        thinking: how the output thinks.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        words: Iterable[str] = (),
        prompt: Sequence[int] = (),
        thinking: Thinking | None = None,
    ) -> None:
        self.words = tuple(sorted(words))
        self._may_think = thinking is not None
        self._longest = max(map(len, self.words), default=1)  # characters of a word
        self._text = Detokenizer(tokenizer, prompt)
        self._splitter = Splitter(thinking)
        self.parts: list[list[Part]] = []  # of each token that was read: what it settles
        self.thinking = self.answer = ""
        self._end = ""  # the last characters of the answer, in which a word may begin
        self._stop: int | None = None  # where the first word begins in the answer
        self._rest: list[Part] | None = None  # what the end settles; None: it has not come
        self._num_before = 0  # tokens before the answer

    def __call__(self, output: Sequence[int]) -> bool:
        """Whether an output that grows contains a stop word."""
        if self.words or not self.answer:  # else nobody needs the text yet
            self.read(output)
        # A word may be part of a character.
        waiting = "" if self._may_think or not self._text.is_waiting else self._text.rest()
        return self._find_stop(waiting) is not None

    def read(self, output: Sequence[int]) -> None:
        """Read the tokens of an output that it has not read yet."""
        for id_ in output[len(self.parts) :]:
            self._num_before += not self._splitter.in_answer
            self.parts.append(self._splitter.add(self._text.add(id_), id_))
            self._append(self.parts[-1])

    def end(self, output: Sequence[int]) -> list[Part]:
        """Read the rest of an output that has finished, an answer at once; returns what that settles."""
        if self._rest is None:
            if not self._splitter.in_answer:
                self.read(output)
            text = self._text.rest(output[len(self.parts) :])
            self._rest = self._splitter.add(text, finished=True)
            self._append(self._rest)
        return self._rest

    def preview(self, drafts: Sequence[int]) -> list[Part]:
        """The parts that drafts would settle, without an incomplete character."""
        text = self._text.rest(drafts)
        for number in range(len(drafts) - 1, max(0, len(drafts) - _BYTES), -1):
            if not text.endswith("\ufffd"):
                break
            text = self._text.rest(drafts[:number])  # a decoder may replace whole characters before it, too
        return self._splitter.preview(text.rstrip("\ufffd"))

    @property
    def num_thinking(self) -> int:
        """Tokens of the thinking and of tags."""
        return self._num_before if self._splitter.has_thought else 0

    @property
    def in_answer(self) -> bool:
        """Whether the last token adds to the text of the answer, or will, unless an opening tag has begun."""
        if not self._splitter.has_thought:
            return True
        return bool(self.answer) or (self._text.is_waiting and self._splitter.in_answer)

    def num_settled(self, more: str = "") -> int:
        """How many characters of the answer, and of more text after it, come before the first stop word and,
        until the output has ended, cannot become one. It takes time for new text alone.
        """
        if (stop := self._find_stop(more)) is not None:
            return stop
        num_begun = _num_begun(self._end + more, self.words) if self._rest is None else 0
        return len(self.answer) + len(more) - num_begun

    def _find_stop(self, more: str) -> int | None:
        """Where the first stop word begins in the answer and more text after it."""
        if self._stop is not None or not more:
            return self._stop
        text = self._end + more
        known = len(self._end)
        new_ends = range(known + 1, len(text) + 1)
        ends = [end for end in new_ends if text.endswith(self.words, 0, end)]  # of all words at once
        starts = [end - len(word) for end in ends for word in self.words if text.endswith(word, 0, end)]
        return len(self.answer) - known + min(starts) if starts else None

    def _append(self, parts: list[Part]) -> None:
        for text, is_thinking in parts:
            if is_thinking:
                self.thinking += text
            else:
                self._stop = self._find_stop(text)
                self.answer += text
                self._end = (self._end + text)[-self._longest :]
