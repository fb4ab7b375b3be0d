"""The contract of a generation strategy, and the front door: text in, text out.

Knows nothing of how tokens are found; that is the strategies' business.
"""

from __future__ import annotations

import string
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from self_speculation.config import GenerationConfig
from self_speculation.decoding.stopping import StopWords, continuation
from self_speculation.model.families import context_length
from self_speculation.results import GenerationResult, GenerationStrategyResult

__all__ = [
    "GenerationConfig",
    "GenerationResult",
    "GenerationStrategy",
    "GenerationStrategyResult",
    "HuggingfaceLlamaGenerator",
    "Request",
]

# Other characters may be bytes in a vocabulary, or signs that stand for a space.
_SPELLED_ALIKE = frozenset(string.ascii_letters + string.digits + string.punctuation)
_PIECE = 10_000  # characters of a prompt that are counted at once

T = TypeVar("T")

# None, one or several; the lists of transformers can be called as well.
Callables = Sequence[Callable] | Callable | None


@dataclass(frozen=True)
class Request:
    """A prompt, and all that is its answer's own; see `GenerationStrategy.generate_token_ids`."""

    prompt: str | list[int]
    """Text or token ids; a strategy takes ids alone."""
    logits_processors: Callables = None
    stopping_criteria: Callables = None
    streamer: Any = None
    seed: int | None = None
    """Of the answer's own random numbers, so that they do not depend on what else is in the batch; None: it
    takes torch's."""
    eos_token_ids: int | Sequence[int] | None = None
    """That end the answer. `HuggingfaceLlamaGenerator` adds those of tokenizer and model."""
    ends_text: Callable[[Sequence[int]], bool] | None = None
    """Called after each token with the output ids; True ends the answer. This is how stop words reach a
    strategy, which has no tokenizer to find them itself."""
    config: GenerationConfig | None = None
    """How long this answer may be, how it samples and what ends it; None: as the batch's config says. How
    drafts are made is the batch's, but the strategy "autoregressive" here is an answer without drafts."""

    @property
    def ids(self) -> list[int]:
        """The prompt's, once it is tokenized."""
        assert not isinstance(self.prompt, str), "a strategy takes token ids"
        return self.prompt


@dataclass(frozen=True, kw_only=True)
class PreparedRequest(Request):
    """A request in token ids, with all that ends its answer; see `HuggingfaceLlamaGenerator.prepare`."""

    tokenizer: PreTrainedTokenizerBase
    stop_words: StopWords
    started: float

    def finish(self, result: GenerationStrategyResult) -> GenerationResult:
        """Decode the output up to its stop word."""
        text = self.stop_words.cut(continuation(self.tokenizer, self.ids, result.predicted_tokens))
        total_time = time.perf_counter() - self.started
        num_tokens = len(result.predicted_tokens)
        return GenerationResult(
            generation_strategy_result=result,
            decoded_prediction=text,
            num_tokens_generated=num_tokens,
            total_time=total_time,
            time_per_token=total_time / max(num_tokens, 1),
            tokens_per_second=num_tokens / total_time,
        )


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
    ) -> GenerationStrategyResult:
        """Generate the continuation of `input_ids`.

        Args:
            input_ids: the prompt, at least one id.
            eos_token_ids: one id or several that end the output, besides `generation_config.stop_token_ids`.
            logits_processors: called with the whole history [1, n] and logits [1, V]; one or several.
            stopping_criteria: called after each token with the whole history [1, n] and processed logits [1,
                V]; one or several.
            streamer: see `Sequence`.

        Raises:
            ValueError: an empty prompt, one beyond the model's context, or an exit layer that the model does
            not have.
            FloatingPointError: the model's logits are not numbers.
        """

    def generate_batch(
        self,
        model: PreTrainedModel,
        requests: Iterable[Request],
        generation_config: GenerationConfig,
        batch_size: int,  # noqa: ARG002
    ) -> Iterator[tuple[int, GenerationStrategyResult | Exception]]:
        """Generate the continuation of each request, `batch_size` of them at a time.

        This one does them one after the other, for strategies that know no more than the arguments of the
        paper's `generate_token_ids`.

        Returns:
            The results as they end, each with the index of its request; of a request that something is wrong
            with, the error. The others do not notice.
        """
        for index, request in enumerate(requests):
            if request.seed is not None:
                torch.manual_seed(request.seed)
            processors, criteria = as_list(request.logits_processors), as_list(request.stopping_criteria)
            config = request.config or generation_config
            if n := config.no_repeat_ngram_size:
                processors = [NoRepeatNGramLogitsProcessor(n), *processors]
            if request.ends_text is not None:
                criteria = [*criteria, _as_criterion(request.ends_text, len(request.ids))]
            try:
                result: GenerationStrategyResult | Exception = self.generate_token_ids(
                    model,
                    request.ids,
                    as_list(request.eos_token_ids),
                    config,
                    logits_processors=LogitsProcessorList(processors) if processors else None,
                    stopping_criteria=StoppingCriteriaList(criteria) if criteria else None,
                    streamer=request.streamer,
                )
            except Exception as error:
                result = error
            yield index, result


Ends = Callable[[Sequence[int]], bool]


def _either(first: Ends | None, second: Ends | None) -> Ends | None:
    """What ends a text where one of them does, if there are any."""
    if first is None or second is None:
        return first or second
    return lambda output: first(output) or second(output)


