"""One table of decoding on a GPU: one model a run, in at most nine minutes, without a checkpoint.

    python benchmarks/gpu.py --model_shape Llama-3.2-1B
    python benchmarks/gpu.py --dry True      # on a CPU: a tiny model, passes are not captured

The model is a Llama of random weights in bf16 with the shape of a real one. Its early exit agrees with it
about as often as those of the published LayerSkip checkpoints do. Prompts are random ids. The sides are
`generate` of transformers, plain and with `assistant_early_exit` (one prompt at a time), and our strategies,
eager and captured, with the model's first layers and with a 4-bit copy of all. Sides alternate. (Llama-3.2-1B
ties its head to its embedding; here they are two.) Row r of a batch has a prompt of r tokens less.

Above the table stand the memory bandwidth and the kernels of an eager plain step and round.

The columns are about decoding without prefill: *tokens/s* of all sequences together; *x ours*, *x hf*:
speed-up over eager decoding without drafts and over transformers; *limit*: the share of the memory bandwidth
(of a product of matrix and vector) that reading weights, keys and values takes, without drafts; *accept*:
accepted / drafted tokens; *GiB*: peak memory; *ids*: = and the number of near-ties if every token is the
model's choice in fp32 or a near-tie, else the number of the others.

By arithmetic Llama-2-7B takes five of the nine minutes on an H100, Llama-3-8B six, Llama-3.2-1B three.

The run ends after --minutes, or on Ctrl-C, with what it has. A side that fails costs its own row. The last
line is one JSON object. Exit status 1: an id is wrong or a side failed.
"""

from __future__ import annotations

import _thread
import copy
import itertools
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial, reduce
from operator import add
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))

from arguments import GenerationConfig, at_least, check, parse, refuse
from benchmarks.inspection import Judged, count_work, judge_greedy, read_bandwidth
from benchmarks.sides import (
    ADAPTIVE,
    COPY,
    EARLY_EXIT,
    PLAIN,
    SPECULATIVE,
    TRANSFORMERS,
    Answers,
    Side,
    ours,
    rotated,
    strategies,
    theirs,
)
from benchmarks.synthetic import MODELS, llama, random_llama
from data import one_line
from measures.metrics import peak_memory_mib
from measures.timed_runs import run_every_pass
from runs.program import run
from runs.records import Record, describe
from self_speculation import fuse, make_strategy
from self_speculation.model import captured_runner
from self_speculation.model.captured_runner import capture_decoding, decode_eagerly

_AGREEMENT = 0.9  # of exit and model; then 70 % of 6 drafted tokens are accepted
_TINY = llama(64, 128, 4, 4, 2, 512, False)


@dataclass(frozen=True)
class GpuArguments:
    """What to measure, and for how long."""

    model_shape: str = "Llama-2-7B"
    """Llama-2-7B, Llama-3.2-1B, Llama-3-8B or Llama-3-70B."""
    prompts: list[int] = field(default_factory=lambda: [128, 2081])
    """Tokens of the prompts; the last chunk of 2081 has 33, one more than masks are aligned to."""
    batch_size: list[int] = field(default_factory=lambda: [1, 8])
    """Sequences at a time."""
    new_tokens: int = 128
    """Tokens of an answer."""
    num_speculations: int = 6
    """Tokens drafted per round, by the copy at most 3; adaptive chooses for itself."""
    rounds: int = 2
    """Batches of each kind; each side answers them in turn."""
    minutes: float = 8.5
    """The run ends after so many; at most 8.5."""
    dry: bool = False
    """Try the program on a CPU: a tiny model, prompts a sixteenth as long, answers an eighth."""
    seed: int = 0
    """Of weights and prompts."""

    def __post_init__(self) -> None:
        check(self, "model_shape", self.model_shape in MODELS, f"must be one of {', '.join(MODELS)}")
        check(self, "minutes", 0 <= self.minutes <= 8.5, "must be between 0 and 8.5")
        at_least(self, 1, "batch_size", "num_speculations", "rounds")
        at_least(self, 16, "new_tokens")
        longest = MODELS[self.model_shape].max_position_embeddings - self.new_tokens
        fits = all(16 <= length <= longest for length in self.prompts)
        check(self, "prompts", fits, f"must be between 16 and {longest}")


