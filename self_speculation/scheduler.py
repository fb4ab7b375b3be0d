"""Continuous batching: requests join the batch, and finished ones leave it, between two rounds.

A strategy does one round for all sequences in flight; `Scheduler` does everything else.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections import abc, deque
from collections.abc import Container, Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from transformers import PreTrainedModel

from self_speculation.config import GenerationConfig, GenerationStrategyName
from self_speculation.decoding.batch import Batch
from self_speculation.decoding.processors import config_processors
from self_speculation.decoding.sampling import Sampler
from self_speculation.decoding.sequence import Sequence
from self_speculation.decoding.stopping import StopConditions
from self_speculation.drafts.shared import finished_answers
from self_speculation.generator_base import Callables, GenerationStrategy, Request, as_list, single_result
from self_speculation.model.captured_runner import PassRange, make_runner, run_every_pass
from self_speculation.model.families import check_supported, check_window, context_length
from self_speculation.model.model_runner import PREFILL_CHUNK, ModelRunner, forward_early
from self_speculation.model.overrides import check_followed
from self_speculation.model.prefix_cache import KeptCache, PrefixCache, cache_fingerprint
from self_speculation.results import GenerationStrategyResult

Key = TypeVar("Key")


class Decoding(NamedTuple):
    batch: Batch
    runner: ModelRunner
    depth: int  # number of layers that run for prompts
    source: Any = None  # of drafts; None: no drafts


@dataclass(eq=False)
class Prefill:
    """A sequence whose prompt is not read to its end yet."""

    sequence: Sequence
    slot: int
    num_read: int = 0


class DecodingStrategy(GenerationStrategy):
    """A strategy that decodes round by round."""

    name: GenerationStrategyName
    has_drafts = True

    def __init__(self) -> None:
        # The cache of the last scheduler with reuse_cache. A deque, so that only one thread gets it.
        self.kept_caches: deque[KeptCache] = deque(maxlen=1)

    @abstractmethod
    def begin(self, runner: ModelRunner, batch: Batch, config: GenerationConfig) -> Decoding:
        """Get ready for an empty batch."""

    @abstractmethod
    def passes(self, decoding: Decoding) -> abc.Iterator[PassRange]:
        """The passes that `step` can run."""

    @abstractmethod
    def step(self, decoding: Decoding) -> None:
        """Do one round: every sequence gets at least one more token."""

    def prepare(self, model: PreTrainedModel, config: GenerationConfig) -> None:
        """Make what is made once for a model, so that no answer's time includes it."""

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
        request = Request(
            input_ids, logits_processors, stopping_criteria, streamer, eos_token_ids=eos_token_ids
        )
        return single_result(self.generate_batch(model, [request], generation_config, batch_size=1))

    def generate_batch(
        self,
        model: PreTrainedModel,
        requests: Iterable[Request],
        generation_config: GenerationConfig,
        batch_size: int,
    ) -> Iterator[tuple[int, GenerationStrategyResult | Exception]]:
        scheduler: Scheduler[int] = Scheduler(self, model, generation_config, batch_size)
        waiting, may_have_more = enumerate(requests), True
        while may_have_more or scheduler.batch:
            while may_have_more and scheduler.has_room:
                if (request := next(waiting, None)) is None:
                    may_have_more = False
                else:
                    scheduler.add_request(*request)
            scheduler.step()
            yield from scheduler.pop_finished()


