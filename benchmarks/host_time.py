"""The host's part of a round on a card, with replays that do nothing: how long the card has no work between
a read and the next replay, and the work of the host from a read to the next one.

    taskset -c 0 python benchmarks/host_time.py

Needs no card: the tensors are a CPU's, so work of the host for pinned memory and for queueing is left out.
Greedy rounds of six drafted tokens, of which several are accepted.
"""

import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))

from arguments import parse
from benchmarks.synthetic import llama
from runs.program import run
from self_speculation import GenerationConfig, Request, make_strategy
from self_speculation.backends.round_tensors import Outcome, RoundTensors
from self_speculation.backends.runners import capture_decoding, fuse
from self_speculation.engine.scheduler import Scheduler
from self_speculation.machine.transfers import AsyncRead

_DRAFTED = 6
_LIBRARY = "self_speculation"
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "self-speculative": {"exit_layer": 1, "num_speculations": _DRAFTED},
    "sampled": {"exit_layer": 1, "num_speculations": _DRAFTED, "sample": True},
    "adaptive": {"generation_strategy": "adaptive"},
}


@dataclass(frozen=True)
class HostTimeArguments:
    """What is measured."""

    num_rounds: int = 200
    """Of each median."""
    ways: list[str] | None = None
    """Of plain, self-speculative, sampled and adaptive; none: all."""


class Gaps:
    """Seconds of this thread, without those of other programs.

    Attributes:
        idle: from each read to the replay that follows; 0 if the card has replays to do when it is read.
        work: from each read to the next one.
    """

    def __init__(self) -> None:
        self.idle = list[float]()
        self.work = list[float]()
        self._num_replays = 0
        self._read_at: float | None = None
        self._is_idle = False

    def recorder(self, _: torch.device) -> Callable[[Callable[[], None]], Callable[[], None]]:
        """In the place of `GraphRecorder`."""
        return lambda run: self._replay

    def _replay(self) -> None:
        self._num_replays += 1
        if self._is_idle and self._read_at is not None:
            self.idle.append(time.thread_time() - self._read_at)
            self._is_idle = False

    def begin(self, reading: Any, numbers: Sequence[Tensor]) -> None:
        """In the place of `AsyncRead.__init__`."""
        _BEGIN(reading, numbers)
        reading.num_replays = self._num_replays

    def wait(self, reading: Any) -> list[list[float]]:
        """In the place of `AsyncRead.wait`."""
        numbers = _WAIT(reading)
        now = time.thread_time()
        if self._read_at is not None:
            self.work.append(now - self._read_at)
        self._read_at = now
        self._is_idle = reading.num_replays == self._num_replays
        if not self._is_idle:
            self.idle.append(0.0)
        return numbers


_BEGIN = AsyncRead.__init__
_WAIT = AsyncRead.wait
_OUTCOMES = RoundTensors.outcomes


def gaps(way: str, num_rows: int, num_rounds: int) -> Gaps:
    """Of so many rounds, after those that capture."""
    draws = random.Random(0)
    found = Gaps()

    def some_accepted(_: object, __: object, lengths: Sequence[int]) -> list[int]:
        return [draws.randint(0, length) for length in lengths]

    def some_outcomes(tensors: Any, numbers: Sequence[float], widths: Sequence[int]) -> list[Outcome]:
        outcomes = _OUTCOMES(tensors, numbers, widths)
        accepted = some_accepted(None, None, [width - 1 for width in widths])
        pairs = zip(outcomes, accepted, strict=True)
        return [each._replace(tokens=[5] * (number + 1)) for each, number in pairs]

    stand_ins: dict[str, Any] = {
        f"{_LIBRARY}.backends.captures.GraphRecorder": found.recorder,
        f"{_LIBRARY}.backends.card_runner.why_no_kernels": lambda *_: None,
        f"{_LIBRARY}.backends.card_runner.flash_attention": lambda queries, *_: queries,
        f"{_LIBRARY}.backends.round_tensors.RoundTensors.outcomes": some_outcomes,
        f"{_LIBRARY}.self_speculation_generator.leading_matches": some_accepted,
        f"{_LIBRARY}.machine.transfers.AsyncRead.__init__": lambda reading, numbers: found.begin(
            reading, numbers
        ),
        f"{_LIBRARY}.machine.transfers.AsyncRead.wait": lambda reading: found.wait(reading),
        f"{_LIBRARY}.engine.batch.queues_passes": lambda device: True,
        f"{_LIBRARY}.drafts.composer.queues_passes": lambda device: True,
    }
    with ExitStack() as stack:
        for name, value in stand_ins.items():
            stack.enter_context(patch(name, value))
        config = llama(64, 128, 4, 2, 1, 1000, False)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        fuse(model)
        capture_decoding(model)
        settings = WAYS[way]
        drafted = "self_speculative" if "exit_layer" in settings else "autoregressive"
        given = {"generation_strategy": drafted, "sample": False, "max_steps": 8000, **settings}
        strategy = make_strategy(given["generation_strategy"])
        scheduler = Scheduler[int](strategy, model, GenerationConfig(**given), num_rows)
        for row in range(num_rows):
            scheduler.add_request(row, Request([5 + row, 6, 7] * 5))
        for _ in range(20):
            scheduler.step()
        found.idle.clear()
        found.work.clear()
        for _ in range(num_rounds):
            scheduler.step()
    return found


def main(argv: Sequence[str] | None = None) -> int:
    (args,) = parse(__doc__ or "", HostTimeArguments, args=argv)
    torch.set_num_threads(1)
    print("| us: idle card, work of the host | 1 row | 8 rows |\n|---|---|---|")
    for way in args.ways or WAYS:
        found = [gaps(way, rows, args.num_rounds) for rows in (1, 8)]
        pairs = [[1e6 * statistics.median(seconds) for seconds in (each.idle, each.work)] for each in found]
        print(f"| {way} | {' | '.join(f'{idle:.0f}, {work:.0f}' for idle, work in pairs)} |", flush=True)
    return 0


if __name__ == "__main__":
    run(main)
