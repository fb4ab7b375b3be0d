"""Inspect completions: kernels and reads of a token, and whether greedy ids are right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from measures.comparison import exact_logits, near_tie_bound


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
