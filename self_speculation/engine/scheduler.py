"""Continuous batching: requests join the batch, and finished ones leave it, between two rounds.

A strategy does one round for all sequences in flight; `Scheduler` does everything else.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Container, Hashable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from typing import Generic, NamedTuple, TypeVar

import torch
from transformers import PreTrainedModel

from self_speculation.backends.kv_cache import KVCache
from self_speculation.backends.runner import PREFILL_CHUNK, ModelRunner, prefill
from self_speculation.backends.runners import is_captured, make_runner
from self_speculation.backends.sampling import Sampler
from self_speculation.backends.unsupported_hooks import check_followed
from self_speculation.config import GenerationConfig, GenerationStrategyName, check_kind
from self_speculation.drafts.composer import DraftComposer
from self_speculation.drafts.registry import DraftContext, make_composer
from self_speculation.engine.batch import Batch
from self_speculation.engine.generation_strategy import GenerationStrategy
from self_speculation.engine.prefix_cache import PrefixCache, cache_key, kept_caches
from self_speculation.machine.devices import padded
from self_speculation.machine.progress import progress
from self_speculation.machine.threads import adjust_threads
from self_speculation.models.families import check_supported, context_length, no_room
from self_speculation.requests.request import Request
from self_speculation.requests.results import GenerationStrategyResult
from self_speculation.requests.sequence import Sequence
from self_speculation.weights.kernels import cpu_operators

RequestId = TypeVar("RequestId")


class RoundInputs(NamedTuple):
    """What a strategy needs for a round."""

    runner: ModelRunner
    prefix_cache: PrefixCache
    batch: Batch
    end_layer: int  # prompts run through the layers before it
    composer: DraftComposer | None  # None: no drafts

    @property
    def cache(self) -> KVCache:
        return self.prefix_cache.cache


class DecodingStrategy(GenerationStrategy, ABC):
    """A strategy that decodes round by round."""

    name: GenerationStrategyName
    has_drafts = False

    @abstractmethod
    def decode_round(self, inputs: RoundInputs) -> None:
        """Do one round: every sequence gets at least one more token, now or in the next round."""

    @torch.inference_mode()
    def prepare(self, model: PreTrainedModel, config: GenerationConfig) -> None:
        """Build draft copies before timing starts. Raises ValueError if the model can have none, or its
        device no cache in the dtype that is asked for.
        """
        runner = make_runner(model)
        runner.cache_dtype(config.cache_dtype)
        if self.has_drafts:
            config = replace(config, generation_strategy=self.name)
            make_composer(DraftContext(runner, config))

    def generate_batch(
        self,
        model: PreTrainedModel,
        requests: Iterable[Request],
        generation_config: GenerationConfig,
        batch_size: int,
    ) -> Iterator[tuple[int, GenerationStrategyResult | Exception]]:
        scheduler: Scheduler[int] = Scheduler(self, model, generation_config, batch_size)
        pending = enumerate(requests)
        while True:
            for index, request in itertools.islice(pending, scheduler.num_free_slots):
                scheduler.add_request(index, request)
            if not scheduler.has_requests:
                return
            scheduler.step()
            yield from scheduler.pop_finished()


class Scheduler(Generic[RequestId]):
    """Admits requests and does rounds for the sequences in flight.

    While requests are there, row i of `batch`, row i of the KV cache and slot i of the `PrefixCache` are one
    sequence's. Only `_prefill` and `_remove_finished` change rows, in all three.

    If a request is invalid, or its processors, criteria or streamer raise, the error is the result of the
    request, and the other requests go on. An error in a round of several rows is raised. Change weights
    only while there are no requests, and not between construction and the first one.

    Args:
        batch_size: the most sequences at a time.
        token_budget: tokens of a step (as in Sarathi-Serve, arXiv 2403.02310). A decoding row counts as one,
            whatever it drafts; pieces of waiting prompts fill the rest, in turn, at least one token. Beside
            decoding rows a token deep in a prompt counts as several. None: prompts are prefilled as a
            whole.

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
        check_kind("generation_config", config, GenerationConfig)
        check_kind("batch_size", batch_size, int)
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size}: must be at least 1")
        # The strategy object overrides the config's name.
        config = replace(config, generation_strategy=strategy.name)
        check_followed(model)
        check_supported(model.config)
        config.check_depth(model.config.num_hidden_layers)
        self._strategy = strategy
        self._model = model
        self._config = config
        self._batch_size = batch_size
        self._token_budget = math.inf if token_budget is None else token_budget
        # A token here costs twice as much as the first one of a prompt: attention takes as long as the
        # products. A layer has about 12 hidden_size^2 weights, and a key takes 2 hidden_size multiply-adds.
        self._double_cost_position = 6 * model.config.hidden_size
        self._device = model.get_input_embeddings().weight.device
        is_cpu = self._device.type == "cpu"
        self._max_pass_tokens = cpu_operators().max_pass_tokens if is_cpu else PREFILL_CHUNK
        self._without_autocast = partial(torch.autocast, self._device.type, enabled=False)
        longest = 0
        self._end_layer = model.config.num_hidden_layers
        if strategy.has_drafts:
            longest = min(config.longest_draft, config.max_steps, context_length(model.config))
        elif config.exit_layer != -1:
            self._end_layer = config.exit_layer
        self.batch = Batch(self._device, longest)
        self._waiting: deque[Sequence] = deque()  # whose prompts are not prefilled yet, in turn
        self._finished: list[tuple[RequestId, GenerationStrategyResult | Exception]] = []
        self._inputs: RoundInputs | None = None  # None: idle, the weights may change
        self._ensure_inputs()

    @property
    def has_requests(self) -> bool:
        """Whether there are requests that have not been popped."""
        return bool(self.batch or self._waiting or self._finished)

    @property
    def num_free_slots(self) -> int:
        return max(0, self._batch_size - len(self.batch) - len(self._waiting))

    @property
    def num_positions(self) -> int:
        """Positions of keys and values that requests have now, shared ones once; any thread may ask."""
        prepared = self._inputs
        repeated = 0 if prepared is None else prepared.prefix_cache.num_repeated
        rows = sum(each.length for each in [*self.batch.sequences])
        return rows + sum(each.num_computed for each in [*self._waiting]) - repeated

    def shrink_cache(self, num_positions: int) -> None:
        """Forget kept prefixes, while there are no requests, if a slot has room for more positions."""
        kept = kept_caches(self._model)
        can_free = not self.has_requests and not is_captured(self._model)  # which keeps the buffers
        if can_free and any(each.cache.buffers.capacity > num_positions for each in kept):
            kept.clear()

    @torch.inference_mode()
    def capture_passes(self, num_positions: int, longest: int = 0) -> None:
        """With --compile True, capture all passes before the first request: do rounds of each kind.

        The cache gets room for `longest` positions, or at least for `num_positions` if memory is short. A
        request that outgrows it ends all captured passes.
        """
        if not is_captured(self._model):
            return
        assert not self.has_requests
        inputs = self._ensure_inputs()
        cache = inputs.cache
        most = num_positions + self.batch.longest_draft
        composers = inputs.composer.one_by_one() if inputs.composer else [None]
        widths = _one_of_each_capture(self.batch.longest_draft + 1)
        rows = _one_of_each_capture(self._batch_size)
        rounds = [*itertools.product(rows, composers, widths, self._settings_of_graphs())]
        with self._without_autocast(), progress("capturing passes", len(rounds), "rounds") as advance:
            cache.reserve(most, max(most, longest))
            try:
                for num_rows, composer, width, (config, watched) in rounds:
                    config = replace(config, max_steps=width + 1)
                    self._rehearse(inputs._replace(composer=composer), num_rows, config, watched)
                    advance(1)
            finally:  # no slot holds what it held
                with cache.buffers.lock:
                    for slot in range(self._batch_size if cache.is_latest else 0):
                        cache.clear_slot(slot)
                prefix_cache = PrefixCache(cache, self._batch_size, inputs.prefix_cache.key)
                self._inputs = inputs._replace(prefix_cache=prefix_cache)

    def _settings_of_graphs(self) -> list[tuple[GenerationConfig, bool]]:
        """A config for each way to sample that has graphs, and whether the host looks at logits."""
        greedy = replace(self._config, sample=False)
        sampled = replace(self._config, sample=True, **asdict(Sampler()))
        return [(greedy, False), (sampled, False), (replace(sampled, top_p=0.5), False), (greedy, True)]

    def _rehearse(self, inputs: RoundInputs, num_rows: int, config: GenerationConfig, watched: bool) -> None:
        """Do a round of so many rows with the longest drafts that the config allows."""
        prompt = [0, 0, 0]  # n-grams find the end in it
        batch = Batch(self._device, config.max_steps - 2)
        for _ in range(num_rows):
            request = Request(prompt, stopping_criteria=[lambda *_: False] if watched else None, seed=0)
            batch.sequences.append(Sequence(request, config, len(prompt) + config.max_steps, self._device))
        inputs.cache.set_rows([len(prompt) - 1] * num_rows)
        self._strategy.decode_round(inputs._replace(batch=batch))

    @torch.inference_mode()
    def add_request(self, request_id: RequestId, request: Request) -> None:
        """Queue a request."""
        config = self._model.config
        has_drafts = self._strategy.has_drafts
        try:
            context = context_length(config)
            length = len(request.prompt_ids)
            if length >= context:
                raise ValueError(no_room(f"{length} tokens", config))
            sequence = Sequence(request, self._config, context, self._device, request_id, has_drafts)
        except Exception as error:
            self._finished.append((request_id, error))
        else:
            self._waiting.append(sequence)

    @torch.inference_mode()
    def cancel(self, request_ids: Container[RequestId]) -> None:
        """Finish the requests with these ids before the next step, with the tokens so far, as "cancelled".
        Callbacks of requests may call it.
        """
        for sequence in (*self.batch.sequences, *self._waiting):
            if sequence.request_id in request_ids and sequence.remaining:
                sequence.stop_reason = "cancelled"

    @torch.inference_mode()
    def step(self) -> None:
        """Prefill waiting prompts, as far as the budget allows, and do one round for all sequences."""
        self._remove_finished()
        left = max(1, self._token_budget - len(self.batch))
        least = 1  # prompts get on in each step
        while chosen := self._schedule_prefill(left, least):
            adjust_threads(self._model)
            left -= sum(width * self._cost(sequence) for sequence, width in chosen)
            least = 0
            with self._without_autocast():
                self._prefill(chosen)
            self._remove_finished()
        if self.batch:
            self._decode()

    @torch.inference_mode()
    def pop_finished(self) -> list[tuple[RequestId, GenerationStrategyResult | Exception]]:
        """The ids and results of the requests that have finished."""
        self._remove_finished()
        if self._inputs is not None and not (self.batch or self._waiting):
            # Leave the cache to the next scheduler; the weights may change.
            if self._inputs.prefix_cache.key is not None:
                kept_caches(self._model).append(self._inputs.prefix_cache)
            self._inputs = None
        finished = self._finished
        self._finished = []
        return finished

    def _decode(self) -> None:
        inputs = self._ensure_inputs()
        adjust_threads(self._model)
        try:
            with self._without_autocast():
                self._strategy.decode_round(inputs)
        except Exception as error:
            inputs.prefix_cache.discard_prefixes()
            for sequence in self.batch.sequences:
                sequence.error = sequence.error or error
            if len(self.batch) > 1:
                raise

    def _remove_finished(self) -> None:
        for sequence in [waiting for waiting in self._waiting if not waiting.remaining]:
            self._waiting.remove(sequence)
            self._finish(sequence)
        rows = [row for row, sequence in enumerate(self.batch.sequences) if not sequence.remaining]
        for row in reversed(rows):
            self._finish(self.batch.remove(row))

    def _finish(self, sequence: Sequence) -> None:
        if sequence.slot is not None:
            self._ensure_inputs().prefix_cache.release(sequence)
        self._finished.append((sequence.request_id, sequence.result()))

    def _cost(self, sequence: Sequence) -> float:
        """The cost of the prompt's next token, relative to its first one. It is 1 if no row decodes."""
        return 1.0 + sequence.num_computed / self._double_cost_position if self.batch else 1.0

    def _schedule_prefill(self, left: float, least: int) -> list[tuple[Sequence, int]] | None:
        """Give slots to new sequences, and pick the prompts of the next prefill pass with the tokens of each:
        the first one in turn, and others that fit beside it. Padding is at most a quarter. None: none fits.

        Args:
            left: the rest of the budget.
            least: tokens of a prompt, whatever they cost.
        """
        new = [sequence for sequence in self._waiting if sequence.slot is None]
        num_free = self._batch_size - len(self.batch) - (len(self._waiting) - len(new))
        for sequence in new[:num_free]:
            with sequence.isolating_errors():
                slots = self._ensure_inputs().prefix_cache
                if not slots.is_prefix_in_prefill(sequence):
                    slots.acquire(sequence)
        ready = [sequence for sequence in self._waiting if sequence.slot is not None]
        chosen = list[tuple[Sequence, int]]()
        is_ragged = self._ensure_inputs().runner.is_ragged
        for sequence in ready:
            cost = self._cost(sequence)
            rest = left - sum(width * self._cost(each) for each, width in chosen)
            affordable = max(0 if chosen else least, rest / cost + 0.5)  # to the nearest
            width = int(min(sequence.num_uncomputed, affordable, PREFILL_CHUNK))
            if width == 0:
                continue
            together = [*chosen, (sequence, width)]
            widths = [width for _, width in together]
            computed = widths if is_ragged else [max(widths)] * len(widths)
            sequences = [each for each, _ in together]
            price = sum(n * self._cost(each) for n, each in zip(computed, sequences, strict=True))
            end = max(each.num_computed + n for n, each in zip(computed, sequences, strict=True))
            is_dense = sum(computed) <= min(self._max_pass_tokens, sum(widths) * 4 / 3)
            fits = is_dense and price <= left + cost / 2 and end <= self._longest(sequences)
            if fits or not chosen:
                chosen = together
        # Slots that are side by side, in this order, need not be moved.
        return sorted(chosen, key=lambda each: each[0].slot or 0) or None

    def _prefill(self, chosen: list[tuple[Sequence, int]]) -> None:
        """Read tokens of each chosen prompt in one pass, or one by one if that fails. A prompt that ends
        joins the batch, another one goes to the end of the queue.
        """
        inputs = self._ensure_inputs()
        sequences = [sequence for sequence, _ in chosen]
        chunks = [each.prompt_ids[each.num_computed : each.num_computed + width] for each, width in chosen]
        ended = [row for row, (each, width) in enumerate(chosen) if each.num_uncomputed <= width]
        try:
            inputs.cache.reserve(max(len(each.prompt_ids) for each in sequences), self._longest(sequences))
            cache = inputs.prefix_cache.prompt_view(sequences)
            logits = prefill(inputs.runner, cache, chunks, inputs.end_layer, ended)
        except Exception as error:
            if len(chosen) == 1:
                sequences[0].error = error
                return
            for each in chosen:
                self._prefill([each])
            return
        for sequence, piece in zip(sequences, chunks, strict=True):
            sequence.num_computed += len(piece)
            self._waiting.remove(sequence)
            self._waiting.append(sequence)
        for sequence, row_logits in zip((sequences[row] for row in ended), logits, strict=True):
            try:
                self.batch.commit_queued()  # of the rows before
                inputs.prefix_cache.join(sequence)
                self.batch.add(sequence, row_logits)
            except Exception as error:
                sequence.error = error
                self._finish(sequence)
            self._waiting.remove(sequence)  # until now, callbacks may cancel it

    def _ensure_inputs(self) -> RoundInputs:
        """Prepare for the model's current weights, unless that is done."""
        if self._inputs is None:
            with self._without_autocast():
                runner = make_runner(self._model)
                prefix_cache = self._make_prefix_cache(runner)
                composer = None
                if self._strategy.has_drafts:
                    composer = make_composer(DraftContext(runner, self._config))
                self._inputs = RoundInputs(runner, prefix_cache, self.batch, self._end_layer, composer)
        return self._inputs

    def _make_prefix_cache(self, runner: ModelRunner) -> PrefixCache:
        """The cache of an earlier scheduler, if it is valid here, or else a new one."""
        key: Hashable = None
        dtype = self._config.cache_dtype
        if self._config.reuse_cache and (weights_valid := cache_key(runner)):
            values_valid = self._end_layer, runner.cache_dtype(dtype)
            key = self._batch_size, self.batch.longest_draft, values_valid, weights_valid
            with suppress(IndexError):
                kept = kept_caches(self._model).pop()
                if kept.key == key and kept.cache.is_latest:
                    return kept
                del kept  # before a new one takes memory
        if is_captured(self._model):
            kept_caches(self._model).clear()  # a captured model has the buffers of one cache
        return PrefixCache(runner.new_cache(1, 1, self._batch_size, dtype), self._batch_size, key)

    def _longest(self, waiting: Iterable[Sequence]) -> int:
        """The most positions that a row, or a waiting sequence, can reach."""
        sequences = (*self.batch.sequences, *waiting)
        return max(sequence.stop_conditions.max_length for sequence in sequences) + self.batch.longest_draft


def _one_of_each_capture(most: int) -> list[int]:
    """Numbers up to `most`, one for each capture: it is made for the next power of two."""
    return [min(1 << power, most) for power in range(padded(most).bit_length())]
