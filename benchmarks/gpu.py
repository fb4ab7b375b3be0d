"""One table of decoding on a GPU: one model a run, in at most nine minutes, without a checkpoint.

    python benchmarks/gpu.py --model_shape Llama-3.2-1B
    python benchmarks/gpu.py --dry True      # on a CPU: a tiny model, passes are not captured

The model is a Llama of random weights in bf16 with the shape of a real one. Its early exit agrees with it
about as often as those of the published LayerSkip checkpoints do. Prompts are random ids. The sides are
`generate` of transformers, plain and with `assistant_early_exit` (one prompt at a time), and our strategies,
eager and captured, with the model's own layers and with an int4 copy of them. Sides alternate. (Llama-3.2-1B
ties its head to its embedding; here they are two.)

Above the table stand the memory bandwidth and the host's time for an eager layer and for a captured pass.

The columns are about decoding without prefill: *tokens/s* of all sequences together; *x ours*, *x hf*:
speed-up over eager autoregressive decoding and over transformers; *limit*: the share of the memory bandwidth
(of a product of matrix and vector) that reading weights, keys and values takes, without drafts; *accept*:
accepted / drafted tokens; *reads* from the GPU and *kernels* per token of all sequences; *GiB*: peak memory;
*ids*: = and the number of near-ties if every token is the model's choice in fp32 or a near-tie, else the
number of the others.

By arithmetic Llama-2-7B takes five of the nine minutes on an H100, Llama-3-8B six, Llama-3.2-1B three.
Seconds for 7B: weights 20; transformers 40 (8 times 128 steps of 30 ms, and 4 answers of its early exit); our
sides 80 (64 answers of up to 128 steps of 5 ms, as many for warm-ups and profiles); captures 20 (52 and 260
for one sequence after 128 and 2,081 tokens, 208 and 1,040 for eight, 12 ms each); checks in fp32 120 (100
passes over 2,209 tokens, 30 TFLOP each).

The run ends after --minutes, or on Ctrl-C. It prints each row and saves it in a folder of --output_dir as it
comes. A side that fails costs its own row. The last line is one JSON object. Exit status 1: an id is wrong or
a side failed.
"""

from __future__ import annotations

import itertools
import json
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).parent.parent))

from arguments import GenerationConfig, at_least, check, parse, refuse
from benchmarks.inspection import Judged, Work, host_time, judge_greedy, work_per_token
from benchmarks.sides import (
    ADAPTIVE,
    COPY,
    EARLY_EXIT,
    PLAIN,
    SPECULATIVE,
    TRANSFORMERS,
    Answers,
    Side,
    compiled,
    draft_stats,
    ours,
    rotated,
    strategies,
    theirs,
    tokens_per_pass,
)
from benchmarks.synthetic import random_llama
from data import one_line
from measures.metrics import peak_memory_mib
from measures.timed_runs import run_every_pass
from runs.program import run
from runs.records import Record, Run, describe
from self_speculation import fuse, make_strategy
from self_speculation.model import captured_runner

_AGREEMENT = 0.9  # of exit and model; then 70 % of 6 drafted tokens are accepted


@dataclass(frozen=True)
class Shape:
    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int
    exit_layer: int

    def config(self) -> LlamaConfig:
        sizes = {name: size for name, size in asdict(self).items() if name != "exit_layer"}
        return LlamaConfig(**sizes, tie_word_embeddings=False)


SHAPES = {
    "Llama-2-7B": Shape(32, 4096, 11008, 32, 32, 32000, 4096, exit_layer=8),
    "Llama-3.2-1B": Shape(16, 2048, 8192, 32, 8, 128256, 131072, exit_layer=4),
    "Llama-3-8B": Shape(32, 4096, 14336, 32, 8, 128256, 8192, exit_layer=8),
}
_TINY = Shape(4, 64, 128, 4, 2, 512, 512, exit_layer=1)


