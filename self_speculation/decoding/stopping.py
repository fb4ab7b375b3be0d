"""What ends an output."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from self_speculation.config import GenerationConfig
from self_speculation.decoding.request import Request, as_list
from self_speculation.decoding.texts import continuation, decode
from self_speculation.decoding.thinking import Thinking, ThinkingReader
from self_speculation.results import StopReason


class StopConditions:
    """End ids, checks and criteria of a request, and the limits of its length.

    Args:
        config: of the request, or of its batch.
        context: the most tokens of prompt and output.
    """

    def __init__(self, request: Request, config: GenerationConfig, context: int) -> None:
        self.end_ids = {*as_list(request.eos_token_ids), *(config.stop_token_ids or [])}
        self.criteria, self._checks = as_list(request.stopping_criteria), as_list(request.stop_checks)
        self._max_steps, self._context = config.max_steps, context

    def reason(self, output: Sequence[int], history: Tensor, logits: Tensor) -> StopReason | None:
        """Why an output ends after its last token; None: it goes on.

        Args:
            history: [1, n] ids of prompt and output; only criteria read them.
            logits: [1, V] processed logits of the last token.
        """
        if output[-1] in self.end_ids:
            return "eos"
        if any(check(output) for check in self._checks):
            return "stop_word"
        # One by one: only a result on a GPU has to be waited for.
        if any(bool(torch.as_tensor(met(history, logits)).any()) for met in self.criteria):
            return "stopping_criteria"
        if len(output) == self._max_steps:
            return "max_steps"
        return "context" if history.shape[1] == self._context else None


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
        self.reader, self._thinks = ThinkingReader(tokenizer, thinking, prompt), thinking is not None
        self._tokenizer = tokenizer
        self._prompt = prompt
        # Every token but a special one adds at least one byte to the text.
        self._window = max((len(word.encode()) for word in self.words), default=0) + self._SLACK

    def __call__(self, output: Sequence[int]) -> bool:
        """Whether `output` contains a stop word, given that it did not one token earlier."""
        if self._thinks:
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
