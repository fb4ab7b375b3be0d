"""Memory's speed, the kernels of a round, and whether greedy ids are right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer
from transformers import PreTrainedModel

from measures.comparison import exact_logits, near_tie_bound
from measures.timed_runs import run_every_pass
from self_speculation import GenerationConfig, Request, make_strategy
from self_speculation.scheduler import Scheduler

_NO_KERNELS = ("device", "empty", "empty_like", "empty_strided")


@torch.inference_mode()
def read_bandwidth(device: torch.device) -> float:
    """Bytes per second that a product of a matrix and a vector reads on the device."""
    rows = 2**16 if device.type == "cuda" else 2**12
    matrix = torch.ones(rows, 2**13, dtype=torch.bfloat16, device=device)  # a GiB on a GPU
    timer = Timer("matrix.mv(matrix[0])", globals={"matrix": matrix}, num_threads=torch.get_num_threads())
    return matrix.nbytes / timer.blocked_autorange().median


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


@dataclass(frozen=True)
class Judged:
    """Tokens of greedy outputs against the model's choices in fp32 after the same tokens."""

    equal: int = 0
    near_ties: int = 0
    wrong: int = 0  # rounding does not explain them

    def __add__(self, other: Judged) -> Judged:
        return Judged(self.equal + other.equal, self.near_ties + other.near_ties, self.wrong + other.wrong)


def judge_greedy(model: PreTrainedModel, prompt: Sequence[int], output: Sequence[int]) -> Judged:
    """Judge every token of a greedy output; the model's dtype decides the near-tie bound."""
    ids = torch.tensor([[*prompt, *output]], device=model.device)
    logits = exact_logits(model, ids[:, :-1], len(output))
    chosen = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
    gap = logits.amax(-1) - chosen  # [n]
    bound = near_tie_bound(model, logits.abs().amax(-1))
    equal, allowed = int((gap == 0).sum()), int((gap <= bound).sum())
    return Judged(equal, allowed - equal, len(output) - allowed)
