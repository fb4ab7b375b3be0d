"""Everything around the decode loop that the strategies of this library share: requests in, results out.

A strategy decodes the rows in flight by one round. Between two rounds rows come and go.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from transformers import NoRepeatNGramLogitsProcessor, PreTrainedModel

from self_speculation.config import GenerationConfig, GenerationStrategyName
from self_speculation.decoding.output import Output
from self_speculation.decoding.rows import Rows
from self_speculation.decoding.sampling import Sampler
from self_speculation.decoding.stopping import StopConditions
from self_speculation.generator_base import Callables, GenerationStrategy, Request, several, the_only
from self_speculation.model.compiled import make_decoder
from self_speculation.model.decoder import Decoder, prefill
from self_speculation.model.families import check_supported, check_window, context_length
from self_speculation.model.overrides import check_followed
from self_speculation.model.places import KeptCache, Places, state_of
from self_speculation.results import GenerationStrategyResult

Key = TypeVar("Key")


@dataclass(frozen=True)
class Decoding:
    """What the rounds of a batch are made with.

    Args:
        rows: those in flight.
        decoder: over the cache of all.
        depth: layers that prompts go through.
        source: of drafts; None: there are none.
    """

    rows: Rows
    decoder: Decoder
    depth: int
    source: Any = None


class DecodingStrategy(GenerationStrategy):
    """See the module."""

    name: GenerationStrategyName
    has_drafts = True

    def __init__(self) -> None:
        # Of the last batch with reuse_cache. A deque: of two threads only one gets it.
        self.kept_caches: deque[KeptCache] = deque(maxlen=1)

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
        request = Request(
            input_ids,
            logits_processors,
            stopping_criteria,
            streamer,
            eos_token_ids=eos_token_ids,
            ends_text=ends_text,
        )
        return the_only(self.generate_batch(model, [request], generation_config, batch_size=1))

    def generate_batch(
        self,
        model: PreTrainedModel,
        requests: Iterable[Request],
        generation_config: GenerationConfig,
        batch_size: int,
    ) -> Iterator[tuple[int, GenerationStrategyResult | Exception]]:
        batch: Batch[int] = Batch(self, model, generation_config, batch_size)
        waiting, there_may_be_more = enumerate(requests), True
        while there_may_be_more or batch.rows:
            while there_may_be_more and batch.has_room:
                if (following := next(waiting, None)) is None:
                    there_may_be_more = False
                else:
                    batch.admit(*following)
            batch.round()
            yield from batch.take_out()

    def prepare(self, model: PreTrainedModel, config: GenerationConfig) -> None:
        """Make what is made once for a model, such as copies of layers; it is no part of an answer's time."""

    @abstractmethod
    def begin(self, decoder: Decoder, rows: Rows, config: GenerationConfig) -> Decoding:
        """Get ready for rows of which there are none yet. Raises what is wrong with the config."""

    @abstractmethod
    def round(self, decoding: Decoding) -> None:
        """One round of all rows: each is decided on one token more at least."""