class Scheduler(Generic[Key]):
    """Owns the sequences in flight and their KV cache.

    If a request is invalid, or its processors, criteria or streamer raise, the error is its result and the
    other requests go on. An error in a pass over several rows is raised. Change weights only while the batch
    is empty, and not between construction and the first request.

    Args:
        batch_size: the most sequences at a time.
        token_budget: tokens of a step. Decoding sequences come first; prompts are prefilled in chunks of the
            rest, in turn (as in Sarathi-Serve, arXiv 2403.02310). None: a prompt is prefilled at once.

    Raises:
        ValueError: an unsupported model or config, or a batch size below 1.
    """

    @torch.inference_mode()
    def __init__(
        self,
        strategy: DecodingStrategy,
        model: PreTrainedModel,
        config: GenerationConfig,
        batch_size: int,
        token_budget: int | None = None,
    ) -> None:
        began = time.perf_counter()
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size}: must be at least 1")
        # The strategy object overrides the config's name.
        config = replace(config, generation_strategy=strategy.name)
        check_followed(model)
        check_supported(model.config)
        config.check_depth(model.config.num_hidden_layers)
        self._strategy, self._model, self._config, self._batch_size = strategy, model, config, batch_size
        self._token_budget = token_budget
        self._device = model.get_input_embeddings().weight.device
        longest = 0
        if strategy.has_drafts:
            longest = min(config.longest_draft, config.max_steps, context_length(model.config))
        self.batch = Batch(Sampler.of(config), self._device, longest)
        self._prefixes = PrefixCache(batch_size)
        self._fingerprint: Hashable = None  # of the model that filled the cache; None: it is not kept
        self._decoding: Decoding | None = self._begin()
        self._keys: dict[Sequence, Key] = {}
        # In the order of their turns. Their slots are the last ones: `has_room` keeps rows out of them.
        self._prefills: deque[Prefill] = deque()
        self._finished: list[tuple[Key, GenerationStrategyResult | Exception]] = []
        self._setup_time = time.perf_counter() - began  # counts as the first request's

    @property
    def has_room(self) -> bool:
        return len(self.batch) + len(self._prefills) < self._batch_size

    @torch.inference_mode()
    def run_every_pass(self, num_positions: int) -> None:
        """With --compile True, capture all passes over up to so many positions before the first request."""
        self._decoding = self._decoding or self._begin()
        passes = self._strategy.passes(self._decoding)
        with self._without_autocast():
            run_every_pass(passes, self._batch_size, num_positions + self.batch.longest_draft)

    @torch.inference_mode()
    def add_request(self, key: Key, request: Request) -> None:
        """Prefill a prompt and sample its first token; with a token budget, leave that to the next steps.

        Raises:
            ValueError: there is no free slot.
        """
        if not self.has_room:
            raise ValueError(f"all {self._batch_size} slots are taken: call pop_finished first")
        started, self._setup_time = time.perf_counter() - self._setup_time, 0.0
        try:
            check_followed(self._model)  # the model may have changed
            sequence = self._new_sequence(request, started)
        except Exception as error:
            self._finished.append((key, error))
            return
        self._keys[sequence] = key
        if self._token_budget is None:
            self._prefills.append(Prefill(sequence, len(self.batch)))
            while self._prefills:
                self._prefill_chunk(PREFILL_CHUNK)
        else:
            self._prefills.append(Prefill(sequence, self._batch_size - 1 - len(self._prefills)))

    def _prefill_chunk(self, num_tokens: int) -> int:
        """Prefill at most so many tokens of the sequence whose turn it is; its last ones add it to the batch.

        Returns:
            How many.
        """
        prefill, row, num_read = self._prefills[0], len(self.batch), 0
        sequence, prompt = prefill.sequence, prefill.sequence.prompt
        try:
            self._decoding = self._decoding or self._begin()
            runner = self._decoding.runner
            if not prefill.num_read:
                runner.reserve(len(prompt), self._longest_possible())
                if self._config.reuse_cache:
                    prefill.num_read = sequence.num_cached = self._take_prefix(prompt, prefill.slot)
            chunk = sequence.history()[:, prefill.num_read :][:, :num_tokens]
            num_read = chunk.shape[1]
            is_last = prefill.num_read + num_read == len(prompt)
            alone = runner.for_row(prefill.slot, prefill.num_read)
            with self._without_autocast():
                logits = forward_early(alone, chunk, self._decoding.depth, num_logits=int(is_last)).logits
            prefill.num_read += num_read
            self._prefixes.store(prefill.slot, prompt[: prefill.num_read])
            if not is_last:
                self._prefills.rotate(-1)
                return num_read
            self._release(prefill)
            self._swap(prefill.slot, row)
            self._prefixes.store(row, ())  # from now on it is written to
            self.batch.add(sequence, logits[0])
            runner.cache.add_row(len(prompt))
        except Exception as error:
            if prefill in self._prefills:
                self._release(prefill)
            self._finished.append((self._keys.pop(sequence), error))
        return num_read

    def _release(self, prefill: Prefill) -> None:
        """Remove from the queue; the one in the lowest slot moves to its slot."""
        self._prefills.remove(prefill)
        lowest = min(self._prefills, key=lambda other: other.slot, default=prefill)
        if lowest.slot < prefill.slot:
            self._swap(lowest.slot, prefill.slot)
            lowest.slot, prefill.slot = prefill.slot, lowest.slot

    def _swap(self, slot: int, other: int) -> None:
        """Exchange the keys and values of two slots without rows."""
        if slot != other and self._decoding is not None:
            length = max(map(self._prefixes.length, (slot, other)))
            self._decoding.runner.cache.swap(slot, other, length)
            self._prefixes.swap(slot, other)

    @torch.inference_mode()
    def cancel(self, keys: Container[Key]) -> None:
        """Finish these requests before the next step, with the tokens they have."""
        for sequence, key in self._keys.items():
            if key in keys and sequence.remaining:
                sequence.stop_reason = "stopping_criteria"
        for prefill in [prefill for prefill in self._prefills if not prefill.sequence.remaining]:
            self._release(prefill)
            self._finished.append((self._keys.pop(prefill.sequence), prefill.sequence.result()))

    @torch.inference_mode()
    def step(self) -> None:
        """Do one round for all sequences, unless one has finished and waits to be popped; then prefill."""
        if self._decoding and self.batch and self.batch.all_go_on:
            try:
                with self._without_autocast():
                    self._strategy.step(self._decoding)
            except Exception as error:
                self._fingerprint = None
                for sequence in self.batch.sequences:  # the cache may hold half a round
                    sequence.error = sequence.error or error
                if len(self.batch) > 1:
                    raise
        room = PREFILL_CHUNK
        if self.batch:
            room = max(1, (self._token_budget or PREFILL_CHUNK) - len(self.batch))
        while self._prefills and room > 0:
            room -= self._prefill_chunk(room)

    @torch.inference_mode()
    def pop_finished(self) -> list[tuple[Key, GenerationStrategyResult | Exception]]:
        """Remove the finished sequences from the batch; returns their keys and results."""
        for row in reversed(range(len(self.batch))):
            if not self.batch.sequences[row].remaining:
                assert self._decoding is not None
                runner, sequence = self._decoding.runner, self.batch.remove(row)
                if self._config.shared_lookup and self._strategy.has_drafts and sequence.error is None:
                    finished_answers(self._model, self._config.shared_lookup).add(sequence)
                keep = self._config.reuse_cache and sequence.error is None and not sequence.is_damaged
                if keep:
                    self._prefixes.store(row, sequence.ids[: runner.cache.length(0, row)])
                self._prefixes.swap(row, len(self.batch))
                if runner.has_its_cache:
                    runner.cache.remove_row(row, sequence.is_damaged, keep)
                self._finished.append((self._keys.pop(sequence), sequence.result()))
        if self._decoding is not None and (self.batch or self._prefills):
            self._decoding.runner.cache.limit_growth(self._longest_possible())
        elif self._decoding is not None:  # weights may change before the next request
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

    def _take_prefix(self, prompt: abc.Sequence[int], slot: int) -> int:
        """Move the longest cached prefix of a prompt into a slot; returns its length."""
        taken = {prefill.slot for prefill in self._prefills if prefill.num_read}
        free = [free for free in range(len(self.batch), self._batch_size) if free not in taken]
        found, length = self._prefixes.match(prompt, free)
        self._swap(found, slot)
        self._prefixes.store(slot, prompt[:length])
        return length

    def _longest_possible(self) -> int:
        """The most positions that a sequence can reach."""
        sequences = (*self.batch.sequences, *(prefill.sequence for prefill in self._prefills))
        return max(sequence.max_length for sequence in sequences) + self.batch.longest_draft

    def _without_autocast(self) -> torch.autocast:
        """Disable the caller's autocast."""
        return torch.autocast(self._device.type, enabled=False)

    def _new_sequence(self, request: Request, started: float) -> Sequence:
        """Raises what `generate_token_ids` does."""
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
        processors = [
            *config_processors(config, len(prompt), request.logit_bias),
            *as_list(request.logits_processors),
        ]
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
            request.predicted_ids,
        )
