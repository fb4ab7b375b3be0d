"""Texts of ids, and tags in them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

_CONTEXT = 8  # runs of ids that are decoded before a new token, since its text depends on them


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The exact text of `ids`, special tokens included."""
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def continuation(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text that `ids` add to `before`. Decoded alone, they may lose a leading space."""
    return decode(tokenizer, [*before, *ids])[len(decode(tokenizer, before)) :]


class Detokenizer:
    """Token ids -> text, token by token.

    Ids of an incomplete character wait. Decoding starts at the start of a character: some decoders replace
    all bytes of a run if one character in it is incomplete.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._pieces = [[*prompt]]  # runs of ids with complete text
        self._waiting: list[int] = []

    def add(self, id_: int) -> str:
        """The characters that this token completes."""
        self._waiting.append(id_)
        text = self.rest()
        if not text or text.endswith("\ufffd"):
            return ""
        self._pieces = [*self._pieces, self._waiting][-_CONTEXT:]
        self._waiting = []
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
    counts; otherwise it is found wherever the texts of its tokens begin and end.
    """

    text: str
    id: int | None  # of the added token

    @classmethod
    def of(cls, text: str, tokenizer: PreTrainedTokenizerBase) -> Tag:
        return cls(text, tokenizer.get_added_vocab().get(text))

    @property
    def in_grammar(self) -> str:
        """In Lark, as llguidance reads it."""
        return json.dumps(self.text) if self.id is None else f"<[{self.id}]>"

    def find(self, text: str, id_: int | None) -> int:
        """Its position in a text whose last token is `id_`, or -1."""
        if self.id is None:
            return text.find(self.text)
        return text.rfind(self.text) if id_ == self.id else -1

    def begun(self, text: str) -> int:
        """How many characters at the end of a text may begin it."""
        return max((n for n in range(1, len(self.text)) if text.endswith(self.text[:n])), default=0)
