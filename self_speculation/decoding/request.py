"""A prompt and its own settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from self_speculation.config import GenerationConfig
from self_speculation.decoding.grammar import Grammar
from self_speculation.decoding.processors import config_processors
from self_speculation.decoding.thinking import Thinking

T = TypeVar("T")

# None, one or several; the lists of transformers are callable, too.
Callables = Sequence[Callable] | Callable | None


@dataclass(frozen=True)
class Request:
    """A request to a strategy or to `HuggingfaceLlamaGenerator`."""

    prompt: str | list[int]
    """Text or token ids; a strategy takes ids only."""
    logits_processors: Callables = None
    """Of transformers; called with the whole history [1, n] and logits [1, V]."""
    stopping_criteria: Callables = None
    """Of transformers; called after each token with the whole history [1, n] and processed logits [1, V]."""
    streamer: Any = None
    """Has `put(ids)` and `end()`. If it has `delete`, it gets drafts too."""
    seed: int | None = None
    """Seed of the request's own random numbers; None: torch's generator."""
    eos_token_ids: int | Sequence[int] | None = None
    """End the output. `HuggingfaceLlamaGenerator` adds those of tokenizer and model."""
    stop_checks: Callables = None
    """Called after each token with the output ids; True ends the output. Stop words reach a strategy by
    this, since it has no tokenizer."""
    config: GenerationConfig | None = None
    """Length, sampling and stop conditions of this request; None: those of the batch. All requests of a batch
    draft in the same way."""
    drafts: bool = True
    """False: no tokens are drafted for this request."""
    logit_bias: Mapping[int, float] | None = None
    """Added to the logits of these ids."""
    prediction: str | list[int] | None = None
    """Text or ids that the output is expected to resemble, such as a file to be edited. It is drafted by
    adaptive decoding, and where `prompt_lookup` is above 0."""
    grammar: Grammar | None = None
    """The language that the output must belong to; only `HuggingfaceLlamaGenerator` knows the tokenizer."""
    thinking: Thinking | None = None
    """How the output thinks: `Thinking.of(tokenizer, prompt)`. Grammar and stop words begin after it."""

    @property
    def ids(self) -> list[int]:
        """The tokenized prompt."""
        assert not isinstance(self.prompt, str), "a strategy takes token ids"
        return self.prompt

    @property
    def predicted_ids(self) -> Sequence[int]:
        """The tokenized prediction."""
        assert not isinstance(self.prediction, str), "a strategy takes token ids"
        return self.prediction or ()

    def processors(self, config: GenerationConfig) -> list[Callable]:
        """All logits processors, as transformers orders them: the config's come before the request's own."""
        own = as_list(self.logits_processors)
        return [*config_processors(config, len(self.ids), self.logit_bias), *own]


def as_list(values: T | Iterable[T] | None) -> list[T]:
    """None: no values; one value: a list of it."""
    if values is None:
        return []
    return list(values) if isinstance(values, Iterable) else [values]
