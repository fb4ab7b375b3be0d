"""The generator: text in, text out."""

import time
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from queue import LifoQueue
from typing import Any

from jinja2 import TemplateError
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.generation import BaseStreamer

from self_speculation.config import GenerationConfig, check_kind
from self_speculation.engine.generation_strategy import GenerationStrategy, single_result
from self_speculation.engine.strategies import make_strategy
from self_speculation.models.families import context_length, no_room
from self_speculation.requests.request import Callables, Request, as_list, token_ids
from self_speculation.requests.results import GenerationResult, GenerationStrategyResult
from self_speculation.text.grammar import GrammarProcessor, tokenizer_json
from self_speculation.text.grammar_sandbox import GrammarSandbox
from self_speculation.text.texts import OutputReader

_CHARACTERS = 20  # that a token of a prediction has on average, at most
_USUAL = 8  # characters of a token: with more on average, a text is strange


@lru_cache(maxsize=4)
def _sandboxes(*tokenizer: Hashable) -> LifoQueue[GrammarSandbox]:
    """Generators with one tokenizer share two, of which the second one starts when the first one is busy."""
    sandboxes = LifoQueue[GrammarSandbox]()
    for _ in range(2):
        sandboxes.put(GrammarSandbox(*tokenizer))
    return sandboxes


@lru_cache(maxsize=4)
def _longest_token(tokenizer: PreTrainedTokenizerBase, *_: Hashable) -> int:
    """Characters. Listing a vocabulary takes time; its size is part of the key, since it may grow."""
    return max(map(len, tokenizer.get_vocab()))


@dataclass(frozen=True, kw_only=True)
class TokenizedRequest(Request):
    """A request in token ids, with all that ends the answer; see `HuggingfaceLlamaGenerator.tokenize`."""

    reader: OutputReader
    started: float

    def finish(self, result: GenerationStrategyResult) -> GenerationResult:
        """Decode the output up to the stop word, and separate thinking from answer."""
        reader = self.reader
        reader.end(result.predicted_tokens)
        total_time = time.perf_counter() - self.started
        num_tokens = len(result.predicted_tokens)
        return GenerationResult(
            generation_strategy_result=result,
            decoded_prediction=reader.answer[: reader.num_settled()],
            num_tokens_generated=num_tokens,
            total_time=total_time,
            time_per_token=total_time / max(num_tokens, 1),
            tokens_per_second=num_tokens / total_time,
            thinking=reader.thinking,
            num_thinking_tokens=reader.num_thinking,
        )


