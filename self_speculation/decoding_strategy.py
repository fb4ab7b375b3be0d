"""Everything around the decode loop that the strategies of this library share: requests in, results out.

A strategy decodes the rows in flight until one has ended; that one makes room for the next request.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import NoRepeatNGramLogitsProcessor, PreTrainedModel

from self_speculation.config import GenerationConfig, GenerationStrategyName
from self_speculation.decoding.output import Output
from self_speculation.decoding.rows import Rows
from self_speculation.decoding.sampling import Sampler
from self_speculation.decoding.stopping import StopConditions
from self_speculation.generator_base import (
    Callables,
    GenerationStrategy,
    Request,
    RequestError,
    several,
    the_only,
)
from self_speculation.model.decoder import Decoder, prefill
from self_speculation.model.families import check_supported, check_window, context_length
from self_speculation.model.prepared import prepared
from self_speculation.results import GenerationStrategyResult


@dataclass(frozen=True)
class Decoding:
    """How a strategy goes about the rows that it was given.

    Args:
        decoder: over the cache of all.
        depth: layers that prompts go through.
        go_on: decodes until a row has ended.
    """

    decoder: Decoder
    depth: int
    go_on: Callable[[], None]


class DecodingStrategy(GenerationStrategy):
    """See the module."""

    name: GenerationStrategyName
    has_drafts = True

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
        request = Request(input_ids, eos_token_ids, logits_processors, stopping_criteria, streamer, ends_text)
        return the_only(self.generate_batch(model, [request], generation_config, batch_size=1))

    @torch.inference_mode()
    def generate_batch(
        self,
        model: PreTrainedModel,
        requests: Iterable[Request],
        generation_config: GenerationConfig,
        batch_size: int,
    ) -> Iterator[tuple[int, GenerationStrategyResult]]:
        # The strategy that was made counts, whatever the config calls it.
        config = replace(generation_config, generation_strategy=self.name)
        check_supported(model.config)
        config.check_depth(model.config.num_hidden_layers)
        batch = _Batch(self, model, config, batch_size)
        waiting = iter(requests)
        while True:
            while batch.take_in(waiting):
                pass
            if not batch.rows:
                break
            batch.decoding.go_on()
            yield from batch.take_out()
        if batch.failed is not None:
            raise batch.failed from batch.failed.cause

    def prepare(
        self, model: PreTrainedModel, config: GenerationConfig, context: int, num_rows: int = 1
    ) -> None:
        """What is done once for a model and is not part of an answer's time.

        Args:
            context: positions that a typical pass of the generation will find in the cache.
            num_rows: outputs that will be generated at a time.
        """

    @abstractmethod
    def begin(
        self, model: PreTrainedModel, rows: Rows, first: Output, config: GenerationConfig, batch_size: int
    ) -> Decoding:
        """Get ready for rows of which there are none yet.

        Args:
            rows: where they will come and go, `batch_size` at most.
            first: the first of them.
        """


class _Batch:
    """The rows in flight, their places in the cache, and the requests that they come from."""

    def __init__(
        self, strategy: DecodingStrategy, model: PreTrainedModel, config: GenerationConfig, batch_size: int
    ) -> None:
        self._strategy, self._model, self._config, self._batch_size = strategy, model, config, batch_size
        longest = min(config.longest_draft, config.max_steps, context_length(model.config))
        self._device = model.get_input_embeddings().weight.device
        self.rows = Rows(Sampler.of(config), self._device, longest if strategy.has_drafts else 0)
        self.decoding: Decoding = None  # type: ignore[assignment]  # until there is a row
        self.failed: RequestError | None = None
        self._num_taken = 0
        self._indices: dict[Output, int] = {}

    def take_in(self, requests: Iterator[Request]) -> bool:
        """The next request, if there is one and room for it.

        What is wrong with one of them waits until the others have ended, and no further one is taken.
        """
        if self.failed is not None or len(self.rows) == self._batch_size:
            return False
        try:
            request = next(requests, None)
            if request is None:
                return False
            self._prefill(self._output(request))
        except Exception as error:
            self._fail(self._num_taken, error)
        self._num_taken += 1
        return True

    def take_out(self) -> list[tuple[int, GenerationStrategyResult]]:
        """What has ended. The last row takes the place of each."""
        ended = []
        for row in reversed(range(len(self.rows))):
            if not self.rows.outputs[row].remaining:
                output = self.rows.drop(row)
                self.decoding.decoder.cache.drop(row, bool(output.damage))
                index = self._indices.pop(output)
                try:
                    result = output.result()
                except FloatingPointError as error:
                    self._fail(index, error)
                else:
                    prepared(self._model).vocabulary.count(output.tokens)
                    ended.append((index, result))
        return ended

    def _fail(self, index: int, error: Exception) -> None:
        self.failed = self.failed or RequestError(index, error)

    def _output(self, request: Request) -> Output:
        """Raises what `generate_token_ids` does."""
        model, config = self._model, self._config
        context, prompt = context_length(model.config), request.input_ids
        room = context - len(prompt)
        if not prompt:
            raise ValueError("the prompt has no tokens")
        if room < 1:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens and leaves no room in the model's context of {context}"
            )
        max_tokens = min(config.max_steps, room)
        check_window(model.config, len(prompt) + max_tokens)
        if self.decoding is None:
            typical = (2 * len(prompt) + max_tokens) // 2
            self._strategy.prepare(model, config, typical, self._batch_size)
        stop = StopConditions(
            end_ids=[*several(request.eos_token_ids), *(config.stop_token_ids or [])],
            max_tokens=max_tokens,
            at_limit="max_steps" if config.max_steps <= room else "context",
            ends_text=request.ends_text,
            criteria=several(request.stopping_criteria),
        )
        # In the order of transformers: the config's processors come before the caller's.
        processors = [NoRepeatNGramLogitsProcessor(n)] if (n := config.no_repeat_ngram_size) else []
        processors += several(request.logits_processors)
        generator, has_drafts = None, self._strategy.has_drafts
        if request.seed is not None:
            generator = torch.Generator(self._device).manual_seed(request.seed)
        return Output(prompt, self._device, stop, processors, request.streamer, generator, has_drafts)

    def _prefill(self, output: Output) -> None:
        """Run the prompt through the layers, into a free place of the cache, and pick the first token."""
        if self.decoding is None:
            self.decoding = self._strategy.begin(
                self._model, self.rows, output, self._config, self._batch_size
            )
            self.decoding.decoder.cache.clear(num_rows=0)
        decoder = self.decoding.decoder
        decoder.reserve(output.max_length + self.rows.longest_draft)
        alone = decoder.for_row(len(self.rows))
        self.rows.admit(output, prefill(alone, output.history(), self.decoding.depth).logits[0])
        decoder.cache.admit(len(output.prompt))
        self._indices[output] = self._num_taken
