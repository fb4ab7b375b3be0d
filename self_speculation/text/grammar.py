"""Guided decoding: only tokens that a grammar accepts can be picked. Grammars are in llguidance's formats.

Drafts are guided as well: sources sample from masked logits, and n-grams end before a forbidden token.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import takewhile
from operator import eq

import llguidance
import numpy
import torch
from torch import Tensor
from torch.nn.functional import embedding
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from self_speculation.machine.transfers import on_device
from self_speculation.text.grammar_sandbox import LIMITS, GrammarError, grammar_error
from self_speculation.text.texts import Thinking

# Small models repeat white space while they may: a gap is empty, a space, or one line break with indentation.
_JSON_OPTIONS = {"whitespace_pattern": r"( |\n[ \t]{0,16})?"}
# Otherwise the tokenizer chooses the tokens of a text without alternatives. It may read an added token in
# it, or normalize it, and the matcher does not take such tokens.
_OPTIONS = '%llguidance {"no_forcing": true}'
MAX_CHARACTERS = 100_000  # of a schema as JSON, an expression, or choices together


@dataclass(frozen=True)
class Grammar:
    """A language that an output must belong to."""

    definition: str  # for llguidance, in Lark or JSON; `json_schema`, `regex` and `lark` make it

    @classmethod
    def json_schema(cls, schema: Mapping[str, object] | str) -> Grammar:
        """JSON that conforms to a schema. {"type": "object"} allows any object.

        Raises ValueError if the schema is no JSON object, or too large.
        """
        schema = json.loads(schema) if isinstance(schema, str) else schema
        return cls.lark(f"start: {json_rule(schema)}")

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Text that matches a regular expression as a whole."""
        return cls.lark(f"start: /{llguidance.regex_to_lark(pattern)}/")

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """Text that a Lark grammar derives from `start`. `<name>` and `<[id]>` are single tokens."""
        return cls(f"{text}\n{_OPTIONS}")

    def after(self, thinking: Thinking, added_ids: Iterable[int], end_ids: Iterable[int]) -> Grammar:
        """The language of outputs that think, in whatever tokens but end ids, and then belong to this one.

        A grammar of the whole output follows drafts, and knows the token, or the part of one, that ends the
        thinking. If the end tag is spelled, thinking is valid UTF-8 and has tokens of `added_ids`.
        """
        begin, end = thinking.begin.in_grammar, thinking.end
        if end.id is not None:
            rules = [f"thought: <[^{_ids({end.id, *end_ids})}]>* {end.in_grammar} BREAKS"]
        else:
            special = _ids({*added_ids} - {*end_ids})
            last = llguidance.regex_to_lark(f"(?s:.*){re.escape(end.text)}")
            rules = [f"thought: {f'(TEXT? <[{special}]>)*' if special else ''} last BREAKS"]
            rules += ["TEXT: /(?s:.+)/", f"last[lazy]: /{last}/"]
        start = "thought" if thinking.has_begun else f"({begin} thought)?"
        rules += [f"start: {start} @answer", "BREAKS: /\\n{0,4}/", _OPTIONS]
        grammars = [{"lark_grammar": "\n".join(rules)}, {"name": "answer", "lark_grammar": self.definition}]
        return Grammar(json.dumps({"grammars": grammars}))


def json_rule(schema: object) -> str:
    """A JSON schema in Lark, with our options. Raises GrammarError if it is no object, or too large."""
    if not isinstance(schema, Mapping):
        raise GrammarError("a JSON schema must be an object")
    try:
        text = short_json({**schema, "x-guidance": _JSON_OPTIONS}, MAX_CHARACTERS)
    except RecursionError:
        raise GrammarError("the schema is nested too deeply") from None
    if text is None:
        raise GrammarError(f"the schema has too many characters, at most {MAX_CHARACTERS} are allowed")
    return f"%json {text}"


def short_json(value: object, most: int) -> str | None:
    """The JSON of a value; None if it has more characters than `most`. It is encoded up to there, and without
    C, which would hold up all threads.
    """
    parts = list[str]()
    size = 0
    # A check for circles would keep the value, in a circle of functions.
    for part in json.JSONEncoder(check_circular=False).iterencode(value):
        parts.append(part)
        size += len(part)
        if size > most:
            return None
    return "".join(parts)


