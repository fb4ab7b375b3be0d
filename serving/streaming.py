"""What the decoding thread passes on while it decodes: new text, pending drafts, log-probabilities."""

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

_CONTEXT = 8  # tokens that are decoded before a token, because its text depends on them


class Delta(NamedTuple):
    """New text of an answer."""

    text: str
    accepted: int = 0  # leading characters that are accepted drafts
    pending: str = ""  # the draft after all text so far


class DeltaStreamer(StandardTextStreamer):
    """Passes on decided text."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_words: Iterable[str] | None,
        prompt: Sequence[int],
        on_delta: Callable[[Delta], None],
    ) -> None:
        super().__init__(tokenizer, stop_words, io.StringIO(), end_with="", prompt=prompt)
        self._on_delta = on_delta

    def _write(self, cells: list[Cell]) -> None:
        if cells:
            self._on_delta(Delta("".join(char for char, _ in cells)))


class DraftDeltaStreamer(DeltaStreamer, SpeculativeTextStreamer):
    """Passes on decided text, its accepted part, and the draft after it."""

    _pending = ""

    def _write(self, cells: list[Cell]) -> None:
        after = self._visible([*self._decided, *self._drafts], finished=False)[self._printed + len(cells) :]
        pending = "".join(char for char, _ in after)
        for style, run in groupby(cells, key=lambda cell: cell[1]):
            text = "".join(char for char, _ in run)
            self._on_delta(Delta(text, len(text) if style == "accepted" else 0, pending))
        if not cells and pending != self._pending:
            self._on_delta(Delta("", 0, pending))
        self._pending = pending


class TokenLogprob(NamedTuple):
    """A token of an answer with its log-probability."""

    text: str
    logprob: float
    offset: int  # characters of the answer before it
    top: list[tuple[str, float]]  # the most likely tokens, in descending order


class LogprobCollector:
    """A stopping criterion that never stops and records each token's log-probability.

    It sees the target's logits after logits processors, before temperature and top-p. It does not see an end
    id or the last token of a stop word: they are not part of the answer.

    Args:
        num_top: number of the most likely tokens to record.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, num_top: int) -> None:
        self._tokenizer, self._num_top = tokenizer, num_top
        self._tokens: deque[TokenLogprob] = deque()
        self._num_chars = 0

    def __call__(self, history: Tensor, scores: Tensor, **_: object) -> bool:
        *before, id_ = history[0, -_CONTEXT:].tolist()
        logprobs = scores[0].float().log_softmax(-1)
        highest = logprobs.topk(min(self._num_top, len(logprobs)))

        def text(id_: int) -> str:
            return continuation(self._tokenizer, before, [id_])

        pairs = zip(highest.indices.tolist(), highest.values.tolist(), strict=True)
        top = [(text(other), value) for other, value in pairs]
        self._tokens.append(TokenLogprob(text(id_), float(logprobs[id_]), self._num_chars, top))
        self._num_chars += len(self._tokens[-1].text)
        return False

    def take(self, num_chars: float) -> list[TokenLogprob]:
        """Remove and return the tokens that begin in the first characters of the answer."""
        taken = []
        while self._tokens and self._tokens[0].offset < num_chars:
            taken.append(self._tokens.popleft())
        return taken