@dataclass(frozen=True)
class GpuArguments:
    """What to measure, and for how long."""

    model_shape: str = "Llama-2-7B"
    """Llama-2-7B, Llama-3.2-1B or Llama-3-8B."""
    prompts: list[int] = field(default_factory=lambda: [128, 2081])
    """Tokens of the prompts; the last chunk of 2081 has 33, one more than masks are aligned to."""
    batch_size: list[int] = field(default_factory=lambda: [1, 8])
    """Sequences at a time."""
    sample: bool = False
    """Draw tokens; False: greedy, and every id is checked."""
    new_tokens: int = 128
    """Tokens of an answer."""
    num_speculations: int = 6
    """Tokens drafted per round; adaptive chooses for itself."""
    rounds: int = 2
    """Batches of each kind; each side answers them in turn."""
    minutes: float = 8.5
    """The run ends after so many; at most 8.5."""
    dry: bool = False
    """Try the program on a CPU: a tiny model, prompts a sixteenth as long, answers an eighth."""
    seed: int = 0
    """Of weights, prompts and sampling."""
    output_dir: str = "./logs"
    """The folder of the run goes in here."""

    def __post_init__(self) -> None:
        check(self, "model_shape", self.model_shape in SHAPES, f"must be one of {', '.join(SHAPES)}")
        check(self, "minutes", 0 <= self.minutes <= 8.5, "must be between 0 and 8.5")
        at_least(self, 1, "batch_size", "num_speculations", "rounds")
        at_least(self, 16, "new_tokens")
        longest = SHAPES[self.model_shape].max_position_embeddings - self.new_tokens
        fits = all(16 <= length <= longest for length in self.prompts)
        check(self, "prompts", fits, f"must be between 16 and {longest}")


@dataclass(frozen=True)
class Task:
    """One part of the table: the input of all its sides."""

    model: Any
    config: GenerationConfig  # of self-speculation
    batches: list[list[list[int]]]  # [turn][row], token ids
    compiled: bool
    seed: int

    @property
    def size(self) -> int:
        return len(self.batches[0])

    @property
    def place(self) -> tuple[int, int]:
        """Prompt length and batch size."""
        return len(self.batches[0][0]), self.size

    def strategy(self, name: str, config: GenerationConfig) -> GenerationConfig:
        return strategies(config, config.exit_layer)[name]

    def make(self, name: str, **changes: Any) -> Side:
        """The side with changed settings."""
        config = replace(self.config, **changes)
        if name in (TRANSFORMERS, EARLY_EXIT):
            return theirs(name, self.model, [], config, self.size)
        return ours(self.model, [], self.strategy(name, config), self.size)

    def names(self) -> list[str]:
        if self.compiled:
            return [PLAIN, SPECULATIVE, COPY, ADAPTIVE]
        alone = [EARLY_EXIT] if self.size == 1 else []
        return [TRANSFORMERS, *alone, PLAIN, SPECULATIVE, COPY, ADAPTIVE]


@dataclass
class Measured:
    """The figures of one side."""

    answers: list[Answers] = field(default_factory=list)
    work: Work | None = None
    tokens_per_pass: float | None = None
    peak_mib: float = 0.0
    judged: Judged | None = None
    error: str | None = None


