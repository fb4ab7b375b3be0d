"""Timed generation of examples, by one strategy or by several in turn, and the warm-up before it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice

from transformers import PreTrainedModel

from runs import ranks
from runs.records import Record
from self_speculation import (
    GenerationConfig,
    GenerationResult,
    GenerationStrategy,
    HuggingfaceLlamaGenerator,
    Request,
)
from self_speculation.decoding_strategy import DecodingStrategy
from self_speculation.model.families import attended_length
from self_speculation.scheduler import Scheduler

BASELINE = "autoregressive_"  # prefix of the fields of the strategy that another is compared with

# Batches that a side answers before it is the next one's turn. In the last of them the rows become fewer.
_BATCHES_IN_TURN = 4

# Rounds of a warm-up.
_RUNS = 3

# Fields of a strategy's result that a record has as they are.
_RECORDED = (
    "num_prompt_tokens", "num_cached_tokens", "num_decode_tokens", "stop_reason", "prefill_time",
    "decode_time", "num_verifications", "drafted_by_position", "judged_by_position", "accepted_by_position",
)  # fmt: skip

# One of the strategies compared: the prefix of its fields in the record, what generates, and how.
TimedSide = tuple[str, HuggingfaceLlamaGenerator, GenerationConfig]


def warm_up(sides: Sequence[TimedSide], prompt: str | list[int], batch_size: int = 1) -> None:
    """Run each pass that will be timed three times by each side, with no more tokens than that takes.

    Args:
        prompt: the longest one that will be timed.
    """
    for _, generator, config in sides:
        ids = generator.encode(prompt)
        run_every_pass(generator.generation_strategy, generator.model, ids, config, batch_size)


def run_every_pass(
    strategy: GenerationStrategy,
    model: PreTrainedModel,
    prompt: list[int],
    config: GenerationConfig,
    batch_size: int = 1,
) -> None:
    """Warm up one side; a prompt that fills the context is cut at its beginning."""
    longest = 0 if config.generation_strategy == "autoregressive" else config.longest_draft
    num_tokens = _RUNS * (longest + 1) + 1  # the first one, and what as many rounds may emit
    ids = prompt[-max(1, attended_length(model.config) - num_tokens) :]
    # Rows of different lengths, as those of a batch are. There is room for all of max_steps, and the outputs
    # end long before; end ids are left out too.
    rows = [ids[row % len(ids) :] for row in range(batch_size)]
    requests = [Request(row, ends_text=lambda tokens: len(tokens) >= num_tokens) for row in rows]
    endless = replace(config, stop_words=None, stop_token_ids=None, reuse_cache=False)
    if isinstance(strategy, DecodingStrategy):
        scheduler = Scheduler[int](strategy, model, endless, batch_size)
        scheduler.run_every_pass(min(len(prompt) + config.max_steps, attended_length(model.config)))
    for _, result in strategy.generate_batch(model, requests, endless, batch_size):
        if isinstance(result, Exception):
            raise result


def measure_examples(
    sides: Sequence[TimedSide], requests: Mapping[int, Request], batch_size: int
) -> Iterator[tuple[int, Record | Exception]]:
    """Answer each request by each side, and time it.

    Sides take turns, and take turns at going first: after each request, or after a window of a few batches
    where there are batches. An answer depends on prompt and seed alone, not on what else is generated.

    Yields:
        The index of a request and its record, once all sides have answered it. A side's fields have its
        prefix. Times are in seconds; `processor_time` is that of all threads. `wall_time` is the time since
        the side's answer before: decode times of the rows of a batch overlap, wall times add up. `window` is
        the index of the window's first request.
        Where a side could not answer, the error.
    """
    for number, window in enumerate(windows(requests, batch_size, len(sides))):
        *others, last = sides if number % 2 else sides[::-1]
        place = {"batch_size": batch_size, "window": next(iter(window)), "rank": ranks.rank()}
        measured: dict[int, Record | Exception] = dict.fromkeys(window, place)
        for side in [*others, last]:
            for index, fields in _measured(side, window, batch_size):
                before = measured[index]
                if not isinstance(before, Exception):
                    measured[index] = fields if isinstance(fields, Exception) else {**before, **fields}
                if side is last:
                    yield index, measured[index]


def answers(
    generator: HuggingfaceLlamaGenerator,
    config: GenerationConfig,
    requests: Mapping[int, Request],
    batch_size: int,
) -> Iterator[tuple[int, GenerationResult | Exception]]:
    """Answer requests by one side; yields index and result of each as it ends, or what is wrong with it."""
    indices = list(requests)
    for place, result in generator.generate_batch(list(requests.values()), config, batch_size):
        yield indices[place], result


def windows(requests: Mapping[int, Request], batch_size: int, num_sides: int) -> Iterator[dict[int, Request]]:
    """Split requests into what a side answers before it is the next side's turn."""
    size = 1
    if batch_size > 1:  # the rows of one side alone flow without an end
        size = _BATCHES_IN_TURN * batch_size if num_sides > 1 else max(1, len(requests))
    left = iter(requests.items())
    return iter(lambda: dict(islice(left, size)), {})


def _measured(
    side: TimedSide, window: Mapping[int, Request], batch_size: int
) -> Iterator[tuple[int, Record | Exception]]:
    """Index and fields of each answer of one side, the names of fields with its prefix."""
    prefix, generator, config = side
    started, processor_started = time.perf_counter(), time.process_time()
    for index, result in answers(generator, config, window, batch_size):
        if isinstance(result, Exception):
            yield index, result
            continue
        fields = {**_fields(result), "wall_time": time.perf_counter() - started}
        fields["processor_time"] = time.process_time() - processor_started
        yield index, {f"{prefix}{name}": value for name, value in fields.items() if value is not None}
        # What is done with an answer is not a part of the next one's time.
        started, processor_started = time.perf_counter(), time.process_time()


def _fields(result: GenerationResult) -> Record:
    took = result.generation_strategy_result
    by_source = took.drafts_by_source  # tuples, of which JSON would make nameless lists
    return {
        "prediction": result.decoded_prediction,
        "tokens": took.predicted_tokens,
        "num_tokens": result.num_tokens_generated,
        **{name: getattr(took, name) for name in _RECORDED},
        "drafts_by_source": by_source and {source: counts._asdict() for source, counts in by_source.items()},
    }
