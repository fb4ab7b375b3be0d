"""Decoding beside programs that hold the processors: with all threads, with one, and with the default.

    python benchmarks/threads.py --model FOLDER_OR_FILE

Beside 0, 1, 2 and 4 spinning processes, the three sides answer one prompt in turns, greedily and without
drafts. An answer ends after --max_steps tokens or --seconds. The governor of the default begins anew beside
each number of processes: its first answer includes the time in which it notices them. The last line is one
JSON object, in decoded tokens/s.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from arguments import GenerationConfig, ModelArguments, at_least, parse
from benchmarks.workloads import workloads
from runs import ranks
from runs.program import run
from runs.records import describe, describe_model, heading
from runs.startup import load_generator, model_name
from self_speculation import GenerationStrategyResult, Request, ThreadGovernor, govern_threads
from self_speculation.threads import most_threads


@dataclass(frozen=True)
class ThreadsArguments:
    """How much to measure."""

    beside: tuple[int, ...] = (0, 1, 2, 4)
    """Numbers of spinning processes."""
    rounds: int = 2
    """Answers of each side beside each number."""
    seconds: float = 8.0
    """The longest answer."""

    def __post_init__(self) -> None:
        at_least(self, 1, "rounds")


def main(argv: Sequence[str] | None = None) -> int:
    model_args, config, args = parse(
        __doc__ or "", ModelArguments, GenerationConfig, ThreadsArguments, args=argv
    )
    config = replace(config, sample=False, max_steps=min(config.max_steps, 64))
    generator = load_generator(model_args, config)
    model = generator.model
    most = most_threads(model)
    about = describe("threads", (model_args, config)) | describe_model(model_name(model_args), model)
    print(heading(about, left_out=("sample",)))
    ids = workloads(generator.tokenizer)["chat"][0]

    def answer() -> GenerationStrategyResult:
        until = time.perf_counter() + args.seconds

        def is_late(tokens: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            return torch.full((len(tokens),), time.perf_counter() > until)

        request = Request(ids, stopping_criteria=[is_late])
        return generator.generate(request, config).generation_strategy_result

    answer()  # warms up
    rows = []
    for number in args.beside:
        torch.set_num_threads(most)
        governors = {f"{most} threads": None, "1 thread": None, "default": ThreadGovernor()}
        took = {name: [0, 0.0] for name in governors}
        with spinning(number):
            for _ in range(args.rounds):
                for name, governor in governors.items():
                    govern_threads(model, governor)
                    torch.set_num_threads(1 if name == "1 thread" else most)
                    result = answer()
                    took[name][0] += result.num_decode_tokens
                    took[name][1] += result.decode_time
        rows.append({"beside": number, **{name: tokens / max(s, 1e-9) for name, (tokens, s) in took.items()}})
        speeds = ", ".join(f"{name} {rows[-1][name]:.1f}" for name in took)
        print(f"beside {number}: {speeds} tokens/s", flush=True)
    print(json.dumps({**about, "rows": rows}))
    return 0


@contextmanager
def spinning(number: int) -> Iterator[None]:
    """So many processes spin in this block."""
    with ranks.process_group(), ExitStack() as stack:  # SIGTERM ends them, too
        for _ in range(number):
            spinner = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            stack.callback(spinner.kill)
        yield


if __name__ == "__main__":
    run(main)