def measure(task: Task, found: dict[str, Measured]) -> None:
    """Warm up every side, time all in turns, and judge their greedy ids.

    Args:
        found: filled at once, so that an interruption keeps the figures.
    """
    model, device = task.model, task.model.device
    found |= {name: Measured() for name in task.names()}
    sides: dict[str, Side] = {}

    def attempt(name: str, call: Callable[[], None]) -> None:
        """Leave a side out after its first error."""
        if found[name].error is None:
            try:
                call()
            except Exception as error:
                found[name].error = described(error)

    def warm_up(name: str) -> None:
        batch, side = task.batches[0], task.make(name)
        if name in (TRANSFORMERS, EARLY_EXIT):
            task.make(name, max_steps=8)(batch)
        else:
            config = task.strategy(name, task.config)
            strategy = make_strategy(config.generation_strategy)
            run_every_pass(strategy, model, batch[0], config, task.size)
        if name == EARLY_EXIT:
            found[name].tokens_per_pass = tokens_per_pass(model, side, batch)
        sides[name] = side

    def watch(name: str) -> None:
        def steps(number: int) -> Callable[[], int]:
            side = task.make(name, max_steps=number)
            return lambda: side(task.batches[0]).num_tokens // task.size

        found[name].work = work_per_token(device, steps(1), steps(16))

    def answer(name: str, batch: list[list[int]]) -> None:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        found[name].answers.append(sides[name](batch))
        found[name].peak_mib = max(found[name].peak_mib, peak_memory_mib(device))

    def judge(name: str) -> None:
        judged = Judged()
        for answers, batch in zip(found[name].answers, task.batches, strict=True):
            for prompt, ids in zip(batch, answers.ids, strict=True):
                key = (*prompt, *ids)
                if key not in known:  # most sides give the same ids
                    known[key] = judge_greedy(model, prompt, ids)
                judged += known[key]
        found[name].judged = judged

    known: dict[tuple[int, ...], Judged] = {}
    for name in found:
        attempt(name, partial(warm_up, name))
    for turn, batch in enumerate(task.batches):
        for name in rotated(list(found), turn):
            torch.manual_seed(task.seed + turn)
            attempt(name, partial(answer, name, batch))
    for name in found:  # last: the deadline may cut this short
        if device.type == "cuda":
            attempt(name, partial(watch, name))
        if not task.config.sample:
            attempt(name, partial(judge, name))


class Table:
    """Prints rows as they come, and writes them to the run's folder."""

    def __init__(self, run: Run, bandwidth: float) -> None:
        self.rows: list[Record] = []
        self._run, self._bandwidth = run, bandwidth
        self._speeds: dict[tuple[Any, ...], list[float]] = {}  # by place, compiled and side

    def add(self, task: Task, found: dict[str, Measured]) -> None:
        """A row for each side with figures or an error."""
        length, size = task.place
        place = {"prompt": length, "batch_size": size, "compiled": task.compiled}
        shown = [row["side"] for row in self.rows if place.items() <= row.items()]
        found = {n: seen for n, seen in found.items() if (seen.answers or seen.error) and n not in shown}
        for name, seen in found.items():
            speeds = [answers.decode_tokens_per_second for answers in seen.answers]
            self._speeds[task.place, task.compiled, name] = speeds
        if found:
            how = "compiled" if task.compiled else "eager"
            print(f"\nprompts of {length}, batch {size}, {how}\n{_HEADING}")
        for name, seen in found.items():
            figures = self._figures(task, name, seen) if seen.answers else {}
            row = {"index": len(self.rows), **place, "side": name, "error": seen.error, **figures}
            self.rows.append(row)
            self._run.append(row)
            print(_shown(row), flush=True)

    def _figures(self, task: Task, name: str, seen: Measured) -> Record:
        speed = statistics.median(self._speeds[task.place, task.compiled, name])
        acceptance = draft_stats(seen.answers).acceptance_rate
        if seen.tokens_per_pass is not None:
            acceptance = (seen.tokens_per_pass - 1) / task.config.num_speculations
        plain = name in (TRANSFORMERS, PLAIN)
        return {
            "tokens/s": speed,
            "prefill_ms": 1000 * statistics.median(answers.prefill_time for answers in seen.answers),
            "x ours": self._ratio(task, name, PLAIN),
            "x transformers": self._ratio(task, name, TRANSFORMERS),
            "limit": speed * bytes_per_token(task) / self._bandwidth if plain else None,
            "acceptance": acceptance,
            "reads": seen.work and seen.work.reads,
            "kernels": seen.work and seen.work.kernels,
            "peak_gib": seen.peak_mib / 1024,
            "ids": seen.judged and asdict(seen.judged),
        }

    def _ratio(self, task: Task, side: str, other: str) -> float | None:
        """Median ratio to an eager side over the turns of both."""
        own = self._speeds[task.place, task.compiled, side]
        pairs = zip(own, self._speeds.get((task.place, False, other), []), strict=False)
        return statistics.median(ratios) if (ratios := [a / b for a, b in pairs]) else None


