"""One table of decoding on a GPU: one model a run, without a checkpoint.

    python benchmarks/gpu.py --model_shape Llama-3.2-1B
    python benchmarks/gpu.py --dry True      # on a CPU: a tiny model, passes are not captured

The model is a Llama of random weights in bf16 with the shape of a real one. Its early exit agrees with it
about as often as those of the published LayerSkip checkpoints do. Prompts are random ids. The sides are
`generate` of transformers, plain and with `assistant_early_exit` (one prompt at a time), and our strategies,
eager and captured, with the model's first layers and with a 4-bit copy of all. Sides alternate. (Llama-3.2-1B
ties its head to its embedding; here they are two.) Row r of a batch has a prompt of r tokens less.

Above the table stands the memory bandwidth.

The columns are about decoding without prefill: *tokens/s* of all sequences together; *x ours*, *x hf*:
speed-up over eager decoding without drafts and over transformers; *limit*: the share of the memory bandwidth
(of a product of matrix and vector) that reading weights, keys and values takes, without drafts; *accept*:
accepted / drafted tokens; *GiB*: peak memory; *ids*: = and the number of near-ties if every token is the
model's choice in fp32 or a near-tie, else the number of the others.

By arithmetic Llama-2-7B takes five minutes on an H100, Llama-3-8B six, Llama-3.2-1B three.

Ctrl-C ends the run with what it has. A side that fails costs its own row. The last line is one JSON object.
Exit status 1: an id is wrong or a side failed.
"""

from __future__ import annotations

import copy
import itertools
import json
import statistics
import sys
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
from torch.utils.benchmark import Timer

sys.path.insert(0, str(Path(__file__).parent.parent))

from arguments import GenerationConfig, at_least, check, parse, refuse
from benchmarks.peers import EARLY_EXIT, TRANSFORMERS, TransformersStrategy
from benchmarks.sides import COPY, PLAIN, drafts, ours, side, strategies
from benchmarks.synthetic import MODELS, llama, numbers, random_llama
from data import one_line
from measures import metrics
from measures.comparison import Judged, judge_greedy
from measures.timed_runs import TimedSide, measure_examples, warm_up
from runs.program import run
from runs.records import Record, describe
from self_speculation import HuggingfaceLlamaGenerator, Request, fuse, make_strategy
from self_speculation.model import captured_runner
from self_speculation.model.captured_runner import capture_decoding, decode_eagerly

_AGREEMENT = 0.9  # of exit and model; then 70 % of 6 drafted tokens are accepted
_TINY = llama(64, 128, 4, 4, 2, 512, False)


@dataclass(frozen=True)
class GpuArguments:
    """What to measure."""

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
    dry: bool = False
    """Try the program on a CPU: a tiny model, prompts a sixteenth as long, answers an eighth."""
    seed: int = 0
    """Of weights and prompts."""

    def __post_init__(self) -> None:
        check(self, "model_shape", self.model_shape in MODELS, f"must be one of {', '.join(MODELS)}")
        at_least(self, 1, "batch_size", "num_speculations", "rounds")
        at_least(self, 16, "new_tokens")
        longest = MODELS[self.model_shape].max_position_embeddings - self.new_tokens
        fits = all(16 <= length <= longest for length in self.prompts)
        check(self, "prompts", fits, f"must be between 16 and {longest}")


@dataclass(frozen=True)
class Task:
    """One part of the table: its sides answer the same batches."""

    generator: HuggingfaceLlamaGenerator
    config: GenerationConfig  # of self-speculation
    prompts: list[list[int]]  # token ids, batch after batch
    size: int
    compiled: bool

    def sides(self) -> dict[str, TimedSide]:
        configs = strategies(self.config, self.generator.model.config.num_hidden_layers)
        # A drafted token of the copy costs half a step.
        k = min(3, self.config.num_speculations)
        own = ours(self.generator, configs | {COPY: replace(configs[COPY], num_speculations=k)})
        if self.compiled:
            return own
        names = [TRANSFORMERS, *([EARLY_EXIT] if self.size == 1 else [])]
        return {n: side(n, self.generator, TransformersStrategy(n), self.config) for n in names} | own


@dataclass
class Measured:
    """The figures of the sides of a task, filled at once, so that an interruption keeps them."""

    errors: dict[str, str] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)  # GiB
    records: list[Record] = field(default_factory=list)
    judged: dict[str, Judged] = field(default_factory=dict)

    @contextmanager
    def attempt(self, *names: str) -> Iterator[None]:
        """An error of this block is that of these sides."""
        try:
            yield
        except Exception as error:
            self.errors |= {name: described(error) for name in names if name not in self.errors}


def measure(task: Task, sides: dict[str, TimedSide], found: Measured) -> None:
    """Warm up every side, time all in turns, and judge their greedy ids."""
    device = task.generator.model.device
    for name, own in sides.items():
        with found.attempt(name):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            warm_up([own], task.prompts[0], task.size)
            found.peaks[name] = metrics.peak_memory_mib(device) / 1024
    warm = {name: own for name, own in sides.items() if name not in found.errors}
    requests = {index: Request(ids) for index, ids in enumerate(task.prompts)}
    for index, record in measure_examples([*warm.values()], requests, task.size) if warm else ():
        if isinstance(record, Exception):
            raise record
        found.records.append({"index": index, **record})
    judge = cache(partial(judge_greedy, task.generator.model))  # most sides give the same ids
    for name in warm:  # last: it may be cut short
        with found.attempt(name):
            pairs = [(task.prompts[each["index"]], each[f"{name}: tokens"]) for each in found.records]
            found.judged[name] = reduce(add, (judge(tuple(prompt), tuple(ids)) for prompt, ids in pairs))