@dataclass(frozen=True)
class Task:
    """One part of the table: its sides answer the same batches."""

    model: Any
    config: GenerationConfig  # of self-speculation
    prompt: int  # tokens of the longest
    size: int
    batches: list[list[list[int]]]  # [turn][row], token ids
    compiled: bool

    def names(self) -> list[str]:
        own = [PLAIN, SPECULATIVE, COPY, ADAPTIVE]
        if self.compiled:
            return own
        return [TRANSFORMERS, *([EARLY_EXIT] if self.size == 1 else []), *own]

    def strategy(self, name: str) -> GenerationConfig:
        config = strategies(self.config, self.model.config.num_hidden_layers)[name]
        # A drafted token of the copy costs half a step.
        return replace(config, num_speculations=min(3, config.num_speculations)) if name == COPY else config

    def warmed_up(self, name: str) -> Side:
        """A side that has run every pass which will be timed."""
        batch = self.batches[0]
        if name in (TRANSFORMERS, EARLY_EXIT):
            theirs(name, self.model, [], replace(self.config, max_steps=8), self.size)(batch)
            return theirs(name, self.model, [], self.config, self.size)
        config = self.strategy(name)
        strategy = make_strategy(config.generation_strategy)
        run_every_pass(strategy, self.model, batch[0], config, self.size)
        return ours(self.model, [], config, self.size)


