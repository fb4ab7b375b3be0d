"""A prompt and the settings of one request: what changes logits, and what ends the output."""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)
from transformers.generation import BaseStreamer

from self_speculation.config import GenerationConfig, check_kind
from self_speculation.text.grammar import Grammar
from self_speculation.text.texts import Thinking

T = TypeVar("T")

# None, one or several; the lists of transformers are callable, too.
Callables = Sequence[Callable] | Callable | None


@dataclass(frozen=True)
class Request:
    """A request to a strategy or to `HuggingfaceLlamaGenerator`."""

    prompt: str | list[int]
    """Text or token ids; a strategy takes ids only."""
    logits_processors: Callables = None
    """Logits processors of transformers; called with the whole history [1, n] and logits [1, V]."""
    stopping_criteria: Callables = None
    """Criteria of transformers; called after each token with the history [1, n] and logits [1, V]."""
    streamer: BaseStreamer | None = None
    """Has `put(ids)` and `end()`. If it has `delete`, it gets drafts too."""
    seed: int | None = None
    """Seed of the sampled output; None: drawn from torch's generator."""
    eos_token_ids: int | Sequence[int] | None = None
    """End the output. `HuggingfaceLlamaGenerator` adds the EOS ids of tokenizer and model."""
    stop_checks: Callables = None
    """Called after each token with the output ids; True ends the output. Stop words reach a strategy by
    this, since it has no tokenizer."""
    config: GenerationConfig | None = None
    """Length, sampling and stop conditions of this request; None: the batch's. All requests of a batch draft
    in the same way."""
    drafts: bool = True
    """False: no tokens are drafted for this request."""
    logit_bias: Mapping[int, float] | None = None
    """Id -> number to add to the id's logit."""
    prediction: str | list[int] | None = None
    """Text or ids that the output is expected to resemble, such as a file to be edited. It is drafted by
    adaptive decoding, and where `prompt_lookup` is above 0."""
    grammar: Grammar | None = None
    """The language that the output must belong to; only `HuggingfaceLlamaGenerator` knows the tokenizer."""
    thinking: Thinking | None = None
    """How the output thinks: `Thinking.of(tokenizer, prompt)`. Grammar and stop words begin after it."""

    def __post_init__(self) -> None:
        if self.config is not None:
            check_kind("config", self.config, GenerationConfig)
        streamer = self.streamer
        if not (streamer is None or (hasattr(streamer, "put") and hasattr(streamer, "end"))):
            raise ValueError(f"streamer: must have put(ids) and end(), not {type(streamer).__name__}")
        for name in ("logits_processors", "stopping_criteria", "stop_checks"):
            value = getattr(self, name)
            if not (value is None or callable(value) or isinstance(value, Iterable)):
                raise ValueError(f"{name}: must be a function or a list of them, not {type(value).__name__}")

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt's token ids. Raises ValueError if the prompt is a text."""
        return token_ids(self.prompt, "must be a list of token ids, since a strategy has no tokenizer")

    def processors(self, config: GenerationConfig) -> list[Callable]:
        """All logits processors, as transformers orders them: the config's first, then the request's."""
        bias = {(id_,): float(value) for id_, value in (self.logit_bias or {}).items()}
        biases = [SequenceBiasLogitsProcessor(bias)] if bias else []
        return [*biases, *config_processors(config, len(self.prompt_ids)), *as_list(self.logits_processors)]


def token_ids(prompt: object, allowed: str) -> list[int]:
    """A prompt as a list of integers. Raises ValueError, saying what is `allowed`, for anything else."""
    if isinstance(prompt, Iterable) and not isinstance(prompt, str | bytes | Mapping):
        with suppress(TypeError):
            return [*map(operator.index, prompt)]
    raise ValueError(f"the prompt {allowed}")


def as_list(values: T | Iterable[T] | None) -> list[T]:
    """None: no values; one value: a list of it."""
    if values is None:
        return []
    return list(values) if isinstance(values, Iterable) else [values]


class FrequencyPenaltyLogitsProcessor(LogitsProcessor):
    """Lowers the logit of each id in the output by `presence`, and by `frequency` for each occurrence
    (OpenAI's penalties, which transformers does not have).
    """

    def __init__(self, prompt_length: int, frequency: float, presence: float) -> None:
        self._prompt_length = prompt_length
        self._frequency = frequency
        self._presence = presence

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """input_ids: [1, n] prompt, output and draft; scores: [1, V]"""
        output = input_ids[:, self._prompt_length :]
        counts = torch.zeros_like(scores).scatter_add_(1, output, torch.ones_like(output, dtype=scores.dtype))
        return scores - self._frequency * counts - self._presence * (counts > 0)


def config_processors(config: GenerationConfig, prompt_length: int) -> list[LogitsProcessor]:
    """The processors of a config, in the order of transformers. Processors of a request come later."""
    processors: list[LogitsProcessor] = []
    if config.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.frequency_penalty or config.presence_penalty:
        penalties = (config.frequency_penalty, config.presence_penalty)
        processors.append(FrequencyPenaltyLogitsProcessor(prompt_length, *penalties))
    if config.no_repeat_ngram_size:
        processors.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    return processors