class HuggingfaceLlamaGenerator:
    """Generates text with a strategy.

    Args:
        tokenizer: the model's.
        model: a `...ForCausalLM` of transformers, in evaluation mode.
        generation_strategy: None: `make_strategy` makes the one that each call's config names.
    """

    sandboxes: LifoQueue[GrammarSandbox] | None = None  # those that are free, see `use_sandbox`

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model: PreTrainedModel,
        generation_strategy: GenerationStrategy | None = None,
    ) -> None:
        check_kind("tokenizer", tokenizer, PreTrainedTokenizerBase)
        if generation_strategy is not None:
            check_kind(
                "generation_strategy", generation_strategy, GenerationStrategy, " of make_strategy(name)"
            )
        self.tokenizer = tokenizer
        self.model = model
        self.generation_strategy = generation_strategy

    def generate(
        self,
        prompt: str | list[int] | Request,
        generation_config: GenerationConfig,
        streamer: BaseStreamer | None = None,
        logits_processors: Callables = None,
        stopping_criteria: Callables = None,
    ) -> GenerationResult:
        """Answer a prompt: text, token ids, or a `Request` that has the other arguments itself.

        An empty prompt becomes the tokenizer's BOS token, or the EOS token if there is no BOS.

        Raises:
            ValueError: see `GenerationStrategy.generate_token_ids`.
        """
        if not isinstance(prompt, Request):
            prompt = Request(prompt, logits_processors, stopping_criteria, streamer)
        return single_result(self.generate_batch([prompt], generation_config, batch_size=1))

    def generate_batch(
        self,
        prompts: Iterable[str | list[int] | Request],
        generation_config: GenerationConfig,
        batch_size: int = 8,
    ) -> Iterator[tuple[int, GenerationResult | Exception]]:
        """Answer many prompts, `batch_size` at a time. A new prompt starts as soon as an answer ends.

        Each answer is equal to the answer of `generate`.

        Args:
            prompts: read one by one, as slots become free.

        Yields:
            The index of a finished prompt, and the result or the error. Times are shared with the batch.

        Raises:
            ValueError: batch_size below 1, or an exit layer that the model does not have.
        """
        check_kind("generation_config", generation_config, GenerationConfig)
        if isinstance(prompts, str | bytes | Mapping | Request) or not isinstance(prompts, Iterable):
            raise ValueError("prompts: must be a list of prompts; generate takes a single one")
        began = time.perf_counter()  # the first answer's time includes the setup
        begun: list[tuple[int, TokenizedRequest]] = []  # in the order of the strategy
        failed: list[tuple[int, Exception]] = []

        def requests() -> Iterator[Request]:
            for index, given in enumerate(prompts):
                started = time.perf_counter() if begun else began
                try:
                    begun.append((index, self.tokenize(given, generation_config, started)))
                except Exception as error:
                    failed.append((index, error))
                else:
                    yield begun[-1][1]

        strategy = self.generation_strategy or make_strategy(generation_config.generation_strategy)
        for order, result in strategy.generate_batch(self.model, requests(), generation_config, batch_size):
            index, request = begun[order]
            yield index, result if isinstance(result, Exception) else request.finish(result)
        yield from failed

    def tokenize(
        self,
        given: str | list[int] | Request,
        generation_config: GenerationConfig,
        started: float | None = None,
    ) -> TokenizedRequest:
        """Prepare a request for a strategy: ids of prompt and prediction, end ids, the reader of stop words
        and thinking, and the compiled grammar.

        Args:
            started: when the request's time began, by `time.perf_counter`; None: now.

        Raises:
            ValueError: see `encode`; or an invalid grammar, as a GrammarError.
        """
        started = time.perf_counter() if started is None else started
        request = given if isinstance(given, Request) else Request(given)
        ids = self.encode(request.prompt)
        config = request.config or generation_config
        reader = OutputReader(self.tokenizer, config.stop_words or [], ids, request.thinking)
        is_read = reader.words or request.thinking is not None
        stop_checks = [*([reader] if is_read else []), *as_list(request.stop_checks)]
        if request.streamer is not None and hasattr(request.streamer, "begin"):
            request.streamer.begin(reader)
        ends = [*self.eos_token_ids, *as_list(request.eos_token_ids)]
        processors: list[object] = as_list(request.logits_processors)
        if (grammar := request.grammar) is not None:
            if request.thinking is not None:
                all_ends = [*ends, *(config.stop_token_ids or [])]
                grammar = grammar.after(request.thinking, self.tokenizer.added_tokens_decoder, all_ends)
            if self.sandboxes is not None:
                sandbox = self.sandboxes.get()
                try:
                    sandbox.check(grammar.definition)
                finally:
                    self.sandboxes.put(sandbox)
            size = self.model.config.vocab_size
            processors += [GrammarProcessor(grammar, self.tokenizer, size, ends)]
        prediction = request.prediction
        if isinstance(prediction, str):
            prediction = self.encode_prediction(prediction, config)
        tokenized = {"prompt": ids, "logits_processors": processors, "prediction": prediction}
        tokenized |= {"eos_token_ids": ends, "stop_checks": stop_checks}
        return TokenizedRequest(**{**vars(request), **tokenized}, reader=reader, started=started)

    def encode(self, prompt: str | list[int], special_tokens: bool = True) -> list[int]:
        """The prompt's token ids.

        Args:
            special_tokens: add those that the tokenizer adds to a text.

        Raises:
            ValueError: a text that certainly does not fit, or a token id that the model does not have.
        """
        if not isinstance(prompt, str):
            allowed = "must be a text or a list of token ids; generate_batch takes several prompts"
            ids = token_ids(prompt, allowed)
        elif self.is_far_too_long(prompt):
            raise ValueError(no_room(f"{len(prompt)} characters", self.model.config))
        else:
            ids = self.tokenizer.encode(prompt, add_special_tokens=special_tokens)
        starts = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        ids = ids or [token for token in starts if token is not None][:1]
        known = self.model.config.vocab_size
        if unknown := [id_ for id_ in ids if not 0 <= id_ < known]:
            raise ValueError(
                f"the prompt has the token id {unknown[0]}, but the model knows only {known}: is the "
                "tokenizer that of another model?"
            )
        return ids

    def render_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        template_kwargs: Mapping[str, object],
        **options: object,
    ) -> Any:
        """The prompt for the next turn, by the tokenizer's chat template.

        Args:
            template_kwargs: variables of the template, such as enable_thinking. It ignores unknown ones.
            options: further arguments of `apply_chat_template`, which returns a text without them.

        Raises:
            ValueError: the template cannot render this.
        """
        given = {"add_generation_prompt": True, "tokenize": False, **options}
        try:
            return self.tokenizer.apply_chat_template(messages, **template_kwargs, **given)
        except (TemplateError, TypeError, AttributeError, ArithmeticError) as error:  # of a variable's value
            raise ValueError(f"the chat template fails: {error}") from error

    def use_sandbox(self) -> None:
        """From now on try each grammar in a separate process first, see `GrammarSandbox`, two at a time."""
        if isinstance(self.tokenizer, PreTrainedTokenizerFast):  # a slow one can have no grammar
            size = self.model.config.vocab_size
            self.sandboxes = _sandboxes(tokenizer_json(self.tokenizer), size, tuple(self.eos_token_ids))

    def encode_prediction(self, text: str, config: GenerationConfig) -> list[int]:
        """The token ids of a predicted output, up to the context's length; none if no draft uses them."""
        if not config.looks_up:
            return []
        context = context_length(self.model.config)
        # A prediction may be far longer than the context.
        return self.tokenizer.encode(text[: _CHARACTERS * context], add_special_tokens=False)[:context]

    def is_far_too_long(self, prompt: str) -> bool:
        """Whether a text certainly has more tokens than the context: all of them could not spell it, or the
        start of it has more already. Tokenizing takes seconds for a million characters.
        """
        context = context_length(self.model.config)
        if len(prompt) <= context * _USUAL:
            return False
        longest = _longest_token(self.tokenizer, len(self.tokenizer))
        if len(prompt) > context * longest:
            return True
        start = self.tokenizer.encode(prompt[: context * _USUAL], add_special_tokens=False)
        return len(start) > context + longest  # the last token may be cut into so many

    @property
    def eos_token_ids(self) -> list[int]:
        """EOS ids of the tokenizer and the model's generation config."""
        model_ids = getattr(self.model.generation_config, "eos_token_id", None)
        return sorted({self.tokenizer.eos_token_id, *as_list(model_ids)} - {None})
