"""What a GPU computes and how fast, in eight minutes: for cards that nobody has tried yet.

    python benchmarks/first_gpu.py                                        # a Llama of random weights, 1B
    python benchmarks/first_gpu.py --model FOLDER --exit_layer 8

Needs no network, and torch 2.11 or newer. The steps run in another process. One that fails does not end the
others: if the card is lost, the step is tried again with CUDA_LAUNCH_BLOCKING=1, and a new process goes on.
Each step writes a line at once. A table follows, and the last line is JSON: send it.
"""

import gc
import json
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from arguments import parse
from benchmarks.card_steps import STEPS, FirstGPUArguments, Tried, make_tried
from benchmarks.kernel_steps import Found
from runs.program import run
from self_speculation.machine.devices import why_no_gpu

_LIMIT = 480.0  # seconds, after which no step begins
_STEP_LIMIT = 150.0  # seconds, after which a step is ended
_LAST = 1500  # characters of an error: Triton's reason stands at the end
_START = "spawn"  # of a process, since CUDA cannot be forked
_MODEL = "model"  # the first step of each process


class Outcome(NamedTuple):
    """What a step has found."""

    found: Found
    is_lost: bool = False  # the process cannot use the card any more


def tried_out(step: Callable[[], Any], works: Callable[[], object]) -> Outcome:
    """What a step has found, or the error; `works` raises if the card is lost."""
    try:
        return Outcome(step())
    except Exception as error:
        text = f"{type(error).__name__}: {error}"[-_LAST:]
        found = {"error": text, "traceback": traceback.format_exc()[-_LAST:]}
    try:
        gc.collect()  # frames of the error have tensors
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        works()
    except Exception:
        return Outcome(found, is_lost=True)
    return Outcome(found)


def work(args: FirstGPUArguments, names: Sequence[str], until: float, results: Connection) -> None:
    """In a process: the outcome of making the model and of each step, up to one that loses the card."""
    made = list[Tried]()

    def make() -> Found:
        made.append(make_tried(args))
        return {}

    results.send(tried_out(make, lambda: None))
    for name in names if made else ():
        if time.monotonic() > until:
            outcome = Outcome({"error": "no time was left"})
        else:
            outcome = tried_out(partial(STEPS[name], made[0]), made[0].synchronize)
        results.send(outcome)
        if outcome.is_lost:
            return


def outcomes(
    args: FirstGPUArguments, names: Sequence[str], until: float, **environment: str
) -> Iterator[tuple[str, Outcome]]:
    """The model and the steps, by name, in a new process, up to one that loses the card."""
    context: Any = multiprocessing.get_context(_START)
    receiver, sender = context.Pipe(duplex=False)
    with patch.dict(os.environ, environment):
        process = context.Process(target=work, args=(args, names, until, sender))
        process.start()
    sender.close()
    try:
        for name in (_MODEL, *names):
            outcome = _received(receiver, process)
            yield name, outcome
            if outcome.is_lost or (name == _MODEL and "error" in outcome.found):
                return
    finally:
        process.kill()
        process.join()


def _received(receiver: Connection, process: Any) -> Outcome:
    """What a process sends next, or why nothing comes."""
    try:
        if receiver.poll(_STEP_LIMIT):
            return receiver.recv()
        why = f"no result in {_STEP_LIMIT:.0f} s"
    except EOFError:
        process.join()
        why = f"the process ended with status {process.exitcode}"
    return Outcome({"error": why}, is_lost=True)


def try_all(args: FirstGPUArguments, found: dict[str, Any]) -> None:
    """Writes a line for each step into `found` and to standard output."""
    until = time.monotonic() + _LIMIT
    left = [*STEPS]
    while left:
        lost = None
        for name, outcome in outcomes(args, left, until):
            found[name] = {**outcome.found}
            if outcome.is_lost:
                lost = name
                if time.monotonic() < until and name != _MODEL:
                    *_, (_, again) = outcomes(args, [name], until, CUDA_LAUNCH_BLOCKING="1")
                    found[name]["again, CUDA_LAUNCH_BLOCKING=1"] = again.found
            print(f"{name}: {json.dumps(found[name], default=str)}", flush=True)
        left = left[left.index(lost) + 1 :] if lost in left else []
    for name in STEPS:
        found.setdefault(name, {"error": "not tried: there is no model"})


def table(found: Mapping[str, Found]) -> str:
    """Step by step, what was found or the reason why nothing was."""
    lines = ["| step | found |", "|---|---|"]
    for name, result in found.items():
        if "error" in result:
            error = result["error"]
            text = error.splitlines()[-1] if isinstance(error, str) else str(error)
        else:
            text = ", ".join(f"{key} {value}" if key != "none" else value for key, value in result.items())
        lines.append(f"| {name} | {text.replace('|', '/') or 'done'} |")
    return "\n".join(lines)


def card() -> Found:
    """Names, versions and clocks."""
    found: dict[str, Any] = {"torch": torch.__version__, "CUDA": torch.version.cuda}
    for package in ("triton", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    asked = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
    command = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        found |= dict(zip(asked, map(str.strip, ran.stdout.splitlines()[0].split(",")), strict=False))
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        found["nvidia-smi"] = str(error)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    (args,) = parse(__doc__ or "", FirstGPUArguments, args=argv)
    found: dict[str, Any] = {"card": card()}
    why = None if torch.cuda.is_available() else why_no_gpu()
    if why is not None:
        found["card"]["error"] = why
        print(f"first_gpu.py: torch sees no GPU: {why}", file=sys.stderr)
    print(f"card: {json.dumps(found['card'])}", flush=True)
    if why is None:
        try_all(args, found)
    print(table(found))
    print(json.dumps(found, default=str))
    return 2 if why is not None else int(any("error" in result for result in found.values()))


if __name__ == "__main__":
    run(main)
