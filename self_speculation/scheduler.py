"""Continuous batching: requests are added to a batch and finished ones leave it, between two steps."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import abc, deque
from collections.abc import Container, Hashable
from dataclasses import replace
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from transformers import NoRepeatNGramLogitsProcessor, PreTrainedModel

from self_speculation.config import GenerationConfig, GenerationStrategyName
from self_speculation.decoding.batch import Batch
from self_speculation.decoding.sampling import Sampler
from self_speculation.decoding.sequence import Sequence
from self_speculation.decoding.stopping import StopConditions
from self_speculation.generator_base import Request, as_list
from self_speculation.model.captured_runner import PassRange, make_runner, run_every_pass
from self_speculation.model.families import check_supported, check_window, context_length
from self_speculation.model.model_runner import ModelRunner, prefill
from self_speculation.model.overrides import check_followed
from self_speculation.model.prefix_cache import KeptCache, PrefixCache, cache_fingerprint
from self_speculation.results import GenerationStrategyResult

Key = TypeVar("Key")


class Decoding(NamedTuple):
    """What a step works with."""

    batch: Batch
    runner: ModelRunner  # over the cache of the whole batch
    depth: int  # layers that prompts go through
    source: Any = None  # of drafts; None: there are none


class Stepper(ABC):
    """How a strategy decodes, as a scheduler sees it."""

    name: GenerationStrategyName
    has_drafts = True

    def __init__(self) -> None:
        # Of the last scheduler with reuse_cache. A deque: of two threads only one gets it.
        self.kept_caches: deque[KeptCache] = deque(maxlen=1)

    @abstractmethod
    def begin(self, runner: ModelRunner, batch: Batch, config: GenerationConfig) -> Decoding:
        """Get ready for an empty batch. Raises what is wrong with the config."""

    @abstractmethod
    def passes(self, decoding: Decoding) -> abc.Iterator[PassRange]:
        """The passes that `step` can run."""

    @abstractmethod
    def step(self, decoding: Decoding) -> None:
        """Do one round: every sequence gets at least one more token."""


class Scheduler(Generic[Key]):
    """Owns the sequences in flight and their KV cache: `add_request`, `step`, `pop_finished`.

    If a request is invalid, or its processors, criteria or streamer raise, the error is its result and the
    other requests go on. An error in a pass over several rows is raised. Change weights only while the batch
    is empty, and not between construction and the first request.

    Args:
        batch_size: the most sequences at a time.

    Raises:
        ValueError: an unsupported model or config, or a batch size below 1.
    """

    @torch.inference_mode()
    def __init__(
        self, strategy: Stepper, model: PreTrainedModel, config: GenerationConfig, batch_size: int
    ) -> None:
        began = time.perf_counter()
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size}: must be at least 1")
        # The strategy object decides, whatever the config names.
        config = replace(config, generation_strategy=strategy.name)
        check_followed(model)
        check_supported(model.config)
        config.check_depth(model.config.num_hidden_layers)
        self._strategy, self._model, self._config, self._batch_size = strategy, model, config, batch_size
        self._device = model.get_input_embeddings().weight.device
        longest = 0
        if strategy.has_drafts:
            longest = min(config.longest_draft, config.max_steps, context_length(model.config))
        self.batch = Batch(Sampler.of(config), self._device, longest)
        self._prefixes = PrefixCache(batch_size)
        self._fingerprint: Hashable = None  # of what the cache holds; None: it is not kept
        self._decoding: Decoding | None = self._begin()
        self._keys: dict[Sequence, Key] = {}
        self._finished: list[tuple[Key, GenerationStrategyResult | Exception]] = []
        self._setup_time = time.perf_counter() - began  # seconds, part of the first answer's time

    @property
    def has_room(self) -> bool:
        return len(self.batch) < self._batch_size

    @torch.inference_mode()
    def run_every_pass(self, num_positions: int) -> None:
        """With --compile True, capture all passes over up to so many positions before the first request."""
        self._decoding = self._decoding or self._begin()
        passes = self._strategy.passes(self._decoding)
        with self._without_autocast():
            run_every_pass(passes, self._batch_size, num_positions + self.batch.longest_draft)

    @torch.inference_mode()
    def add_request(self, key: Key, request: Request) -> None:
        """Prefill a prompt into a free slot of the cache and pick its first token.

        Args:
            key: identifies the result.

        Raises:
            ValueError: there is no free slot.
        """
        if not self.has_room:
            raise ValueError(f"all {self._batch_size} slots are taken: call pop_finished first")
        started, self._setup_time = time.perf_counter() - self._setup_time, 0.0
        try:
            check_followed(self._model)  # it may have changed since
            sequence = self._new_sequence(request, started)
            self._decoding = self._decoding or self._begin()
            runner, row = self._decoding.runner, len(self.batch)
            runner.reserve(len(sequence.prompt), self._longest_possible(sequence))
            if self._config.reuse_cache:
                sequence.num_cached = self._take_prefix(runner, sequence.prompt)
            alone = runner.for_row(row, sequence.num_cached)
            with self._without_autocast():
                unread = sequence.history()[:, sequence.num_cached :]
                logits = prefill(alone, unread, self._decoding.depth).logits[0]
            self.batch.add(sequence, logits)
            runner.cache.add_row(len(sequence.prompt))
            self._keys[sequence] = key
        except Exception as error:
            self._finished.append((key, error))

    def cancel(self, keys: Container[Key]) -> None:
        """Finish these requests before the next step, with the tokens they have."""
        for sequence, key in self._keys.items():
            if key in keys and sequence.remaining:
                sequence.stop_reason = "stopping_criteria"

    @torch.inference_mode()
    def step(self) -> None:
        """Do one round for all sequences, unless one of them has finished and waits to be popped."""
        if self._decoding and self.batch and self.batch.all_go_on:
            try:
                with self._without_autocast():
                    self._strategy.step(self._decoding)
            except Exception as error:
                self._fingerprint = None
                for sequence in self.batch.sequences:  # the cache may hold half a round: none can go on
                    sequence.error = sequence.error or error
                if len(self.batch) > 1:
                    raise

    @torch.inference_mode()
    def pop_finished(self) -> list[tuple[Key, GenerationStrategyResult | Exception]]:
        """Take out the sequences that have finished; returns their results by key."""
        for row in reversed(range(len(self.batch))):
            if not self.batch.sequences[row].remaining:
                assert self._decoding is not None  # there are rows
                runner, sequence = self._decoding.runner, self.batch.remove(row)
                keep = self._config.reuse_cache and sequence.error is None and not sequence.is_damaged
                if keep:
                    self._prefixes.store(row, sequence.ids[: runner.cache.length(0, row)])
                self._prefixes.swap(row, len(self.batch))
                if runner.has_its_cache:
                    runner.cache.remove_row(row, sequence.is_damaged, keep)
                self._finished.append((self._keys.pop(sequence), sequence.result()))
        if self._decoding is not None and self.batch:
            self._decoding.runner.cache.limit_growth(self._longest_possible())
        elif self._decoding is not None:  # the weights may be others when the next request comes
            if self._fingerprint is not None:
                kept = KeptCache(self._decoding.runner, self._prefixes, self._fingerprint)
                self._strategy.kept_caches.append(kept)
            self._decoding = None
        finished, self._finished = self._finished, []
        return finished

    def _begin(self) -> Decoding:
        """Prepare for the model's current weights."""
        with self._without_autocast():
            runner = self._kept_runner() if self._config.reuse_cache else None
            if runner is None:
                self._prefixes = PrefixCache(self._batch_size)
                runner = make_runner(self._model, 1, 1, self.batch.longest_draft + 1, self._batch_size)
                runner.cache.clear(num_rows=0)
            return self._strategy.begin(runner, self.batch, self._config)

    def _kept_runner(self) -> ModelRunner | None:
        """The runner of an earlier scheduler, if its cache is valid here."""
        depth = -1 if self._strategy.has_drafts else self._config.exit_layer
        of_model = cache_fingerprint(self._model)
        self._fingerprint = (self._batch_size, self.batch.longest_draft, depth, of_model)
        try:
            kept = self._strategy.kept_caches.pop()
        except IndexError:
            return None
        if kept.fingerprint != self._fingerprint or not kept.runner.has_its_cache:
            return None
        self._prefixes = kept.prefixes
        return kept.runner

    def _take_prefix(self, runner: ModelRunner, prompt: abc.Sequence[int]) -> int:
        """Move the longest cached prefix of a prompt into the next row's slot; returns its length."""
        row = len(self.batch)
        slot, length = self._prefixes.match(prompt, row)
        runner.cache.swap(slot, row, max(map(self._prefixes.length, (slot, row))))
        self._prefixes.swap(slot, row)
        self._prefixes.store(row, ())  # from now on it is written to
        return length

    def _longest_possible(self, *others: Sequence) -> int:
        """The most positions that a sequence in flight, or one of the others, can reach."""
        sequences = (*self.batch.sequences, *others)
        return max(sequence.max_length for sequence in sequences) + self.batch.longest_draft

    def _without_autocast(self) -> torch.autocast:
        """Disable the caller's autocast."""
        return torch.autocast(self._device.type, enabled=False)

    def _new_sequence(self, request: Request, started: float) -> Sequence:
        """Raises what `generate_token_ids` does.

        Args:
            started: when its time began.
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
            end_ids=[*as_list(request.eos_token_ids), *(config.stop_token_ids or [])],
            max_tokens=max_tokens,
            at_limit="max_steps" if config.max_steps <= room else "context",
            ends_text=request.ends_text,
            criteria=as_list(request.stopping_criteria),
        )
        # In the order of transformers: the config's processors come before the caller's.
        processors = [NoRepeatNGramLogitsProcessor(n)] if (n := config.no_repeat_ngram_size) else []
        processors += as_list(request.logits_processors)
        generator = None
        if request.seed is not None:
            generator = torch.Generator(self._device).manual_seed(request.seed)
        return Sequence(
            prompt,
            self._device,
            stop,
            processors,
            request.streamer,
            generator,
            self._strategy.has_drafts,
            started,
            Sampler.of(config),
            request.config is None or config.generation_strategy != "autoregressive",
        )
