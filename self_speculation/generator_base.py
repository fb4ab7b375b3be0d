"""The contract of a generation strategy, and the front door: text in, text out.

Knows nothing of how tokens are found; that is the strategies' business.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from transformers import NoRepeatNGramLogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from self_speculation.config import GenerationConfig, GenerationStrategyName
from self_speculation.decoding.output import Output
from self_speculation.decoding.stopping import StopConditions, StopWords, continuation
from self_speculation.model.families import check_supported, check_window, context_length
from self_speculation.results import GenerationResult, GenerationStrategyResult

__all__ = [
    "DecodingStrategy",
    "GenerationConfig",
    "GenerationResult",
    "GenerationStrategy",
    "GenerationStrategyResult",
    "HuggingfaceLlamaGenerator",
]

# Prompts of so many characters are looked at before they are tokenized, which takes long: can they fit?
_LONG = 1_000_000

T = TypeVar("T")

# None, one or several; the lists of transformers can be called as well.
Callables = Sequence[Callable] | Callable | None


class GenerationStrategy(ABC):
    """A way to generate token ids: draws them as the model would, stops where they end."""

    @abstractmethod
    def generate_token_ids(
        self,
        model: PreTrainedModel,
        input_ids: list[int],
        eos_token_ids: int | list[int] | None,
        generation_config: GenerationConfig,
        logits_processors: Callables = None,
        stopping_criteria: Callables = None,
        streamer: Any = None,
        ends_text: Callable[[Sequence[int]], bool] | None = None,
    ) -> GenerationStrategyResult:
        """Generate the continuation of `input_ids`.

        Args:
            input_ids: the prompt, at least one id.
            eos_token_ids: one id or several that end the output, besides `generation_config.stop_token_ids`.
            logits_processors: called with the whole history [1, n] and logits [1, V]; one or several.
            stopping_criteria: called after each token with the whole history [1, n] and processed logits [1,
                V]; one or several.
            streamer: see `Output`.
            ends_text: called after each token with the output ids; True ends the output. This is how stop
                words reach a strategy, which has no tokenizer to find them itself.

        Raises:
            ValueError: an empty prompt, one beyond the model's context, or an exit layer that the model does
            not have.
            FloatingPointError: the model's logits are not numbers.
        """


class DecodingStrategy(GenerationStrategy):
    """What the strategies of this library share: everything around the decode loop."""

    name: GenerationStrategyName

    @torch.inference_mode()
    def generate_token_ids(
        self,
        model: PreTrainedModel,
        input_ids: list[int],
        eos_token_ids: int | list[int] | None,
        generation_config: GenerationConfig,
        logits_processors: Callables = None,
        stopping_criteria: Callables = None,
        streamer: Any = None,
        ends_text: Callable[[Sequence[int]], bool] | None = None,
    ) -> GenerationStrategyResult:
        # The strategy that was made counts, whatever the config calls it.
        config = replace(generation_config, generation_strategy=self.name)
        check_supported(model.config)
        config.check_depth(model.config.num_hidden_layers)
        room = context_length(model.config) - len(input_ids)
        if not input_ids:
            raise ValueError("the prompt has no tokens")
        if room < 1:
            raise ValueError(
                f"the prompt has {len(input_ids)} tokens and leaves no room in the model's context of "
                f"{len(input_ids) + room}"
            )
        max_tokens = min(config.max_steps, room)
        check_window(model.config, len(input_ids) + max_tokens)
        stop = StopConditions(
            end_ids=[*_several(eos_token_ids), *(config.stop_token_ids or [])],
            max_tokens=max_tokens,
            at_limit="max_steps" if config.max_steps <= room else "context",
            ends_text=ends_text,
            criteria=_several(stopping_criteria),
        )
        # In the order of transformers: the config's processors come before the caller's.
        processors = [NoRepeatNGramLogitsProcessor(n)] if (n := config.no_repeat_ngram_size) else []
        processors += _several(logits_processors)
        device = model.get_input_embeddings().weight.device
        self.prepare(model, config, (2 * len(input_ids) + max_tokens) // 2)
        output = Output(input_ids, device, stop, processors, streamer)
        self.decode(model, output, config)
        return output.result()

    def prepare(self, model: PreTrainedModel, config: GenerationConfig, context: int) -> None:
        """What is done once for a model and is not part of an answer's time.

        Args:
            context: positions that a typical pass of the generation will find in the cache.
        """

    @abstractmethod
    def decode(self, model: PreTrainedModel, output: Output, config: GenerationConfig) -> None:
        """Commit tokens to `output` until none remain to be generated."""


class HuggingfaceLlamaGenerator:
    """Text in, text out, by a given strategy.

    Args:
        tokenizer: the model's.
        model: a `...ForCausalLM` of transformers, in evaluation mode.
        generation_strategy: how to generate; `make_strategy(name)` makes one.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        generation_strategy: GenerationStrategy,
    ) -> None:
        self.tokenizer = tokenizer
        self.model = model
        self.generation_strategy = generation_strategy

    def generate(
        self,
        prompt: str | list[int],
        generation_config: GenerationConfig,
        streamer: Any = None,
        logits_processors: Callables = None,
        stopping_criteria: Callables = None,
    ) -> GenerationResult:
        """Answer a prompt, given as text or as token ids.

        An empty prompt stands for the tokenizer's BOS token alone, or for its EOS token where it has no BOS.

        Raises:
            ValueError: what `GenerationStrategy.generate_token_ids` raises.
        """
        started = time.perf_counter()
        input_ids = self.encode(prompt)
        stop_words = StopWords(self.tokenizer, generation_config.stop_words or [], input_ids)
        result = self.generation_strategy.generate_token_ids(
            self.model,
            input_ids,
            eos_token_ids=self.eos_token_ids,
            generation_config=generation_config,
            logits_processors=logits_processors,
            stopping_criteria=stopping_criteria,
            streamer=streamer,
            **({"ends_text": stop_words} if stop_words.words else {}),
        )
        text = stop_words.cut(continuation(self.tokenizer, input_ids, result.predicted_tokens))
        total_time = time.perf_counter() - started
        num_tokens = len(result.predicted_tokens)
        return GenerationResult(
            generation_strategy_result=result,
            decoded_prediction=text,
            num_tokens_generated=num_tokens,
            total_time=total_time,
            time_per_token=total_time / max(num_tokens, 1),
            tokens_per_second=num_tokens / total_time,
        )

    def encode(self, prompt: str | list[int], special_tokens: bool = True) -> list[int]:
        """The prompt's token ids, with the special tokens that the tokenizer adds to a text, if wanted.

        Raises:
            ValueError: a text that is so long that there is no need to count its tokens, or a token that the
            model does not know.
        """
        if not isinstance(prompt, str):
            ids = list(prompt)
        elif self.is_far_too_long(prompt):
            raise ValueError(
                f"the prompt has {len(prompt)} characters, far more than the model's context of "
                f"{context_length(self.model.config)} tokens has room for"
            )
        else:
            ids = self.tokenizer.encode(prompt, add_special_tokens=special_tokens)
        if not ids:
            starts = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
            ids = [token for token in starts if token is not None][:1]
        if ids and max(ids) >= (known := self.model.config.vocab_size):
            raise ValueError(
                f"the prompt has the token id {max(ids)}, but the model knows only {known}: is the tokenizer "
                "that of another model?"
            )
        return ids

    def is_far_too_long(self, prompt: str) -> bool:
        """Whether every token would have to be longer than the longest there is; tokenizing takes time."""
        if len(prompt) < _LONG:
            return False
        longest = max(map(len, self.tokenizer.get_vocab()))
        return len(prompt) > longest * context_length(self.model.config)

    @property
    def eos_token_ids(self) -> list[int]:
        """The ids that end an answer, by the tokenizer and by the model's generation config."""
        of_model = getattr(self.model.generation_config, "eos_token_id", None)
        ids = [self.tokenizer.eos_token_id, *(of_model if isinstance(of_model, list) else [of_model])]
        return sorted({i for i in ids if i is not None})


def _several(values: T | Iterable[T] | None) -> list[T]:
    """None, one or several, as a list."""
    if values is None:
        return []
    return list(values) if isinstance(values, Iterable) else [values]