def bytes_per_token(task: Task) -> float:
    """Read by a plain step per row: its share of the weights, and keys and values of half an answer."""
    model, shape = task.model, task.model.config
    weights = sum(p.nbytes for p in [*model.base_model.layers.parameters(), *model.lm_head.parameters()])
    context = task.place[0] + task.config.max_steps / 2
    cache = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * model.dtype.itemsize
    return weights / task.size + cache * context


# Field of a row -> heading, width, format; a line has 80 columns.
_COLUMNS = {
    "tokens/s": ("tokens/s", 9, ".1f"),
    "x ours": ("x ours", 7, ".2f"),
    "x transformers": ("x hf", 6, ".2f"),
    "limit": ("limit", 6, ".0%"),
    "acceptance": ("accept", 7, ".0%"),
    "reads": ("reads", 6, ".2f"),
    "kernels": ("kernels", 8, ".0f"),
    "peak_gib": ("GiB", 5, ".1f"),
}
_HEADING = f"{'':<22}" + "".join(f"{name:>{width}}" for name, width, _ in _COLUMNS.values()) + f"{'ids':>4}"


def _shown(row: Record) -> str:
    if row["error"]:
        return f"{row['side']:<23} {row['error']}"[:80]
    cells = [
        f"{'-' if row[key] is None else format(row[key], style):>{width}}"
        for key, (_, width, style) in _COLUMNS.items()
    ]
    ids = "-" if row["ids"] is None else row["ids"]["wrong"] or f"={row['ids']['near_ties'] or ''}"
    return f"{row['side']:<22}" + "".join(cells) + f"{ids:>4}"