def _as_criterion(ends_text: Callable[[Sequence[int]], bool], prompt_length: int) -> Callable[..., Tensor]:
    """`Request.ends_text` as a stopping criterion of transformers."""
    return lambda ids, *_, **__: torch.tensor([ends_text(ids[0, prompt_length:].tolist())], device=ids.device)


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
        request = Request(prompt, logits_processors, stopping_criteria, streamer)
        return single_result(self.generate_batch([request], generation_config, batch_size=1))

    def generate_batch(
        self,
        prompts: Iterable[str | list[int] | Request],
        generation_config: GenerationConfig,
        batch_size: int = 8,
    ) -> Iterator[tuple[int, GenerationResult | Exception]]:
        """Answer many prompts, `batch_size` of them at a time: where an answer ends, the next prompt begins.

        Each answer is what `generate` gives, whatever else is in the batch.

        Args:
            prompts: any number, asked for one by one as there is room.

        Returns:
            The answers as they end, each with the index of its prompt; of a prompt that something is wrong
            with, the error. Only the time of its prefill is an answer's own; the others are shared with what
            else was in the batch.

        Raises:
            ValueError: batch_size is not at least 1, or an exit layer that the model does not have.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size}: must be at least 1")
        begun: list[tuple[int, PreparedRequest]] = []  # in the order of the strategy
        failed: list[tuple[int, Exception]] = []

        began = time.perf_counter()  # the first answer's time is also that of getting ready

        def requests() -> Iterator[Request]:
            for index, given in enumerate(prompts):
                started = time.perf_counter() if begun else began
                try:
                    request = self.prepare(given, generation_config, started)
                except Exception as error:
                    failed.append((index, error))
                    continue
                begun.append((index, request))
                yield request

        strategy = self.generation_strategy
        for place, result in strategy.generate_batch(self.model, requests(), generation_config, batch_size):
            index, request = begun[place]
            yield index, result if isinstance(result, Exception) else request.finish(result)
        yield from failed

    def prepare(
        self,
        given: str | list[int] | Request,
        generation_config: GenerationConfig,
        started: float | None = None,
    ) -> PreparedRequest:
        """Tokenize a prompt and add what ends its answer.

        Args:
            started: when the request's time began, by `time.perf_counter`; None: now.

        Raises:
            ValueError: what `encode` raises.
        """
        started = time.perf_counter() if started is None else started
        request = given if isinstance(given, Request) else Request(given)
        ids = self.encode(request.prompt)
        words = StopWords(self.tokenizer, (request.config or generation_config).stop_words or [], ids)
        prepared = {
            "prompt": ids,
            "eos_token_ids": [*self.eos_token_ids, *as_list(request.eos_token_ids)],
            "ends_text": _either(words if words.words else None, request.ends_text),
            "tokenizer": self.tokenizer,
            "stop_words": words,
            "started": started,
        }
        return PreparedRequest(**{**vars(request), **prepared})

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
                f"the prompt has {len(prompt)} characters and leaves no room in the model's context of "
                f"{context_length(self.model.config)} tokens"
            )
        else:
            ids = self.tokenizer.encode(prompt, add_special_tokens=special_tokens)
        if not ids:
            starts = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
            ids = [token for token in starts if token is not None][:1]
        known = self.model.config.vocab_size
        if unknown := [id_ for id_ in ids if not 0 <= id_ < known]:
            raise ValueError(
                f"the prompt has the token id {unknown[0]}, but the model knows only {known}: is the "
                "tokenizer that of another model?"
            )
        return ids

    def is_far_too_long(self, prompt: str) -> bool:
        """Whether a text certainly has more tokens than the model's context has room for.

        It is not tokenized, which takes seconds for a million characters. Let m be the length of the longest
        token that has a character. A token of n characters has m >= n for each, so its sum of 1/m is at most
        1, and that of a text is at most its number of tokens.
        """
        room = context_length(self.model.config)
        if len(prompt) <= room:
            return False
        least, longest = 0.0, self._longest_token_with
        for start in range(0, len(prompt), _PIECE):
            counts = Counter(prompt[start : start + _PIECE])
            least += sum(n / longest.get(char, longest["any"]) for char, n in counts.items())
            if least > room:
                return True
        return False

    @cached_property
    def _longest_token_with(self) -> dict[str, int]:
        """Character -> length of the longest token that has it, in characters; "any": of the longest token.

        Only characters that every vocabulary spells as they are.
        """
        of_each: dict[str, int] = {}
        vocabulary = sorted(self.tokenizer.get_vocab(), key=len)
        for token in vocabulary:
            of_each.update(dict.fromkeys(token, len(token)))
        of_each = {char: length for char, length in of_each.items() if char in _SPELLED_ALIKE}
        return {**of_each, "any": len(vocabulary[-1])}

    @property
    def eos_token_ids(self) -> list[int]:
        """The ids that end an answer, by the tokenizer and by the model's generation config."""
        of_model = getattr(self.model.generation_config, "eos_token_id", None)
        ids = [self.tokenizer.eos_token_id, *(of_model if isinstance(of_model, list) else [of_model])]
        return sorted({i for i in ids if i is not None})


def single_result(results: Iterable[tuple[int, T | Exception]]) -> T:
    """The result of a batch of one. Raises what went wrong with it."""
    [(_, result)] = results
    if isinstance(result, Exception):
        raise result
    return result


def as_list(values: T | Iterable[T] | None) -> list[T]:
    """None, one or several, as a list."""
    if values is None:
        return []
    return list(values) if isinstance(values, Iterable) else [values]
