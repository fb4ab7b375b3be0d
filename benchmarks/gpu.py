"""One table of decoding on a GPU: one model a run, in at most nine minutes, without a checkpoint.

    python benchmarks/gpu.py --model_shape Llama-3.2-1B
    python benchmarks/gpu.py --dry True      # on a CPU: a tiny model, passes are not captured

The model is a Llama of random weights in bf16 with the shape of a real one. Its early exit agrees with it
about as often as those of the published LayerSkip checkpoints do. Prompts are random ids. The sides are
`generate` of transformers, plain and with `assistant_early_exit` (one prompt at a time), and our strategies,
eager and captured, with the model's first layers and with a 4-bit copy of all. Sides alternate. (Llama-3.2-1B
ties its head to its embedding; here they are two.) Row r of a batch has a prompt of r tokens less.

Above the table stand the memory bandwidth, the host's time for an eager layer and for a captured pass, the
kernels of an eager plain step and round, and the device's time for the products of a layer.

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

import copy
import itertools
import json
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import pandas
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))

from arguments import GenerationConfig, at_least, check, parse, refuse
from benchmarks.inspection import (
    Judged,
    ProductTime,
    count_work,
    host_time,
    judge_greedy,
    product_times,
    read_bandwidth,
)
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

T = TypeVar("T")

_AGREEMENT = 0.9  # of exit and model; then 70 % of 6 drafted tokens are accepted
_TOKENS = (1, 2, 4, 8, 16, 64)  # of products
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
    """One part of the table: the input of all its sides."""

    model: Any
    config: GenerationConfig  # of self-speculation
    batches: list[list[list[int]]]  # [turn][row], token ids
    compiled: bool

    @property
    def size(self) -> int:
        return len(self.batches[0])

    @property
    def place(self) -> tuple[int, int]:
        """Prompt length and batch size."""
        return len(self.batches[0][0]), self.size

    def strategy(self, name: str) -> GenerationConfig:
        config = strategies(self.config, self.model.config.num_hidden_layers)[name]
        # A drafted token of the copy costs half a step.
        return replace(config, num_speculations=min(3, config.num_speculations)) if name == COPY else config

    def make(self, name: str, **changes: Any) -> Side:
        """The side with changed settings."""
        if name in (TRANSFORMERS, EARLY_EXIT):
            return theirs(name, self.model, [], replace(self.config, **changes), self.size)
        return ours(self.model, [], self.strategy(name), self.size)

    def names(self) -> list[str]:
        own = [PLAIN, SPECULATIVE, COPY, ADAPTIVE]
        if self.compiled:
            return own
        return [TRANSFORMERS, *([EARLY_EXIT] if self.size == 1 else []), *own]


@dataclass
class Measured:
    """The figures of one side."""

    answers: list[Answers] = field(default_factory=list)
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
    sides = {name: task.make(name) for name in found}
    known: dict[tuple[int, ...], Judged] = {}

    def attempt(call: Callable[..., None], name: str, *args: Any) -> None:
        """Leave a side out after its first error."""
        if found[name].error is None:
            try:
                call(name, *args)
            except Exception as error:
                found[name].error = described(error)

    def warm_up(name: str) -> None:
        if name in (TRANSFORMERS, EARLY_EXIT):
            task.make(name, max_steps=8)(task.batches[0])
        else:
            config = task.strategy(name)
            strategy = make_strategy(config.generation_strategy)
            run_every_pass(strategy, model, task.batches[0][0], config, task.size)

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

    for name in found:
        attempt(warm_up, name)
    for turn, batch in enumerate(task.batches):
        for name in rotated(list(found), turn):
            attempt(answer, name, batch)
    for name in found:  # last: the deadline may cut this short
        attempt(judge, name)


def add_rows(rows: list[Record], task: Task, found: dict[str, Measured], bandwidth: float) -> None:
    """Add and print a row for each side with figures or an error."""
    length, size = task.place
    found = {name: seen for name, seen in found.items() if seen.answers or seen.error}
    if not found:
        return
    for name, seen in found.items():
        row: Record = {"prompt": length, "batch_size": size, "compiled": task.compiled, "side": name}
        row |= {"error": seen.error, "speeds": [each.decode_tokens_per_second for each in seen.answers]}
        rows.append(row)
    new = rows[-len(found) :]
    for row, (name, seen) in zip(new, found.items(), strict=True):
        if seen.answers:
            speed = statistics.median(row["speeds"])
            together = reduce(add, seen.answers)
            is_plain = name in (TRANSFORMERS, PLAIN)
            row |= {
                "tokens/s": speed,
                "prefill_ms": 1000 * statistics.median(answers.prefill_time for answers in seen.answers),
                "x ours": ratio(rows, row, PLAIN),
                "x hf": ratio(rows, row, TRANSFORMERS),
                "limit": speed * bytes_per_token(task) / bandwidth if is_plain else None,
                "accept": together.acceptance_rate(task.config.num_speculations),
                "GiB": seen.peak_mib / 1024,
                "ids": seen.judged and asdict(seen.judged),
            }
    print(f"\nprompts of {length}, batch {size}, {'compiled' if task.compiled else 'eager'}")
    table = pandas.DataFrame(new).reindex(columns=["side", *_COLUMNS])
    print(table.to_string(index=False, na_rep="-", formatters=_COLUMNS))
    for row in new:
        if row["error"]:
            print(f"{row['side']}: {row['error']}"[:80])
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
    context = task.place[0] + task.config.max_steps / 2
    cache = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * model.dtype.itemsize
    return weights / task.size + cache * context


def shown_ids(ids: Record) -> str:
    return str(ids["wrong"] or f"={ids['near_ties'] or ''}")


# Field of a row -> how it is shown.
_COLUMNS: dict[str, Callable[[Any], str]] = {
    "tokens/s": "{:.1f}".format, "x ours": "{:.2f}".format, "x hf": "{:.2f}".format, "limit": "{:.0%}".format,
    "accept": "{:.0%}".format, "GiB": "{:.1f}".format, "ids": shown_ids,
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
        parts += [Task(model, config, batches, compiled) for compiled in (False, True)]
    return parts


def attempted(what: str, measure: Callable[..., T], *args: Any) -> T | None:
    """The result, or None and a line if it fails, as a capture may."""
    try:
        return measure(*args)
    except Exception as error:
        print(f"{what}: {described(error)}"[:80], flush=True)
        return None


def show_products(times: Sequence[ProductTime]) -> None:
    """A row for each weight, a column for each number of tokens."""
    cells: dict[str, dict[int, str]] = {}
    for each in times:
        row = cells.setdefault(" x ".join(map(str, each.shape)), {})
        row[each.num_tokens] = f"{each.exact:.0f} {each.int4 / each.exact:.0%}"
    print("products of a layer by tokens: us in 16 bits, and the share that int4 takes")
    print(pandas.DataFrame.from_dict(cells, orient="index").to_string(), flush=True)


def measure_all(args: GpuArguments, device: torch.device, about: Record, rows: list[Record]) -> None:
    """Fill `about` and `rows` at once, so that an interruption keeps the figures."""
    about["read_gb_per_s"] = read_bandwidth(device) / 1e9
    print(f"{about['device']}, a product reads {about['read_gb_per_s']:.0f} GB/s", flush=True)
    parts = tasks(args, device)
    model = parts[0].model
    host = attempted("host", host_time, model)
    about["host_us"] = host and host._asdict()
    if host is not None:
        replay = "with" if device.type == "cuda" else "without"
        captured = f"{host.captured:.0f} for a captured pass {replay} its replay"
        print(f"host: {host.layer:.0f} us for an eager layer, {captured}", flush=True)
    for name in (PLAIN, SPECULATIVE):
        if (work := attempted("kernels", count_work, model, parts[0].strategy(name))) is not None:
            about.setdefault("work", {})[name] = work._asdict()
            print(f"{name}, eager round: {work.kernels} kernels, {work.calls} calls", flush=True)
    products = attempted("products", product_times, model, _TOKENS)
    about["product_us"] = products and [each._asdict() for each in products]
    if products is not None:
        show_products(products)
    for task in parts:
        found: dict[str, Measured] = {}
        try:
            with compiled(task.model) if task.compiled else nullcontext():
                measure(task, found)
        except Exception as error:
            for name in task.names():
                found.setdefault(name, Measured(error=described(error)))
        finally:
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
    interrupt = partial(signal.pthread_kill, threading.main_thread().ident or 0, signal.SIGINT)
    alarm = threading.Timer(60 * args.minutes, interrupt)
    alarm.daemon = True
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
