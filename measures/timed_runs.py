"""Timed generation of examples by one strategy, or by several in turn, and the warm-up before it."""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count

import torch
from tqdm import tqdm

from runs import ranks
from runs.description import Record
from self_speculation import GenerationConfig, HuggingfaceLlamaGenerator, Request
from self_speculation.backends.runners import is_captured
from self_speculation.engine.scheduler import DecodingStrategy, Scheduler
from self_speculation.models.families import context_length

BASELINE = "autoregressive_"  # prefix of the baseline's fields in a record

# Batches per window. The last batch drains: rows become fewer.
_BATCHES_IN_TURN = 4

# Rounds of a warm-up.
_RUNS = 3

# Fields of a strategy's result that a record copies.
_COPIED = (
    "num_prompt_tokens",
    "num_cached_tokens",
    "num_decode_tokens",
    "prefill_time",
    "decode_time",
    "end_token_id",
)

# A strategy that is compared: the prefix of fields in a record, generator and settings.
TimedSide = tuple[str, HuggingfaceLlamaGenerator, GenerationConfig]


def warm_up(sides: Sequence[TimedSide], prompt: list[int], batch_size: int) -> None:
    """Run every pass that will be timed three times by each side, with as few tokens as possible.

    Args:
        prompt: the longest one; one that fills the context is cut.
    """
    for _, generator, config in sides:
        strategy = generator.generation_strategy
        model = generator.model
        longest = 0 if config.generation_strategy == "autoregressive" else config.longest_draft
        num_tokens = _RUNS * (longest + 1) + 1  # the first one, and all that so many rounds may emit
        context = context_length(model.config)
        ids = prompt[-max(1, context - num_tokens) :]
        # Rows differ in length, as in a real batch. max_steps stays, since it decides the cache's capacity.
        rows = [ids[row % len(ids) :] for row in range(batch_size)]
        requests = [Request(row, stop_checks=lambda new, n=num_tokens: len(new) >= n) for row in rows]
        endless = replace(config, stop_words=None, stop_token_ids=None)
        if is_captured(model) and isinstance(strategy, DecodingStrategy):
            scheduler = Scheduler[int](strategy, model, endless, batch_size)
            scheduler.capture_passes(min(len(prompt) + config.max_steps, context))
        for _, result in strategy.generate_batch(model, requests, endless, batch_size):
            if isinstance(result, Exception):
                raise result


def measure_examples(
    sides: Sequence[TimedSide], requests: deque[tuple[int, Request]], batch_size: int
) -> Iterator[tuple[int, Record | Exception]]:
    """Time each request by each side.

    Sides alternate, and take turns in going first: after each request, or for batches after each window of a
    few batches. A completion depends on prompt and seed alone.

    Args:
        requests: with their indices. They are taken from the left, where the caller may put more.

    Yields:
        The index of a request, and a record or the error of a side. A side's fields have the side's prefix.
        Times are in seconds. `wall_time` is the time since the side's previous completion: wall times of a
        batch add up, while decode times overlap. `window` is the index of the window's first request.
        `threads` is the number at the end of the completion.
    """
    size = 1
    if batch_size > 1:  # a single side never drains a batch
        size = _BATCHES_IN_TURN * batch_size if len(sides) > 1 else len(requests)
    for number in count():
        window = dict(requests.popleft() for _ in range(min(size, len(requests))))
        if not window:
            return
        first = (number + 1) % len(sides)
        *earlier, last = [*sides[first:], *sides[:first]]
        shared = {"batch_size": batch_size, "window": next(iter(window)), "rank": ranks.rank()}
        measured: dict[int, Record | Exception] = dict.fromkeys(window, shared)
        for side in [*earlier, last]:
            for index, fields in _measured(side, window, batch_size):
                before = measured[index]
                if not isinstance(before, Exception):
                    measured[index] = fields if isinstance(fields, Exception) else {**before, **fields}
                if side is last:
                    yield index, measured[index]


def measure_all(
    sides: Sequence[TimedSide], requests: Mapping[int, Request], batch_size: int, title: str | None = None
) -> list[Record]:
    """All records of `measure_examples`; raises the first error. With a title, a bar at a terminal."""
    records = []
    hidden = None if title else True
    found = measure_examples(sides, deque(requests.items()), batch_size)
    for _, record in tqdm(found, title, len(requests), leave=False, disable=hidden):
        if isinstance(record, Exception):
            raise record
        records.append(record)
    return records


def _measured(
    side: TimedSide, window: Mapping[int, Request], batch_size: int
) -> Iterator[tuple[int, Record | Exception]]:
    """Index and prefixed fields of each completion of one side."""
    prefix, generator, config = side
    indices = list(window)
    started = time.perf_counter()
    for i, result in generator.generate_batch(window.values(), config, batch_size):
        if isinstance(result, Exception):
            yield indices[i], result
            continue
        took = result.generation_strategy_result
        fields = {
            "prediction": result.decoded_prediction,
            "tokens": took.predicted_tokens,
            "num_tokens": result.num_tokens_generated,
            "stop_reason": took.stop_reason,
            **{name: getattr(took, name) for name in _COPIED},
            "drafts": took.draft_stats and took.draft_stats.to_rows(),
            "wall_time": time.perf_counter() - started,
            "threads": torch.get_num_threads(),
        }
        yield indices[i], {f"{prefix}{name}": value for name, value in fields.items() if value is not None}
        # The caller's work on a completion is not part of the next one's time.
        started = time.perf_counter()
