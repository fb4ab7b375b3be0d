"""Sides of a comparison on one loaded model, called alike: `generate` of transformers, and strategies here.

Measurements reach the library through this module: what a change of its interface asks of them is asked here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import psutil
import torch
from tqdm import tqdm

from measures.comparison import with_end
from measures.metrics import peak_memory_mib
from self_speculation import GenerationConfig, GenerationStrategyResult, Request, make_strategy
from self_speculation.generator_base import single_result
from self_speculation.model.captured_runner import capture_decoding, decode_eagerly
from self_speculation.model.traced_runner import trace_at_once

T = TypeVar("T")

TRANSFORMERS, EARLY_EXIT, LOOKUP = "transformers", "transformers, exit", "transformers, lookup"
PLAIN, SPECULATIVE, COPY, ADAPTIVE = "autoregressive", "self-speculative", "int4 copy", "adaptive"


@dataclass(frozen=True)
class Answers:
    """What a side answered to some prompts, and the seconds that it took."""

    ids: list[list[int]]  # of each prompt, the new ones; an end id is among them
    num_first: int  # ids that the passes over prompts gave
    prefill_time: float  # until these, over all batches
    total_time: float
    results: list[GenerationStrategyResult] = field(default_factory=list)  # of a strategy here

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.ids))

    @property
    def num_decoded(self) -> int:
        return self.num_tokens - self.num_first

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.total_time

    @property
    def decode_tokens_per_second(self) -> float:
        return self.num_decoded / (self.total_time - self.prefill_time)


# Prompts, as token ids -> their answers.
Side = Callable[[Sequence[list[int]]], Answers]


def strategies(config: GenerationConfig, copied_layers: int) -> dict[str, GenerationConfig]:
    """Name -> the settings of each way to decode here.

    Args:
        config: has the exit layer and the draft length of self-speculation.
        copied_layers: how many layers the copy in four bits drafts with.
    """
    chosen = replace(config, exit_layer=-1, num_speculations=-1, draft_confidence=None)
    speculative = replace(config, generation_strategy="self_speculative")
    return {
        PLAIN: replace(chosen, generation_strategy="autoregressive"),
        SPECULATIVE: speculative,
        COPY: replace(speculative, exit_layer=copied_layers, draft_weights="int4"),
        ADAPTIVE: replace(chosen, generation_strategy="adaptive"),
    }


def ours(model: Any, end_ids: Sequence[int], config: GenerationConfig, batch_size: int = 1) -> Side:
    """The strategy that `config` names; a row that ends makes room for the next prompt."""
    strategy = make_strategy(config.generation_strategy)
    trace_at_once(model)

    def generate(prompts: Sequence[list[int]]) -> Answers:
        requests = [Request(ids, eos_token_ids=list(end_ids)) for ids in prompts]
        started = time.perf_counter()
        found = dict(strategy.generate_batch(model, requests, config, batch_size))
        took = time.perf_counter() - started
        results = [single_result([(0, found[index])]) for index in range(len(prompts))]
        new = [with_end(result) for result in results]
        return Answers(new, len(new), sum(result.prefill_time for result in results), took, results)

    return generate


class TimingStreamer:
    """A streamer of transformers that notes when it is given how many ids; the prompts come first."""

    def __init__(self) -> None:
        self.given: list[tuple[float, int]] = []

    def put(self, ids: torch.Tensor) -> None:
        self.given.append((time.perf_counter(), ids.numel()))

    def end(self) -> None:
        """The answer is there."""


def theirs(
    model: Any,
    end_ids: Sequence[int],
    config: GenerationConfig,
    batch_size: int = 1,
    assistant: Mapping[str, Any] | None = None,
    **options: Any,
) -> Side:
    """`generate` of transformers, with the length of `config` and its settings of sampling: prompts in their
    order, padded on the left to batches. A batch goes on until its last row has ended.

    Args:
        assistant: see `early_exit`.
        options: of `generate`.
    """
    picking: dict[str, Any] = {"do_sample": not config.greedy}
    if not config.greedy:
        picking |= {name: getattr(config, name) for name in ("temperature", "top_k", "top_p")}

    @torch.inference_mode()
    def generate(prompts: Sequence[list[int]]) -> Answers:
        new: list[list[int]] = []
        num_first, prefill, began = 0, 0.0, time.perf_counter()
        for start in range(0, len(prompts), batch_size):
            batch, streamer = prompts[start : start + batch_size], TimingStreamer()
            started = time.perf_counter()
            width = max(map(len, batch))
            pads = [[0] * (width - len(row)) for row in batch]
            ids = torch.tensor([pad + row for pad, row in zip(pads, batch, strict=True)], device=model.device)
            mask = torch.tensor([pad + [1] * (width - len(pad)) for pad in pads], device=model.device)
            with patch.dict(vars(model.generation_config), assistant or {}):
                output = model.generate(
                    ids, attention_mask=mask, max_new_tokens=config.max_steps, pad_token_id=0,
                    eos_token_id=list(end_ids) or None, streamer=streamer, **picking, **options,
                )  # fmt: skip
            for row in output[:, width:].tolist():  # what follows an end id is padding
                end = next((place for place, token in enumerate(row) if token in end_ids), len(row))
                new.append(row[: end + 1])
            first_at, number = streamer.given[1]
            num_first, prefill = num_first + number, prefill + first_at - started
        return Answers(new, num_first, prefill, time.perf_counter() - began)

    return generate


def early_exit(model: Any, end_ids: Sequence[int], config: GenerationConfig) -> Side:
    """`generate` of transformers, one prompt at a time, with the exit layer and draft length of `config`.

    How long a draft is, transformers reads off the generation config of the assistant, which is the model.
    """
    assistant = {
        "num_assistant_tokens": config.num_speculations,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }
    return theirs(model, end_ids, config, assistant=assistant, assistant_early_exit=config.exit_layer)


def in_turns(
    sides: Mapping[str, Side], groups: Sequence[Sequence[list[int]]], rounds: int, seed: int, title: str
) -> Iterator[dict[str, Answers]]:
    """The answers of all sides to each group of prompts, `rounds` times; another side goes first each time.

    Args:
        seed: of the draws of the first group; the next group has the next one.
    """
    turns = [(turn, number) for turn in range(rounds) for number in range(len(groups))]
    for turn, number in tqdm(turns, desc=title, leave=False):
        answers = {}
        for name in rotated(list(sides), turn + number):
            torch.manual_seed(seed + number)
            answers[name] = sides[name](groups[number])
        yield answers


def rotated(names: list[str], start: int) -> list[str]:
    start %= len(names)
    return names[start:] + names[:start]


def tokens_per_pass(model: Any, side: Side, prompts: Sequence[list[int]]) -> float:
    """Tokens for each pass through all layers, of a side that decodes by the layers of transformers."""
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    hook = model.base_model.layers[-1].register_forward_hook(count)
    try:
        return side(prompts).num_tokens / passes
    finally:
        hook.remove()  # or the layers are no plain ones, and no longer fused


def accepted(answers: Sequence[Answers]) -> tuple[float | None, float | None]:
    """Of a strategy here: tokens of each verification, and the share of drafted tokens that were accepted.

    None where nothing was verified, or drafted.
    """
    names = ("num_decode_tokens", "num_verifications", "num_accepted", "num_drafted")
    counts = [[getattr(result, name) or 0 for name in names] for each in answers for result in each.results]
    decoded, verified, num_accepted, drafted = map(sum, zip(*counts, strict=True)) if counts else (0, 0, 0, 0)
    return decoded / verified if verified else None, num_accepted / drafted if drafted else None


def memory_added(device: torch.device, call: Callable[[], T]) -> tuple[T, float | None]:
    """What a call returns, and the most MiB that it held beyond what was held before it.

    On a CPU these are resident pages of this process, so what it reuses does not count. None where the system
    does not let a peak begin anew.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device) / 2**20
    else:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return call(), None
        before = psutil.Process().memory_info().rss / 2**20
    result = call()
    return result, max(0.0, peak_memory_mib(device) - before)


@contextmanager
def compiled(model: Any) -> Iterator[None]:
    """Within it, strategies here decode by captured passes."""
    capture_decoding(model)
    try:
        yield
    finally:
        decode_eagerly(model)