@dataclass
class Measured:
    """The figures of one side."""

    answers: list[Answers] = field(default_factory=list)
    peak_mib: float = 0.0
    judged: Judged | None = None
    error: str | None = None

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Record an error of this block. The side is then left out."""
        try:
            yield
        except Exception as error:
            self.error = described(error)


def measure(task: Task, found: dict[str, Measured]) -> None:
    """Warm up every side, time all in turns, and judge their greedy ids.

    Args:
        found: of each side; filled at once, so that an interruption keeps the figures.
    """
    device = task.model.device
    sides: dict[str, Side] = {}
    for name, seen in found.items():
        with seen.attempt():
            sides[name] = task.warmed_up(name)
    for turn, batch in enumerate(task.batches if sides else ()):
        for name in rotated(list(sides), turn):
            if not (seen := found[name]).error:
                with seen.attempt():
                    if device.type == "cuda":
                        torch.cuda.reset_peak_memory_stats(device)
                    seen.answers.append(sides[name](batch))
                    seen.peak_mib = max(seen.peak_mib, peak_memory_mib(device))
    judge = cache(partial(judge_greedy, task.model))  # most sides give the same ids
    for seen in [each for each in found.values() if not each.error]:  # last: it may be cut short
        judged = Judged()
        with seen.attempt():
            for answers, batch in zip(seen.answers, task.batches, strict=True):
                for prompt, ids in zip(batch, answers.ids, strict=True):
                    judged += judge(tuple(prompt), tuple(ids))
            seen.judged = judged


def add_rows(rows: list[Record], task: Task, found: dict[str, Measured], bandwidth: float) -> None:
    """Add and print a row for each side with figures or an error."""
    new: dict[str, Record] = {
        name: {
            "prompt": task.prompt, "batch_size": task.size, "compiled": task.compiled, "side": name,
            "error": seen.error, "speeds": [each.decode_tokens_per_second for each in seen.answers],
        }
        for name, seen in found.items()
        if seen.answers or seen.error
    }  # fmt: skip
    if not new:
        return
    rows += new.values()
    for name, row in new.items():
        if answers := found[name].answers:
            speed = statistics.median(row["speeds"])
            row |= {
                "tokens/s": speed,
                "prefill_ms": 1000 * statistics.median(each.prefill_time for each in answers),
                "x ours": ratio(rows, row, PLAIN),
                "x hf": ratio(rows, row, TRANSFORMERS),
                "accept": reduce(add, answers).acceptance_rate(task.config.num_speculations),
                "GiB": found[name].peak_mib / 1024,
            }
            if judged := found[name].judged:
                row["ids"] = asdict(judged)
            if name in (TRANSFORMERS, PLAIN):
                row["limit"] = speed * bytes_per_token(task) / bandwidth
    print(f"\nprompts of {task.prompt}, batch {task.size}, {'compiled' if task.compiled else 'eager'}")
    table = pandas.DataFrame(new.values()).reindex(columns=["side", *_COLUMNS])
    print(table.to_string(index=False, na_rep="-", formatters=_COLUMNS))
    for name, seen in found.items():
        if seen.error:
            print(f"{name}: {seen.error}"[:80])
    sys.stdout.flush()


def ratio(rows: Sequence[Record], row: Record, other: str) -> float | None:
    """Median ratio to an eager side over the turns of both."""
    place = {"prompt": row["prompt"], "batch_size": row["batch_size"], "compiled": False, "side": other}
    base: list[float] = next((each["speeds"] for each in rows if place.items() <= each.items()), [])
    paired = [own / speed for own, speed in zip(row["speeds"], base, strict=False)]
    return statistics.median(paired) if paired else None


def bytes_per_token(task: Task) -> float:
    """Read by a plain step per row: its share of the weights, and keys and values of half an answer."""
    model, shape = task.model, task.model.config
    weights = sum(p.nbytes for p in [*model.base_model.layers.parameters(), *model.lm_head.parameters()])
    context = task.prompt + task.config.max_steps / 2
    cache = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * model.dtype.itemsize
    return weights / task.size + cache * context


# Field of a row -> how it is shown.
_COLUMNS: dict[str, Callable[[Any], str]] = {
    "tokens/s": "{:.1f}".format, "x ours": "{:.2f}".format, "x hf": "{:.2f}".format, "limit": "{:.0%}".format,
    "accept": "{:.0%}".format, "GiB": "{:.1f}".format,
    "ids": lambda ids: str(ids["wrong"] or f"={ids['near_ties'] or ''}"),
}  # fmt: skip


def described(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def tasks(args: GpuArguments, device: torch.device) -> list[Task]:
    """The parts of the table in order."""
    shape, divisor = (_TINY, 16) if args.dry else (copy.deepcopy(MODELS[args.model_shape]), 1)
    shape.tie_word_embeddings = False
    exit_layer = shape.num_hidden_layers // 4
    model, agreement = random_llama(shape, exit_layer, _AGREEMENT, device, args.seed)
    fuse(model.float() if args.dry else model)  # a CPU's products are in float32 in any case
    config = GenerationConfig(
        max_steps=max(16, args.new_tokens // 8) if args.dry else args.new_tokens,
        exit_layer=exit_layer, num_speculations=args.num_speculations,
        generation_strategy="self_speculative", sample=False,
    )  # fmt: skip
    dtype = str(model.dtype).removeprefix("torch.")
    print(
        f"{args.model_shape}, {dtype}; exit {exit_layer} agrees at {agreement:.0%} of positions\n"
        f"{config.num_speculations} drafted, greedy, {config.max_steps} tokens",
        flush=True,
    )
    parts = []
    for length, size in itertools.product(args.prompts, args.batch_size):
        longest = max(1, length // divisor)
        batches = torch.randint(shape.vocab_size, (args.rounds, size, longest)).tolist()
        # Equal lengths would spare plain decoding the masks of a real batch.
        batches = [[ids[: max(1, longest - row)] for row, ids in enumerate(batch)] for batch in batches]
        parts += [Task(model, config, longest, size, batches, compiled) for compiled in (False, True)]
    return parts


def measure_all(args: GpuArguments, device: torch.device, about: Record, rows: list[Record]) -> None:
    """Fill `about` and `rows` at once, so that an interruption keeps the figures."""
    about["read_gb_per_s"] = read_bandwidth(device) / 1e9
    print(f"{about['device']}, a product reads {about['read_gb_per_s']:.0f} GB/s", flush=True)
    parts = tasks(args, device)
    for name in (PLAIN, SPECULATIVE):
        try:
            work = count_work(parts[0].model, parts[0].strategy(name))
        except Exception as error:  # the table matters more
            print(f"kernels: {described(error)}"[:80], flush=True)
            continue
        about.setdefault("work", {})[name] = work._asdict()
        print(f"{name}, eager round: {work.kernels} kernels, {work.calls} calls", flush=True)
    for task in parts:
        found = {name: Measured() for name in task.names()}
        try:
            if task.compiled:
                capture_decoding(task.model)
            measure(task, found)
        except Exception as error:
            for seen in found.values():
                seen.error = seen.error or described(error)
        finally:
            decode_eagerly(task.model)
            add_rows(rows, task, found, 1e9 * about["read_gb_per_s"])


def main(argv: Sequence[str] | None = None) -> int:
    (args,) = parse(__doc__ or "", GpuArguments, args=argv)
    if not args.dry and not torch.cuda.is_available():
        refuse("no GPU on this machine; --dry True runs all of it on a tiny model on the CPU", status=1)
    # cuDNN's attention would make a plan for every new length, and that would be timed.
    torch.backends.cuda.enable_cudnn_sdp(False)
    transformers.logging.set_verbosity_error()
    device = torch.device("cpu" if args.dry else "cuda")
    about = describe("gpu", (args,))
    about["device"] = "cpu" if args.dry else torch.cuda.get_device_name(device)
    rows: list[Record] = []
    ended, started = "finished", time.perf_counter()
    alarm = threading.Timer(60 * args.minutes, _thread.interrupt_main)
    no_graphs = patch.object(captured_runner, "GraphRecorder", lambda device: lambda run: run)
    try:
        alarm.start()
        with no_graphs if args.dry else nullcontext():
            measure_all(args, device, about, rows)
    except KeyboardInterrupt:
        over = time.perf_counter() - started >= 60 * args.minutes
        ended = f"stopped after {args.minutes:g} minutes" if over else "interrupted"
    except Exception as error:  # no memory for the model
        ended = described(error)
    finally:
        alarm.cancel()
    wrong = sum((row.get("ids") or {}).get("wrong", 0) for row in rows)
    failed = sum(row["error"] is not None for row in rows)
    print(f"\n{ended}: {len(rows)} rows, {wrong} wrong ids, {failed} failed")
    print(json.dumps({**about, "ended": ended, "wrong": wrong, "failed": failed, "rows": rows}))
    stopped = ended == "finished" or ended.startswith("stopped")
    return 130 if ended == "interrupted" else int(bool(wrong or failed or not stopped))


if __name__ == "__main__":
    run(main)