def described(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


@torch.inference_mode()
def read_bandwidth(device: torch.device) -> float:
    """Bytes per second that a product of a matrix and a vector reads on the device."""
    rows = 2**16 if device.type == "cuda" else 2**12
    matrix = torch.ones(rows, 2**13, dtype=torch.bfloat16, device=device)  # a GiB on a GPU
    vector = torch.ones(2**13, dtype=torch.bfloat16, device=device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = []
    for _ in range(8):
        wait()
        started = time.perf_counter()
        torch.mv(matrix, vector)
        wait()
        seconds.append(time.perf_counter() - started)
    return matrix.nbytes / min(seconds)


def tasks(args: GpuArguments, device: torch.device) -> Sequence[Task]:
    """The parts of the table in order."""
    shape, divisor = (_TINY, 16) if args.dry else (SHAPES[args.model_shape], 1)
    model, agreement = random_llama(shape.config(), shape.exit_layer, _AGREEMENT, device, args.seed)
    fuse(model)
    config = GenerationConfig(
        max_steps=max(16, args.new_tokens // 8) if args.dry else args.new_tokens,
        exit_layer=shape.exit_layer, num_speculations=args.num_speculations,
        generation_strategy="self_speculative", sample=args.sample,
    )  # fmt: skip
    dtype, picked = str(model.dtype).removeprefix("torch."), "greedy" if config.greedy else "sampled"
    print(
        f"{args.model_shape}, {dtype}; exit {shape.exit_layer} agrees at {agreement:.0%} of positions\n"
        f"{config.num_speculations} drafted, {picked}, {config.max_steps} tokens",
        flush=True,
    )
    parts = []
    for length, size in itertools.product(args.prompts, args.batch_size):
        batches = torch.randint(shape.vocab_size, (args.rounds, size, max(1, length // divisor))).tolist()
        parts += [Task(model, config, batches, compiled, args.seed) for compiled in (False, True)]
    return parts


def show_host_time(model: Any, device: torch.device) -> Record | None:
    """Print and return it. None if it fails, as a capture may."""
    try:
        host = host_time(model)
    except Exception as error:
        print(f"host: {described(error)}"[:80], flush=True)
        return None
    replay = "with" if device.type == "cuda" else "without"
    print(
        f"host: {host.layer:.0f} us for an eager layer, {host.python:.0f} of them in Python,\n"
        f"{host.captured:.0f} us for a captured pass, {replay} its replay",
        flush=True,
    )
    return host._asdict()


def main(argv: Sequence[str] | None = None) -> int:
    (args,) = parse(__doc__ or "", GpuArguments, args=argv)
    if not args.dry and not torch.cuda.is_available():
        refuse("no GPU on this machine; --dry True runs all of it on a tiny model on the CPU", status=1)
    # cuDNN's attention would make a plan for every new length, and that would be timed.
    torch.backends.cuda.enable_cudnn_sdp(False)
    transformers.logging.set_verbosity_error()
    device = torch.device("cpu" if args.dry else "cuda")
    about: Record = {
        "model_shape": args.model_shape, "dry": args.dry,
        "device": "cpu" if args.dry else torch.cuda.get_device_name(device),
        "torch": torch.__version__, "transformers": transformers.__version__,
    }  # fmt: skip
    folder = Run.create(args.output_dir, "gpu", {**describe("gpu", (args,), ""), **about})
    interrupt = partial(signal.pthread_kill, threading.main_thread().ident or 0, signal.SIGINT)
    started, alarm = time.perf_counter(), threading.Timer(60 * args.minutes, interrupt)
    alarm.daemon = True
    ended, table, task = "finished", None, None
    found: dict[str, Measured] = {}
    with ExitStack() as stack:
        if args.dry:
            stack.enter_context(
                patch.object(captured_runner, "GraphRecorder", lambda device: lambda run: run)
            )
        stack.callback(alarm.cancel)
        try:
            alarm.start()
            about["read_gb_per_s"] = read_bandwidth(device) / 1e9
            table = Table(folder, 1e9 * about["read_gb_per_s"])
            print(f"{about['device']}, a product reads {about['read_gb_per_s']:.0f} GB/s", flush=True)
            parts = tasks(args, device)
            about["host_us"] = show_host_time(parts[0].model, device)
            for task in parts:
                found = {}
                try:
                    with compiled(task.model) if task.compiled else nullcontext():
                        measure(task, found)
                except Exception as error:
                    for name in task.names():
                        found.setdefault(name, Measured(error=described(error)))
                table.add(task, found)
                found = {}
        except KeyboardInterrupt:
            over = time.perf_counter() - started >= 60 * args.minutes
            ended = f"stopped after {args.minutes:g} minutes" if over else "interrupted"
        except Exception as error:  # no memory for the model, or no disk space
            ended = described(error)
    if table and task and found:
        table.add(task, found)
    return finish(folder, table.rows if table else [], about, ended)


def finish(folder: Run, rows: list[Record], about: Record, ended: str) -> int:
    """Save the run, print how it ended, and return the exit status."""
    wrong = sum((row.get("ids") or {}).get("wrong", 0) for row in rows)
    failed = sum(row["error"] is not None for row in rows)
    summary = {**about, "ended": ended, "wrong": wrong, "failed": failed}
    folder.finish(rows, summary)
    print(f"\n{ended}: {len(rows)} rows, {wrong} wrong ids, {failed} failed")
    print(f"{folder.folder}/: run.json, records.jsonl")
    print(json.dumps({**summary, "rows": rows}))
    stopped = ended == "finished" or ended.startswith("stopped")
    return 130 if ended == "interrupted" else int(bool(wrong or failed or not stopped))


if __name__ == "__main__":
    run(main)
