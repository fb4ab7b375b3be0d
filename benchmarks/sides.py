"""The sides of a comparison on one loaded model: `generate` of transformers, and our strategies."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any
from unittest.mock import patch

import torch
from tqdm import tqdm

from measures.comparison import with_end
from self_speculation import GenerationConfig, GenerationStrategyResult, Request, make_strategy
from self_speculation.generator_base import single_result
from self_speculation.results import DraftStats

TRANSFORMERS, EARLY_EXIT, LOOKUP = "transformers", "transformers, exit", "transformers, lookup"
PLAIN, SPECULATIVE, COPY, ADAPTIVE = "without drafts", "self-speculative", "4-bit copy", "adaptive"


@dataclass(frozen=True)
class Answers:
    """The completions of one side, and its times in seconds; `+` joins them."""

    ids: list[list[int]]  # of each prompt, the new ones with the end id
    num_first: int  # ids from the passes over prompts
    prefill_time: float  # over all batches
    total_time: float
    results: list[GenerationStrategyResult] = field(default_factory=list)  # of a strategy here
    num_verifications: int = 0  # of transformers' drafts
    threads: list[int] = field(default_factory=lambda: [torch.get_num_threads()])  # at the end of each turn

    def __add__(self, other: Answers) -> Answers:
        return Answers(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))

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

    @property
    def draft_stats(self) -> DraftStats:
        """Of a strategy here."""
        return sum((result.draft_stats or DraftStats() for result in self.results), DraftStats())

    @property
    def tokens_per_verification(self) -> float | None:
        """None without drafts."""
        if self.num_verifications:
            return self.num_tokens / self.num_verifications
        return self.draft_stats.mean_accepted_length

    def acceptance_rate(self, num_speculations: int) -> float | None:
        """Accepted / drafted tokens; None without drafts. transformers drafts so many in each round."""
        if self.num_verifications:
            return (self.num_tokens / self.num_verifications - 1) / num_speculations
        return self.draft_stats.acceptance_rate


# Prompts as token ids -> their completions.
Side = Callable[[Sequence[list[int]]], Answers]


def strategies(config: GenerationConfig, copied_layers: int) -> dict[str, GenerationConfig]:
    """Name -> settings of each strategy here.

    Args:
        config: exit layer and draft length of self-speculation.
        copied_layers: layers of the 4-bit copy that drafts.
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
    """The strategy of `config`, with continuous batching."""
    strategy = make_strategy(config.generation_strategy)

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
    """A streamer of transformers that notes the time and size of each `put`; first come the prompts."""

    def __init__(self) -> None:
        self.given: list[tuple[float, int]] = []

    def put(self, ids: torch.Tensor) -> None:
        self.given.append((time.perf_counter(), ids.numel()))

    def end(self) -> None:
        """Required by transformers."""


def theirs(name: str, model: Any, end_ids: Sequence[int], config: GenerationConfig, size: int = 1) -> Side:
    """Greedy `generate` of transformers, over batches of prompts in order, padded on the left.

    Args:
        name: TRANSFORMERS; EARLY_EXIT or LOOKUP, which take one prompt at a time.
    """
    options: dict[str, Any] = {"do_sample": False}
    assistant: dict[str, Any] = {}
    if name == LOOKUP:
        options["prompt_lookup_num_tokens"] = config.num_speculations
    elif name == EARLY_EXIT:
        options["assistant_early_exit"] = config.exit_layer
        # transformers reads the draft length off the assistant's generation config: the model's own.
        assistant = {
            "num_assistant_tokens": config.num_speculations,
            "num_assistant_tokens_schedule": "constant",
            "assistant_confidence_threshold": 0.0,
        }

    @torch.inference_mode()
    def generate(prompts: Sequence[list[int]]) -> Answers:
        new: list[list[int]] = []
        num_first, verifications, prefill, began = 0, 0, 0.0, time.perf_counter()
        for start in range(0, len(prompts), size):
            batch, streamer = prompts[start : start + size], TimingStreamer()
            started = time.perf_counter()
            width = max(map(len, batch))
            pads = [[0] * (width - len(row)) for row in batch]
            ids = torch.tensor([pad + row for pad, row in zip(pads, batch, strict=True)], device=model.device)
            mask = torch.tensor([pad + [1] * (width - len(pad)) for pad in pads], device=model.device)
            with patch.dict(vars(model.generation_config), assistant):
                output = model.generate(
                    ids, attention_mask=mask, max_new_tokens=config.max_steps, pad_token_id=0,
                    eos_token_id=list(end_ids) or None, streamer=streamer, **options,
                )  # fmt: skip
            for row in output[:, width:].tolist():
                end = next((i for i, token in enumerate(row) if token in end_ids), len(row))
                new.append(row[: end + 1])  # padding follows
            first_at, number = streamer.given[1]
            num_first, prefill = num_first + number, prefill + first_at - started
            if name != TRANSFORMERS:
                verifications += len(streamer.given) - 1  # each of them is followed by one `put`
        took = time.perf_counter() - began
        return Answers(new, num_first, prefill, took, num_verifications=verifications)

    return generate


def in_turns(
    sides: Mapping[str, Side], groups: Sequence[Sequence[list[int]]], rounds: int, seed: int, title: str
) -> Iterator[dict[str, Answers]]:
    """The completions of each group of prompts by all sides, `rounds` times; sides alternate in going first.

    Args:
        seed: of the first group; each group has its own.
    """
    turns = [(turn, number) for turn in range(rounds) for number in range(len(groups))]
    for turn, number in tqdm(turns, desc=title, leave=False, disable=None):
        answers = {}
        for name in rotated(list(sides), turn + number):
            torch.manual_seed(seed + number)
            answers[name] = sides[name](groups[number])
        yield answers


def rotated(names: list[str], start: int) -> list[str]:
    start %= len(names)
    return names[start:] + names[:start]
