"""The host's time for a pass, and whether greedy ids are right."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple
from unittest.mock import patch

import torch
from transformers import PreTrainedModel

from measures.comparison import exact_logits, near_tie_bound
from self_speculation.model import captured_runner
from self_speculation.model.captured_runner import capture_decoding, decode_eagerly, make_runner
from self_speculation.model.devices import synchronize
from self_speculation.model.model_runner import ModelRunner


class HostTime(NamedTuple):
    """Microseconds of the host, which does not wait for the device."""

    layer: float  # an eager layer
    captured: float  # a captured pass over all layers; on a CPU without its replay


@torch.inference_mode()
def host_time(model: PreTrainedModel) -> HostTime:
    """The host's time for passes over one token after 32 others."""
    hidden = torch.zeros(1, 32, model.config.hidden_size, dtype=model.dtype, device=model.device)

    def passes(runner: ModelRunner) -> Callable[[int], None]:
        def run(depth: int) -> None:
            runner.cache.set_rows([32])
            runner.run_layers(hidden[:, :1], 0, depth)

        runner.run_layers(hidden, 0, len(runner.layers))
        return run

    def least(run: Callable[[int], None], depth: int) -> float:
        """Microseconds of a call, the least of many."""
        taken = []
        for _ in range(200):
            synchronize(model)
            started = time.perf_counter()
            run(depth)
            taken.append(time.perf_counter() - started)
        return min(taken) * 1e6

    depth = model.config.num_hidden_layers
    eager = passes(ModelRunner(model, 32, 64))
    eager(depth)
    layer = (least(eager, depth) - least(eager, 1)) / (depth - 1)
    no_graphs = patch.object(captured_runner, "GraphRecorder", lambda _: lambda _: bool)
    with nullcontext() if model.device.type == "cuda" else no_graphs:
        capture_decoding(model)
        try:
            captured = least(passes(make_runner(model, 32, 64)), depth)
        finally:
            decode_eagerly(model)
    return HostTime(layer, captured)


@dataclass(frozen=True)
class Judged:
    """Tokens of greedy outputs against the model's choices in fp32 after the same tokens."""

    equal: int = 0
    near_ties: int = 0
    wrong: int = 0  # rounding does not explain them

    def __add__(self, other: Judged) -> Judged:
        return Judged(self.equal + other.equal, self.near_ties + other.near_ties, self.wrong + other.wrong)


def judge_greedy(model: PreTrainedModel, prompt: list[int], output: list[int]) -> Judged:
    """Judge every token of a greedy output; the model's dtype decides the near-tie bound."""
    ids = torch.tensor([[*prompt, *output]], device=model.device)
    logits = exact_logits(model, ids[:, :-1], len(output))
    chosen = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
    gap = logits.amax(-1) - chosen  # [n]
    bound = near_tie_bound(model, logits.abs().amax(-1))
    equal, allowed = int((gap == 0).sum()), int((gap <= bound).sum())
    return Judged(equal, allowed - equal, len(output) - allowed)
