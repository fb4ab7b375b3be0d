"""What a row tells while it is decoded: text as it is decided, what is drafted after it, log-probabilities.

Everything here is called by the thread that decodes.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from self_speculation import SpeculativeTextStreamer, StandardTextStreamer
from self_speculation.decoding.stopping import continuation
from self_speculation.speculative_streamer import Cell

_CONTEXT = 8  # tokens before one, so that it reads as it does there


class Delta(NamedTuple):
    """What is new of an answer."""

    text: str
    accepted: int = 0  # leading characters that drafts had guessed right
    pending: str = ""  # what is drafted after all text so far


Tell = Callable[[Delta], None]


class TextFeed(StandardTextStreamer):
    """Tells text as it is decided."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_words: Iterable[str] | None,
        prompt: Sequence[int],
        tell: Tell,
    ) -> None:
        super().__init__(tokenizer, stop_words, io.StringIO(), end_with="", prompt=prompt)
        self._tell = tell

    def _show(self, cells: list[Cell]) -> None:
        if cells:
            self._tell(Delta("".join(char for char, _ in cells)))


class DraftFeed(SpeculativeTextStreamer):
    """Tells text as it is decided, which of it was drafted, and what is drafted after it."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_words: Iterable[str] | None,
        prompt: Sequence[int],
        tell: Tell,
    ) -> None:
        super().__init__(tokenizer, stop_words, io.StringIO(), end_with="", prompt=prompt)
        self._tell, self._told = tell, ""  # the drafts that were told last

    def _show(self, cells: list[Cell]) -> None:
        pending = "".join(char for char, _ in self._pending())
        for style, run in groupby(cells, key=lambda cell: cell[1]):
            text = "".join(char for char, _ in run)
            self._tell(Delta(text, len(text) if style == "accepted" else 0, pending))
        if not cells and pending != self._told:
            self._tell(Delta("", 0, pending))
        self._told = pending


class Scored(NamedTuple):
    """A token and how likely the model found it."""

    text: str
    logprob: float
    start: int  # characters of the answer before it
    likeliest: list[tuple[str, float]]  # the tokens that it found most likely


class LogprobCollector:
    """A stopping criterion that is never met, and notes each token's log-probability.

    Those of the target, after logits processors, before temperature and top-p. What ends an answer (an end
    id, the last token of a stop word) is not noted: it is no part of it.

    Args:
        number: of the likeliest tokens to note.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, number: int) -> None:
        self._tokenizer, self._number = tokenizer, number
        self._noted: deque[Scored] = deque()
        self._length = 0  # characters so far

    def __call__(self, history: Tensor, scores: Tensor, **_: object) -> bool:
        *before, id_ = history[0, -_CONTEXT:].tolist()
        logprobs = scores[0].float().log_softmax(-1)
        highest = logprobs.topk(min(self._number, len(logprobs)))
        likeliest = zip(highest.indices.tolist(), highest.values.tolist(), strict=True)

        def text(id_: int) -> str:
            return continuation(self._tokenizer, before, [id_])

        scored = [(text(other), value) for other, value in likeliest]
        self._noted.append(Scored(text(id_), float(logprobs[id_]), self._length, scored))
        self._length += len(self._noted[-1].text)
        return False

    def take(self, length: float) -> list[Scored]:
        """The tokens that begin in so many characters of the answer, and were not taken before."""
        taken = []
        while self._noted and self._noted[0].start < length:
            taken.append(self._noted.popleft())
        return taken
