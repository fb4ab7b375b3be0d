"""Stop words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from self_speculation.decoding.texts import continuation, decode
from self_speculation.decoding.thinking import Thinking, ThinkingReader


class StopWords:
    """Finds stop words in the output, at any token boundary. The prompt, which is not searched, tells how the
    output's first token reads. Thinking is not searched either, nor are its tags.
    """

    # After each token, this many tokens beyond the longest word are decoded instead of the whole output.
    _SLACK = 16

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        words: Iterable[str],
        prompt: Sequence[int] = (),
        thinking: Thinking | None = None,
    ) -> None:
        self.words = tuple(words)
        self.reader = None if thinking is None else ThinkingReader(tokenizer, thinking, prompt)
        self._tokenizer = tokenizer
        self._prompt = prompt
        # Every token but a special one adds at least one byte to the text.
        self._window = max((len(word.encode()) for word in self.words), default=0) + self._SLACK

    def __call__(self, output: Sequence[int]) -> bool:
        """Whether `output` contains a stop word, given that it did not one token earlier."""
        if self.reader is not None:
            if self.words or not self.reader.answer:
                self.reader.read(output)
            return self._in(self.reader.answer)
        if len(output) > self._window:
            text = decode(self._tokenizer, output[-self._window :])
            # A window that begins inside a character may decode to replacement characters only.
            if "\ufffd" not in text and not self._in(text):
                return False
        return self._in(continuation(self._tokenizer, self._prompt, output))

    def cut(self, text: str) -> str:
        """The text before the first stop word."""
        return text[: min((i for word in self.words if (i := text.find(word)) >= 0), default=len(text))]

    def settled(self, text: str) -> str:
        """The text without an end that may become a stop word."""
        longest = len(text) + 1
        begun = (
            n for word in self.words for n in range(1, min(len(word), longest)) if text.endswith(word[:n])
        )
        return text[: len(text) - max(begun, default=0)]

    def _in(self, text: str) -> bool:
        return any(word in text for word in self.words)