class Batch(Generic[Key]):
    """Rows in flight, driven from outside: admit requests, make rounds, take out what has ended.

    A request that something is wrong with, or whose processors, criteria or streamer raise, has the error for
    its result; the others do not notice. What goes wrong in a pass over several rows is raised. Weights may
    change while there are no rows, but not before the first one: what it is made with is what they were then.

    Args:
        batch_size: rows at most.

    Raises:
        ValueError: a model or a config that cannot be decoded with, or no rows at all.
    """

    @torch.inference_mode()
    def __init__(
        self, strategy: DecodingStrategy, model: PreTrainedModel, config: GenerationConfig, batch_size: int
    ) -> None:
        began = time.perf_counter()
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size}: must be at least 1")
        # The strategy that was made counts, whatever the config calls it.
        config = replace(config, generation_strategy=strategy.name)
        check_followed(model)
        check_supported(model.config)
        config.check_depth(model.config.num_hidden_layers)
        self._strategy, self._model, self._config, self._batch_size = strategy, model, config, batch_size
        self._device = model.get_input_embeddings().weight.device
        longest = 0
        if strategy.has_drafts:
            longest = min(config.longest_draft, config.max_steps, context_length(model.config))
        self.rows = Rows(Sampler.of(config), self._device, longest)
        self._places = Places(batch_size)
        self._valid_for: Hashable = None  # what its cache holds, if that is to be kept
        self._decoding: Decoding | None = self._begin()
        self._keys: dict[Output, Key] = {}
        self._ended: list[tuple[Key, GenerationStrategyResult | Exception]] = []
        self._getting_ready = time.perf_counter() - began  # seconds, a part of the first answer's time

    @property
    def has_room(self) -> bool:
        return len(self.rows) < self._batch_size

    @torch.inference_mode()
    def admit(self, key: Key, request: Request) -> None:
        """Run a prompt through the layers, into a free place of the cache, and pick its first token.

        Args:
            key: what to call its result by.

        Raises:
            ValueError: there is no free place.
        """
        if not self.has_room:
            raise ValueError(f"all {self._batch_size} places are taken: take_out what has ended first")
        started, self._getting_ready = time.perf_counter() - self._getting_ready, 0.0
        try:
            check_followed(self._model)  # by now it may be another
            output = self._output(request, started)
            self._decoding = self._decoding or self._begin()
            decoder, row = self._decoding.decoder, len(self.rows)
            decoder.reserve(len(output.prompt), self._reach(output))
            if self._config.reuse_cache:
                output.num_cached = self._take_place(decoder, output.prompt)
            alone = decoder.for_row(row, output.num_cached)
            with self._exactly():
                unread = output.history()[:, output.num_cached :]
                logits = prefill(alone, unread, self._decoding.depth).logits[0]
            self.rows.admit(output, logits)
            decoder.cache.admit(len(output.prompt))
            self._keys[output] = key
        except Exception as error:
            self._ended.append((key, error))

    def _reach(self, *others: Output) -> int:
        """The most positions that the rows in flight, and others, can come to."""
        outputs = (*self.rows.outputs, *others)
        return max(output.max_length for output in outputs) + self.rows.longest_draft

    def _begin(self) -> Decoding:
        """Get ready for the weights of now."""
        with self._exactly():
            decoder = self._kept_decoder() if self._config.reuse_cache else None
            if decoder is None:
                self._places = Places(self._batch_size)
                decoder = make_decoder(self._model, 1, 1, self.rows.longest_draft + 1, self._batch_size)
                decoder.cache.clear(num_rows=0)
            return self._strategy.begin(decoder, self.rows, self._config)

    def _kept_decoder(self) -> Decoder | None:
        """That of an earlier batch, with what its cache holds, if this one would have such a cache."""
        depth = -1 if self._strategy.has_drafts else self._config.exit_layer
        self._valid_for = (self._batch_size, self.rows.longest_draft, depth, state_of(self._model))
        try:
            kept = self._strategy.kept_caches.pop()
        except IndexError:
            return None
        if kept.valid_for != self._valid_for or not kept.decoder.has_its_cache:
            return None
        self._places = kept.places
        return kept.decoder

    def _take_place(self, decoder: Decoder, prompt: Sequence[int]) -> int:
        """Have the free place that holds most of a prompt be the next row's; how many tokens it holds."""
        row = len(self.rows)
        place, length = self._places.best(prompt, row)
        decoder.cache.swap(place, row, max(map(self._places.length, (place, row))))
        self._places.swap(place, row)
        self._places.leave(row, ())  # from now on it is written to
        return length

    def cancel(self, keys: Container[Key]) -> None:
        """End these requests before the next round; their results have the tokens so far."""
        for output, key in self._keys.items():
            if key in keys and output.remaining:
                output.stop_reason = "stopping_criteria"

    @torch.inference_mode()
    def round(self) -> None:
        """One round of the rows that there are."""
        if self._decoding and self.rows and self.rows.all_go_on:  # else there are none, or some to take out
            try:
                with self._exactly():
                    self._strategy.round(self._decoding)
            except Exception as error:
                self._valid_for = None
                for output in self.rows.outputs:  # half of a round may be in the cache: none can go on
                    output.error = output.error or error
                if len(self.rows) > 1:
                    raise

    @torch.inference_mode()
    def take_out(self) -> list[tuple[Key, GenerationStrategyResult | Exception]]:
        """What has ended, by the keys of the requests. The last row takes the place of each."""
        for row in reversed(range(len(self.rows))):
            if not self.rows.outputs[row].remaining:
                assert self._decoding is not None  # there are rows
                decoder, output = self._decoding.decoder, self.rows.drop(row)
                keep = self._config.reuse_cache and output.error is None and not output.is_damaged
                if keep:
                    self._places.leave(row, output.ids[: decoder.cache.length(0, row)])
                self._places.swap(row, len(self.rows))
                decoder.drop(row, output.is_damaged, keep)
                self._ended.append((self._keys.pop(output), output.result()))
        if self._decoding is not None and self.rows:
            self._decoding.decoder.cache.limit_growth(self._reach())
        elif self._decoding is not None:  # by the next request the weights may be others
            if self._valid_for is not None:
                kept = KeptCache(self._decoding.decoder, self._places, self._valid_for)
                self._strategy.kept_caches.append(kept)
            self._decoding = None
        ended, self._ended = self._ended, []
        return ended

    def _exactly(self) -> torch.autocast:
        """The model is what it is, whatever format a caller would have products computed in."""
        return torch.autocast(self._device.type, enabled=False)

    def _output(self, request: Request, started: float) -> Output:
        """Raises what `generate_token_ids` does.

        Args:
            started: when its time began; of the first one, with getting ready.
        """
        model, config = self._model, request.config or self._config
        context, prompt = context_length(model.config), request.ids
        room = context - len(prompt)
        if not prompt:
            raise ValueError("the prompt has no tokens")
        if room < 1:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens and leaves no room in the model's context of {context}"
            )
        max_tokens = min(config.max_steps, room)
        check_window(model.config, len(prompt) + max_tokens)
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
        return Output(
            prompt,
            self._device,
            stop,
            processors,
            request.streamer,
            generator,
            has_drafts,
            started,
            Sampler.of(config),
            request.config is None or config.generation_strategy != "autoregressive",
        )