def _ids(ids: Iterable[int]) -> str:
    return ",".join(map(str, sorted(ids)))


class GrammarProcessor:
    """Sets the logits of tokens that the grammar forbids to -inf. Follows drafts: it rolls back with them.

    Args:
        vocab_size: V of the logits.
        eos_token_ids: allowed where the output may end.

    Raises:
        GrammarError: the grammar is invalid, too large, or matches nothing.
        ValueError: the tokenizer is not a fast one.
    """

    def __init__(
        self,
        grammar: Grammar,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        eos_token_ids: Sequence[int],
    ) -> None:
        self._vocab_size = vocab_size
        added = tokenizer.added_tokens_decoder.items()
        read = _tokenizer(tokenizer, vocab_size, tuple(eos_token_ids), *added)
        self._unused = _matcher(read, grammar)
        self._matcher = self._unused.deep_copy()
        self._consumed = list[int]()

    def masked(self, output: Sequence[int], scores: Tensor) -> Tensor:
        """The scores, [1, V], after the ids of output and draft. Reads nothing from the device.

        Raises GrammarError if nothing can follow, if what can is beyond the limits of llguidance, or after a
        forbidden token. Verification rejects such a token of a draft, so the error does not count.
        """
        if not self._move_to(output):
            raise grammar_error(
                self._matcher.get_error() or "the output has a token that the grammar forbids"
            )
        bitmask = numpy.frombuffer(_bitmask(self._matcher), dtype=numpy.uint8)
        added = embedding(on_device(bitmask, scores.device, torch.int32), _byte_biases(scores.device))
        return scores + added.flatten()[: self._vocab_size]

    def count_allowed(self, output: Sequence[int], draft: Sequence[int]) -> int:
        """How many tokens of a draft the grammar accepts after an output."""
        return self._matcher.validate_tokens(list(draft)) if self._move_to(output) else 0

    def _move_to(self, output: Sequence[int]) -> bool:
        """Have the matcher consume exactly this output; False: it is not accepted."""
        if self._matcher.is_error():  # for good, by a draft that led nowhere
            self._matcher = self._unused.deep_copy()
            self._consumed = []
        consumed = self._consumed
        common = sum(takewhile(bool, map(eq, consumed, output)))
        self._matcher.rollback(len(consumed) - common)
        del consumed[common:]
        rest = list(output[common:])
        accepted = self._matcher.try_consume_tokens(rest)
        consumed += rest[:accepted]
        return accepted == len(rest)


@cache
def _byte_biases(device: torch.device) -> Tensor:
    """[256, 8] what each byte of a bitmask adds to the logits of 8 ids. Boolean masks take longer."""
    bits = [0.0 if byte >> i & 1 else -math.inf for byte in range(256) for i in range(8)]
    return on_device(bits, device, torch.float32).view(256, 8)


@lru_cache(maxsize=8)
def _tokenizer(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_token_ids: tuple[int, ...], *_: Hashable
) -> llguidance.LLTokenizer:
    """Making one takes a tenth of a second and more. The key has the added tokens, too: they may change."""
    return llguidance.LLTokenizer(tokenizer_json(tokenizer), vocab_size, [*eos_token_ids])


def tokenizer_json(tokenizer: PreTrainedTokenizerBase) -> str:
    """A tokenizer as llguidance reads it. Raises ValueError if it is not a fast one."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError("a grammar needs a fast tokenizer, of the library tokenizers")
    backend = copy.copy(tokenizer.backend_tokenizer)
    backend.no_padding()
    backend.no_truncation()
    return backend.to_str()


@lru_cache(maxsize=8)
def _matcher(tokenizer: llguidance.LLTokenizer, grammar: Grammar) -> llguidance.LLMatcher:
    """A matcher before the first token, to be copied: compiling a large grammar takes half a second."""
    matcher = llguidance.LLMatcher(tokenizer, grammar.definition, log_level=0, limits=LIMITS)
    _bitmask(matcher)
    return matcher


def _bitmask(matcher: llguidance.LLMatcher) -> bytes:
    """One bit per token: may it follow?"""
    bits = matcher.compute_bitmask()
    if matcher.is_error():
        raise grammar_error(matcher.get_error())
    return bits
