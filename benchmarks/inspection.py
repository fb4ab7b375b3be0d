"""Inspect completions: work of a token, the host's time for a pass, and whether greedy ids are right."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch.autograd import DeviceType
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from measures.comparison import exact_logits, near_tie_bound
from self_speculation.model import captured_runner
from self_speculation.model.captured_runner import capture_decoding, decode_eagerly, make_runner
from self_speculation.model.devices import synchronize
from self_speculation.model.model_runner import ModelRunner


class Work(NamedTuple):
    kernels: float  # on a GPU, with those of replayed graphs; on a CPU, operators
    reads: float  # copies to the host, each of which waits for the device


def work_per_token(device: torch.device, first: Callable[[], int], more: Callable[[], int]) -> Work | None:
    """The work of one decoded token; None where the driver does not allow profiling.

    Args:
        first, more: each generates an answer to the same prompt, `more` a longer one, and returns its length.
            Their common prefill cancels out.
    """
    num_first, before = _profiled(device, first)
    num_more, after = _profiled(device, more)
    if not after.kernels or num_more == num_first:
        return None
    return Work(*((b - a) / (num_more - num_first) for a, b in zip(before, after, strict=True)))


def _profiled(device: torch.device, call: Callable[[], int]) -> tuple[int, Work]:
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        result = call()
        if on_gpu:
            torch.cuda.synchronize(device)
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    names = [e.name for e in profiler.events() if e.device_type == kind and not e.is_user_annotation]
    reads = sum(name.startswith(("Memcpy DtoH", "aten::_local_scalar_dense")) for name in names)
    return result, Work(sum(not name.startswith(("Memcpy", "Memset")) for name in names), reads)


class HostTime(NamedTuple):
    """Microseconds of the host, which does not wait for the device."""

    layer: float  # an eager layer
    python: float  # of these, all but the calls of torch
    captured: float  # a captured pass over all layers; on a CPU without its replay


class _Calls(TorchFunctionMode):
    """Records calls of torch, to make them again without the code between them."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[Any] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._calls.append((function, args, kwargs or {}))
        return function(*args, **kwargs or {})

    def again(self) -> None:
        for function, args, kwargs in self._calls:
            function(*args, **kwargs)


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

    def least(run: Callable[..., None], *args: int) -> float:
        """Microseconds of a call, the least of many."""
        taken = []
        for _ in range(200):
            synchronize(model)
            started = time.perf_counter()
            run(*args)
            taken.append(time.perf_counter() - started)
        return min(taken) * 1e6

    depth, calls = model.config.num_hidden_layers, (_Calls(), _Calls())
    eager = passes(ModelRunner(model, 32, 64))
    eager(depth)
    for number, record in zip((1, depth), calls, strict=True):
        with record:
            eager(number)
    layer = (least(eager, depth) - least(eager, 1)) / (depth - 1)
    only_calls = (least(calls[1].again) - least(calls[0].again)) / (depth - 1)
    no_graphs = patch.object(captured_runner, "GraphRecorder", lambda _: lambda _: bool)
    with nullcontext() if model.device.type == "cuda" else no_graphs:
        capture_decoding(model)
        try:
            captured = least(passes(make_runner(model, 32, 64)), depth)
        finally:
            decode_eagerly(model)
    return HostTime(layer, layer - only_calls, captured)


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
