"""The host's time for a pass, the kernels of a round, the device's time for products, and whether greedy ids
are right.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from measures.comparison import exact_logits, near_tie_bound
from measures.timed_runs import run_every_pass
from self_speculation import GenerationConfig, Request, make_strategy
from self_speculation.model import captured_runner
from self_speculation.model.captured_runner import capture_decoding, decode_eagerly, make_runner
from self_speculation.model.fused_layers import linears_made
from self_speculation.model.model_runner import ModelRunner
from self_speculation.model.quantized_layers import quantized
from self_speculation.scheduler import Scheduler

_NO_KERNELS = ("device", "empty", "empty_like", "empty_strided")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def read_bandwidth(device: torch.device) -> float:
    """Bytes per second that a product of a matrix and a vector reads on the device."""
    rows = 2**16 if device.type == "cuda" else 2**12
    matrix = torch.ones(rows, 2**13, dtype=torch.bfloat16, device=device)  # a GiB on a GPU
    vector = torch.ones(2**13, dtype=torch.bfloat16, device=device)
    seconds = []
    for _ in range(8):
        _synchronize(device)
        started = time.perf_counter()
        torch.mv(matrix, vector)
        _synchronize(device)
        seconds.append(time.perf_counter() - started)
    return matrix.nbytes / min(seconds)


class HostTime(NamedTuple):
    """Microseconds of the host, which does not wait for the device."""

    layer: float  # an eager layer
    captured: float  # a captured pass over all layers; on a CPU without its replay


@torch.inference_mode()
def host_time(model: PreTrainedModel) -> HostTime:
    """The host's time for passes over one token after 32 others."""
    hidden = torch.zeros(1, 32, model.config.hidden_size, dtype=model.dtype, device=model.device)

    def passes(runner: ModelRunner) -> Callable[[int], None]:
        cache = runner.new_cache(32, 64)

        def run(depth: int) -> None:
            cache.set_rows([32])
            runner.run_layers(cache, hidden[:, :1], 0, depth)

        runner.run_layers(cache, hidden, 0, len(runner.layers))
        return run

    def least(run: Callable[[int], None], depth: int) -> float:
        """Microseconds of a call, the least of many."""
        taken = []
        for _ in range(200):
            _synchronize(model.device)
            started = time.perf_counter()
            run(depth)
            taken.append(time.perf_counter() - started)
        return min(taken) * 1e6

    depth = model.config.num_hidden_layers
    eager = passes(ModelRunner(model))
    eager(depth)
    layer = (least(eager, depth) - least(eager, 1)) / (depth - 1)
    no_graphs = patch.object(captured_runner, "GraphRecorder", lambda _: lambda _: bool)
    with nullcontext() if model.device.type == "cuda" else no_graphs:
        capture_decoding(model)
        try:
            captured = least(passes(make_runner(model)), depth)
        finally:
            decode_eagerly(model)
    return HostTime(layer, captured)


class Work(NamedTuple):
    """What one round of a strategy calls."""

    kernels: int
    calls: int  # views, too


class _Counter(TorchDispatchMode):
    """Counts calls of operators, and those that are kernels: neither views nor memory."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.calls = 0

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        is_view = function.is_view
        if is_view and isinstance(result, torch.Tensor):  # such as `reshape`, which may copy
            is_view = result.untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr()
        self.calls += 1
        self.kernels += not (is_view or function._opname in _NO_KERNELS)
        return result


def count_work(model: PreTrainedModel, config: GenerationConfig) -> Work:
    """The work of one eager round of this strategy over one sequence."""
    strategy, prompt = make_strategy(config.generation_strategy), [1] * 32
    run_every_pass(strategy, model, prompt, config)
    scheduler = Scheduler[int](strategy, model, config, batch_size=1)
    scheduler.add_request(0, Request(prompt))
    with _Counter() as counter:
        scheduler.step()
    return Work(counter.kernels, counter.calls)


class ProductTime(NamedTuple):
    """Microseconds of x W^T, with W [out, in] read from memory."""

    shape: tuple[int, int]
    num_tokens: int
    exact: float  # in the model's dtype
    int4: float


@torch.inference_mode()
def product_times(model: PreTrainedModel, num_tokens: Sequence[int]) -> list[ProductTime]:
    """Of the products of a layer, by tokens. The same product of all layers runs in one graph,
    so no weight is in a cache. Copies in four bits are made and dropped.
    """
    runner = ModelRunner(model)
    exact, int4 = (
        [layer.linears for layer in of.layers] for of in (runner, quantized(runner, len(runner.layers)))
    )
    record = captured_runner.GraphRecorder(model.device)

    def least(linears: Sequence[Callable[[torch.Tensor], torch.Tensor]], x: torch.Tensor) -> float:
        def run() -> None:
            for linear in linears:
                linear(x)

        replay, taken = record(run), []
        for _ in range(20):
            _synchronize(model.device)
            started = time.perf_counter()
            replay()
            _synchronize(model.device)
            taken.append(time.perf_counter() - started)
        return 1e6 * min(taken) / len(linears)

    found = []
    for own, copies in zip(zip(*exact, strict=True), zip(*int4, strict=True), strict=True):
        size, width = own[0].shape
        for number in num_tokens:
            x = torch.ones(number, width, dtype=model.dtype, device=model.device)
            found.append(ProductTime((size, width), number, least(own, x), least(copies, x)))
    for linear in linears_made(model):
        linear.copies.clear()
    return found


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