def add_rows(rows: list[Record], task: Task, found: Measured, bandwidth: float) -> None:
    """Add and print a row for each side with figures or an error."""
    compiled, prompt = task.compiled, max(map(len, task.prompts))
    seen = {name for name in task.sides() if found.records and f"{name}: tokens" in found.records[0]}
    new: dict[str, Record] = {
        name: {
            "prompt": prompt, "batch_size": task.size, "compiled": compiled, "side": name,
            "error": found.errors.get(name),
            "speeds": metrics.rates(found.records, f"{name}: ", decode=True).tolist() if name in seen else [],
        }
        for name in task.sides()
        if name in seen or name in found.errors
    }  # fmt: skip
    if not new:
        return
    rows += new.values()
    for name in seen:
        row = new[name]
        row |= {
            "tokens/s": statistics.median(row["speeds"]),
            "prefill_ms": metrics.speed(found.records, f"{name}: ")["time_to_first_token_ms"],
            "x ours": ratio(rows, row, PLAIN),
            "x hf": ratio(rows, row, TRANSFORMERS),
            "accept": drafts(found.records, name).acceptance_rate,
            "GiB": found.peaks[name],
        }
        if judged := found.judged.get(name):
            row["ids"] = asdict(judged)
        if name in (TRANSFORMERS, PLAIN):
            row["limit"] = row["tokens/s"] * bytes_per_token(task, prompt) / bandwidth
    print(f"\nprompts of {prompt}, batch {task.size}, {'compiled' if compiled else 'eager'}")
    table = pandas.DataFrame(new.values()).reindex(columns=["side", *_COLUMNS])
    print(table.to_string(index=False, na_rep="-", formatters=_COLUMNS))
    for name, error in found.errors.items():
        print(f"{name}: {error}"[:80])
    sys.stdout.flush()


def ratio(rows: Sequence[Record], row: Record, other: str) -> float | None:
    """Median ratio to an eager side over the turns of both."""
    place = {"prompt": row["prompt"], "batch_size": row["batch_size"], "compiled": False, "side": other}
    base: list[float] = next((each["speeds"] for each in rows if place.items() <= each.items()), [])
    paired = [own / speed for own, speed in zip(row["speeds"], base, strict=False)]
    return statistics.median(paired) if paired else None


def bytes_per_token(task: Task, prompt: int) -> float:
    """Read by a plain step per row: its share of the weights, and keys and values of half an answer."""
    model, shape = task.generator.model, task.generator.model.config
    weights = sum(p.nbytes for p in [*model.base_model.layers.parameters(), *model.lm_head.parameters()])
    context = prompt + task.config.max_steps / 2
    cache = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * model.dtype.itemsize
    return weights / task.size + cache * context


@torch.inference_mode()
def read_bandwidth(device: torch.device) -> float:
    """Bytes per second that a product of a matrix and a vector reads on the device."""
    rows = 2**16 if device.type == "cuda" else 2**12
    matrix = torch.ones(rows, 2**13, dtype=torch.bfloat16, device=device)  # a GiB on a GPU
    timer = Timer("matrix.mv(matrix[0])", globals={"matrix": matrix}, num_threads=torch.get_num_threads())
    return matrix.nbytes / timer.blocked_autorange().median


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
    generator = HuggingfaceLlamaGenerator(numbers(shape.vocab_size), model, make_strategy("autoregressive"))
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
        prompts = torch.randint(shape.vocab_size, (args.rounds * size, longest)).tolist()
        # Equal lengths would spare plain decoding the masks of a real batch.
        prompts = [ids[: max(1, longest - row % size)] for row, ids in enumerate(prompts)]
        parts += [Task(generator, config, prompts, size, compiled) for compiled in (False, True)]
    return parts


def measure_all(args: GpuArguments, device: torch.device, about: Record, rows: list[Record]) -> None:
    """Fill `about` and `rows` at once, so that an interruption keeps the figures."""
    about["read_gb_per_s"] = read_bandwidth(device) / 1e9
    print(f"{about['device']}, a product reads {about['read_gb_per_s']:.0f} GB/s", flush=True)
    for task in tasks(args, device):
        found, sides = Measured(), task.sides()
        try:
            with found.attempt(*sides):
                if task.compiled:
                    capture_decoding(task.generator.model)
                measure(task, sides, found)
        finally:
            decode_eagerly(task.generator.model)
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
    ended = "finished"
    no_graphs = patch.object(captured_runner, "GraphRecorder", lambda device: lambda run: run)
    try:
        with no_graphs if args.dry else nullcontext():
            measure_all(args, device, about, rows)
    except KeyboardInterrupt:
        ended = "interrupted"
    except Exception as error:  # no memory for the model
        ended = described(error)
    wrong = sum((row.get("ids") or {}).get("wrong", 0) for row in rows)
    failed = sum(row["error"] is not None for row in rows)
    print(f"\n{ended}: {len(rows)} rows, {wrong} wrong ids, {failed} failed")
    print(json.dumps({**about, "ended": ended, "wrong": wrong, "failed": failed, "rows": rows}))
    return 130 if ended == "interrupted" else int(bool(wrong or failed or ended != "finished"))


if __name__ == "__main__":
    run(main)
