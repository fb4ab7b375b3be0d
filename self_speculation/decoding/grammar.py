"""Guided decoding: only tokens that a grammar accepts can be picked. The grammars are those of llguidance.

Drafts are guided as well: sources sample from masked logits, and n-grams end before a forbidden token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import llguidance
import llguidance.hf
import numpy
import torch
from torch import Tensor
from torch.nn.functional import embedding
from transformers import LogitsProcessor, PreTrainedTokenizerBase, PreTrainedTokenizerFast

# Small models repeat white space without end if they may.
JSON_OPTIONS: Any = {"whitespace_pattern": r"[ \n\t]{0,16}"}
# [256, 8]: what each byte of a bitmask adds to the logits of its 8 ids. Boolean masks take longer.
_OF_BYTES = torch.tensor([[0.0 if byte >> i & 1 else -torch.inf for i in range(8)] for byte in range(256)])
# Of each tokenizer, by vocabulary size and end ids: making one takes a tenth of a second and more.
_TOKENIZERS: WeakKeyDictionary[PreTrainedTokenizerBase, dict[Any, llguidance.LLTokenizer]] = (
    WeakKeyDictionary()
)


@dataclass(frozen=True)
class Grammar:
    """A language that an output must belong to.

    Args:
        definition: in llguidance's format; `json_schema`, `regex` and `lark` make it.
    """

    definition: str

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> Grammar:
        """JSON that conforms to a schema. {"type": "object"} allows any object.

        Raises:
            ValueError: the schema is not a JSON object.
        """
        schema = json.loads(schema) if isinstance(schema, str) else schema
        if not isinstance(schema, Mapping):
            raise ValueError("a JSON schema must be an object")
        return cls(llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), JSON_OPTIONS))

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Text that matches a regular expression as a whole."""
        return cls(llguidance.LLMatcher.grammar_from_regex(pattern))

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """Text that a Lark grammar derives from `start`."""
        return cls(llguidance.LLMatcher.grammar_from_lark(text))

    def check(self) -> None:
        """Raises ValueError if the grammar is invalid or matches nothing."""
        if problem := llguidance.LLMatcher.validate_grammar(self.definition):
            first_line, *_ = problem.splitlines()
            raise ValueError(first_line)


class GrammarProcessor(LogitsProcessor):
    """Sets the logits of tokens that the grammar forbids to -inf. Follows drafts: it rolls back with them.

    Args:
        prompt_length: tokens of the history before the output.
        vocab_size: V of the logits.
        eos_token_ids: allowed where the output may end.

    Raises:
        ValueError: an invalid grammar, or a tokenizer that is not a fast one.
    """

    def __init__(
        self,
        grammar: Grammar,
        tokenizer: PreTrainedTokenizerBase,
        prompt_length: int,
        vocab_size: int,
        eos_token_ids: Sequence[int],
    ) -> None:
        self._prompt_length, self._vocab_size = prompt_length, vocab_size
        self._matcher = llguidance.LLMatcher(
            _tokenizer(tokenizer, vocab_size, eos_token_ids), grammar.definition, log_level=0
        )
        if self._matcher.is_error():
            raise ValueError(self._matcher.get_error().splitlines()[0])
        self._consumed: list[int] = []
        self._of_bytes = _OF_BYTES

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """
        Args:
            input_ids: [1, n] prompt, output and draft.
            scores: [1, V]
        """
        if not self._move_to(input_ids[0, self._prompt_length :].tolist()):
            return scores  # after a forbidden token of a draft, which verification rejects
        bitmask = numpy.frombuffer(self._matcher.compute_bitmask(), dtype=numpy.uint8).astype(numpy.int32)
        self._of_bytes = self._of_bytes.to(scores.device)
        added = embedding(torch.from_numpy(bitmask).to(scores.device, non_blocking=True), self._of_bytes)
        return scores + added.flatten()[: self._vocab_size]

    def count_allowed(self, output: Sequence[int], draft: Sequence[int]) -> int:
        """How many tokens of a draft the grammar accepts after an output."""
        return self._matcher.validate_tokens(list(draft)) if self._move_to(output) else 0

    def _move_to(self, output: Sequence[int]) -> bool:
        """Have the matcher consume exactly this output; False: it is not accepted."""
        consumed = self._consumed
        common = next(
            (i for i, (old, new) in enumerate(zip(consumed, output, strict=False)) if old != new),
            min(len(consumed), len(output)),
        )
        if common < len(consumed):
            self._matcher.rollback(len(consumed) - common)
            del consumed[common:]
        rest = list(output[common:])
        accepted = self._matcher.try_consume_tokens(rest) if rest else 0
        consumed += rest[:accepted]
        return accepted == len(rest)


def _tokenizer(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_token_ids: Sequence[int]
) -> llguidance.LLTokenizer:
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError("a grammar needs a fast tokenizer, of the library tokenizers")
    known = _TOKENIZERS.setdefault(tokenizer, {})
    key = (vocab_size, tuple(eos_token_ids))
    if key not in known:
        known[key] = llguidance.hf.from_tokenizer(tokenizer, vocab_size, list(eos_token_ids))
    return known[key]
