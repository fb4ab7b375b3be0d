"""Where the output ends, judged token by token over the whole history.

Both strategies ask the same object after every single token they decide on, also when a round decides on
several, so both end in the same place. Knows nothing of drafts or layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from self_speculation.results import StopReason


class StopConditions:
    """Everything that can end a generation.

    Args:
        end_ids: ids that end the output and do not belong to it.
        max_tokens: the most tokens to generate.
        at_limit: the reason to give when that many have come.
        ends_text: called with the output ids so far; True when they hold a stop word.
        criteria: transformers stopping criteria, called with the whole history and the processed logits.
    """

    def __init__(
        self,
        end_ids: Iterable[int],
        max_tokens: int,
        at_limit: StopReason = "max_steps",
        ends_text: Callable[[Sequence[int]], bool] | None = None,
        criteria: Iterable[Callable] | None = None,
    ) -> None:
        self.end_ids = frozenset(end_ids)
        self.max_tokens = max_tokens
        self._at_limit: StopReason = at_limit
        self._ends_text = ends_text
        self._criteria = tuple(criteria or ())

    @property
    def has_criteria(self) -> bool:
        """Whether somebody looks at the history."""
        return bool(self._criteria)

    def reason(self, output: Sequence[int], history: Tensor, scores: Tensor) -> StopReason | None:
        """Why the output ends after the last token of `output`, or None when it goes on.

        Args:
            output: ids generated so far, the end id included.
            history: [1, prompt + output] the same ids after the prompt's.
            scores: [1, V] the processed logits of the last token.
        """
        if output[-1] in self.end_ids:
            return "eos"
        if self._ends_text is not None and self._ends_text(output):
            return "stop_word"
        # One by one, so that only a criterion whose answer is on a GPU is waited for.
        if any(bool(torch.as_tensor(met(history, scores)).any()) for met in self._criteria):
            return "stopping_criteria"
        return self._at_limit if len(output) >= self.max_tokens else None


class StopWords:
    """Finds stop words in generated text, also where a word is spread over tokens or shares one with other
    text.

    Only the output is searched: a prompt that ends in a stop word does not stop anything. The prompt's ids
    tell how the output's first token reads.
    """

    # A window of so many tokens beyond the longest word is decoded after each token, instead of the whole
    # output: what precedes it was searched before.
    _SLACK = 16

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, words: Iterable[str], prompt: Sequence[int] = ()
    ) -> None:
        self.words = tuple(words)
        self._tokenizer = tokenizer
        self._prompt = prompt
        # Every token but a special one adds at least one byte to the text.
        self._window = max((len(word.encode()) for word in self.words), default=0) + self._SLACK

    def __call__(self, output: Sequence[int]) -> bool:
        """Does the text of `output` hold a stop word, given that it did not one token earlier?"""
        if len(output) > self._window:
            text = decode(self._tokenizer, output[-self._window :])
            # A window that begins inside a character may decode to nothing but replacement characters.
            if "\ufffd" not in text and not self._in(text):
                return False
        return self._in(continuation(self._tokenizer, self._prompt, output))

    def cut(self, text: str) -> str:
        """The text before the first stop word."""
        return text[: min((i for word in self.words if (i := text.find(word)) >= 0), default=len(text))]

    def settled(self, text: str) -> str:
        """The part of an unfinished text that no later token can turn into a stop word."""
        held = max(
            (
                n
                for word in self.words
                for n in range(1, min(len(word), len(text) + 1))
                if text.endswith(word[:n])
            ),
            default=0,
        )
        return text[: len(text) - held]

    def _in(self, text: str) -> bool:
        return any(word in text for word in self.words)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The exact text of `ids`, special tokens included: the one notion of text, here and in the streamers."""
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def continuation(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text that `ids` add after `before`. Decoded alone, they may lose a space in front."""
    return decode(tokenizer, [*before, *ids])[len(decode(tokenizer, before)) :]
