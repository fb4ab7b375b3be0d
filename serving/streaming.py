"""Passes on new text, pending drafts and log-probabilities while a request decodes."""

import codecs
import io
import re
from collections.abc import Callable, Sequence
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from arguments import JSONObject
from self_speculation import SpeculativeTextStreamer, StandardTextStreamer
from self_speculation.speculative_streamer import Cell
from self_speculation.text.texts import OutputReader

_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")  # of SentencePiece vocabularies
_BYTES = {char: byte for byte, char in bytes_to_unicode().items()}  # of byte-level vocabularies
_MIN_LOGPROB = -9999.0  # JSON has no infinity


class Delta(NamedTuple):
    """New text of an answer."""

    text: str
    accepted: int = 0  # leading characters that are accepted drafts
    pending: str = ""  # the draft after all text so far
    thinking: str = ""  # in a stream, `text` is empty then, and `accepted` counts characters of `thinking`
    calls: Sequence[JSONObject] = ()  # deltas of calls
    has_calls: bool = False  # whether the answer has had calls so far


class DeltaStreamer(StandardTextStreamer):
    """Passes on decided text."""

    _sent_pending = ""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        on_delta: Callable[[Delta], None],
    ) -> None:
        super().__init__(tokenizer, io.StringIO(), "")
        self._on_delta = on_delta

    def _show(self, cells: list[Cell]) -> None:
        pending = "".join(cell.char for cell in self._pending())
        for (style, is_thinking), run in groupby(cells, key=itemgetter(1, 2)):
            text = "".join(cell.char for cell in run)
            accepted = len(text) if style == "accepted" else 0
            text, thinking = ("", text) if is_thinking else (text, "")
            self._on_delta(Delta(text, accepted, pending, thinking))
        if not cells and pending != self._sent_pending:
            self._on_delta(Delta("", 0, pending))
        self._sent_pending = pending


class DraftDeltaStreamer(DeltaStreamer, SpeculativeTextStreamer):
    """Passes on decided text, the accepted characters, and the draft after the text."""


class TokenLogprob(NamedTuple):
    """A token of an answer, and the most likely tokens at the position in descending order. Each has the text
    as `token`, with U+FFFD for a part of a character, the `bytes` and the `logprob`.
    """

    chosen: JSONObject
    top: list[JSONObject]
    offset: int  # complete characters of the answer before the token


class LogprobCollector:
    """A stopping criterion that never stops and records each token's log-probability.

    It sees the target's logits after logits processors, before temperature and top-p. An end id, the last
    token of a stop word, and thinking by `reader` are not part of the answer: it does not see them.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, num_top: int, reader: OutputReader | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._reader = reader
        self._added_ids = tokenizer.added_tokens_decoder.keys()
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._is_byte_level = "ByteLevel(" in repr(getattr(backend, "decoder", None))
        self._num_taken = 0  # characters
        self._clear()

    def _clear(self) -> None:
        self._tokens: list[TokenLogprob] = []
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._num_chars = 0  # complete characters

    def __call__(self, history: Tensor, scores: Tensor, **_: object) -> bool:
        if self._reader is not None and not self._reader.in_answer:
            self._clear()  # tokens of the opening tag
            return False
        id_ = int(history[0, -1])
        logprobs = scores[0].float().log_softmax(-1).clamp(min=_MIN_LOGPROB)
        highest = logprobs.topk(min(self._num_top, len(logprobs)))

        def entry(id_: int, logprob: float) -> JSONObject:
            content = self._bytes(id_)
            return {"token": content.decode(errors="replace"), "logprob": logprob, "bytes": list(content)}

        chosen = entry(id_, float(logprobs[id_]))
        top = list(map(entry, highest.indices.tolist(), highest.values.tolist()))
        self._tokens.append(TokenLogprob(chosen, top, self._num_chars))
        self._num_chars += len(self._utf8.decode(bytes(chosen["bytes"])))
        return False

    def _bytes(self, id_: int) -> bytes:
        """The UTF-8 bytes of a token, which may be part of a character."""
        token = self._tokenizer.convert_ids_to_tokens(id_) or ""
        if id_ in self._added_ids:
            return token.encode()
        if self._is_byte_level:
            return bytes(_BYTES[char] for char in token)
        match = _BYTE_TOKEN.fullmatch(token)
        return bytes.fromhex(match[1]) if match else token.replace("\u2581", " ").encode()  # of SentencePiece

    def take(self, num_chars: int, is_whole: bool = False) -> list[TokenLogprob]:
        """Return the tokens that begin in the next characters of the answer, or all, and remove them."""
        self._num_taken += num_chars
        taken = [token for token in self._tokens if is_whole or token.offset < self._num_taken]
        del self._tokens[: len(taken)]
        return taken
