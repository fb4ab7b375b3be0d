"""What a GPU makes of it: one table, in one command and eight minutes on one GPU.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --dry True      # on a CPU: tiny shapes, compiled passes traced only

Llamas of random weights in bf16, in the shapes of Llama-2-7B, Llama-3.2-1B and Llama-3-8B; early exits agree
with them about as often as those of the published LayerSkip checkpoints do. Each answers prompts of random
ids, greedily and by sampling: by `generate` of transformers, alone and with `assistant_early_exit`, and by
the strategies here, eager and compiled, in turns. (Llama-3.2-1B ties its head to its embedding. Here they are
two, which takes more memory and as much reading.) Before that, greedy ids are checked on small models.

Columns, about decoding alone, without the pass over the prompt: *tokens/s*; *x ours*, *x hf*: times as fast
as eager autoregressive decoding here, and as transformers; *limit*: the share of the memory's bandwidth, as a
copy on the device finds it, that reading weights, keys and values took; *accept*: drafted tokens that were
accepted; *reads* from the device and *kernels* per token (on a CPU: operators); *GiB*: the most memory held;
*ids*: = where every token is the model's choice in fp32 or a near-tie, else how many are not.

Nothing new begins after --minutes; a compilation that has begun is not broken off. Rows are written to a
folder of --output_dir as they come. The last line is one JSON object. Exit status 1 where an id is wrong or a
side failed.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas
import torch
import transformers
from transformers import LlamaConfig, PreTrainedModel

sys.path.insert(0, str(Path(__file__).parent.parent))

from arguments import GenerationConfig, parse, refuse
from data import one_line
from measures.comparison import Judged, judge_greedy
from measures.metrics import peak_memory_mib, predicted_speedup, token_acceptance
from measures.plots import bar_panels
from measures.sides import Answer, Generate, count_passes, early_exit, ours, theirs
from measures.synthetic import random_llama
from measures.timed_runs import run_every_pass, warm_up_tokens
from measures.work import Work, work_per_token
from runs.records import Record, Run, Writer, describe
from self_speculation import adaptive_generator, fuse, make_strategy
from self_speculation.drafts.costs import Costs
from self_speculation.model.compiled import compile_decoding
from self_speculation.model.prepared import prepared

TRANSFORMERS, EARLY_EXIT = "transformers", "hf, early exit"
AUTOREGRESSIVE, SPECULATIVE, ADAPTIVE = "autoregressive", "self-speculative", "adaptive"

# How often an exit picks the model's own token. Of 6 drafted tokens, 70 % are accepted then.
_AGREEMENT = 0.9
# Prompts of the first check: of each remainder by eight, as the addresses of masks go, and one that goes
# through the layers in pieces.
_CHECKED = (*range(9, 17), 1100)
_CHECKED_TOKENS = 20


@dataclass(frozen=True)
class Shape:
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    context: int
    exit_layer: int

    def dry(self) -> Shape:
        """As deep in proportion, and tiny."""
        heads = {"num_heads": 4, "num_kv_heads": max(1, 4 * self.num_kv_heads // self.num_heads)}
        layers = {"num_layers": self.num_layers // 4, "exit_layer": self.exit_layer // 4}
        return replace(self, **layers, **heads, **_TINY, context=512)

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocab_size, hidden_size=self.hidden_size, num_hidden_layers=self.num_layers,
            intermediate_size=self.intermediate_size, num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads, max_position_embeddings=self.context,
            tie_word_embeddings=False,
        )  # fmt: skip


SHAPES = {
    "Llama-2-7B": Shape(32, 4096, 11008, 32, 32, 32000, 4096, exit_layer=8),
    "Llama-3.2-1B": Shape(16, 2048, 8192, 32, 8, 128256, 131072, exit_layer=4),
    "Llama-3-8B": Shape(32, 4096, 14336, 32, 8, 128256, 8192, exit_layer=8),
}
_TINY = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 512}
_SMALL = Shape(4, 256, 512, 4, 4, 2048, 4096, exit_layer=2)


@dataclass(frozen=True)
class GpuArguments:
    """What to measure, and for how long."""

    minutes: float = 8.0
    """Nothing new begins after so many; models share them."""
    dry: bool = False
    """On the CPU: tiny shapes, prompts a sixteenth as long, answers an eighth: to see the program run."""
    models: list[str] = field(default_factory=lambda: list(SHAPES))
    """Shapes, in this order."""
    prompts: list[int] = field(default_factory=lambda: [128, 2048])
    """Tokens of the prompts."""
    new_tokens: int = 128
    """Tokens of an answer."""
    num_speculations: int = 6
    """Tokens drafted per round; adaptive chooses for itself."""
    rounds: int = 2
    """Prompts of each length; each side answers them in turn."""
    seed: int = 0
    """Of weights, prompts and draws."""
    output_dir: str = "./logs"
    """Where the folder with rows, table and picture goes."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.models if name not in SHAPES]:
            raise ValueError(f"models {unknown[0]}: must be among {', '.join(SHAPES)}")
        for name, least in (("minutes", 0), ("new_tokens", 128), ("num_speculations", 1), ("rounds", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)}: must be at least {least}")
        most = min(SHAPES[name].context for name in self.models) - self.new_tokens
        if not all(16 <= length <= most for length in self.prompts):
            raise ValueError(f"prompts {self.prompts}: must be between 16 and {most}")


@dataclass(frozen=True)
class Limit:
    """A moment after which nothing new begins."""

    end: float

    @property
    def over(self) -> bool:
        return time.perf_counter() >= self.end

    def share(self, number: int) -> Limit:
        """The end of the first of `number` equal parts of what is left."""
        now = time.perf_counter()
        return Limit(now + (self.end - now) / number)


@dataclass(frozen=True)
class Task:
    """One model, and the prompts and settings that all sides are given."""

    name: str
    model: PreTrainedModel
    config: GenerationConfig  # of self-speculation
    prompts: list[list[int]]
    bandwidth: float  # bytes per second

    @property
    def title(self) -> str:
        how = "sampled" if self.config.sample else "greedy"
        return f"{self.name}, prompts of {len(self.prompts[0])}, {how}"

    def strategies(self, *names: str) -> dict[str, GenerationConfig]:
        """Settings by strategy here."""
        chosen = replace(self.config, exit_layer=-1, num_speculations=-1)
        every = {
            AUTOREGRESSIVE: replace(chosen, generation_strategy="autoregressive"),
            SPECULATIVE: self.config,
            ADAPTIVE: replace(chosen, generation_strategy="adaptive"),
        }
        return {name: every[name] for name in names}

    def bytes_per_token(self, side: str, answers: Sequence[Answer], tokens_per_pass: float) -> float:
        """Weights, and keys and values of a context of middle length, that a token had to be read for."""
        layers, shape = self.model.base_model.layers, self.model.config
        context = len(self.prompts[0]) + self.config.max_steps // 2
        cache = 2 * shape.num_key_value_heads * shape.head_dim * context * self.model.dtype.itemsize
        layer = sum(weight.nbytes for weight in layers[0].parameters()) + cache
        head = self.model.get_output_embeddings().weight.nbytes
        full = len(layers) * layer + head
        if side == EARLY_EXIT:
            drafted = self.config.num_speculations * (self.config.exit_layer * layer + head)
            return (full + drafted) / tokens_per_pass
        results = [
            a.result for a in answers if a.result is not None and a.result.drafts_by_source is not None
        ]
        if not results:
            return full
        read = 0
        for result in results:
            for source, (rounds, drafted, _) in (result.drafts_by_source or {}).items():
                kind, _, depth = source.partition(" ")
                read += rounds * full + (drafted * (int(depth) * layer + head) if kind == "exit" else 0)
        return read / sum(result.num_decode_tokens for result in results)


@dataclass
class Measured:
    """What was seen of one side."""

    work: Work | None = None
    tokens_per_pass: float = 1.0
    peak_mib: float = 0.0
    answers: list[Answer] = field(default_factory=list)
    error: str | None = None


def main(argv: Sequence[str] | None = None) -> int:
    (args,) = parse(__doc__ or "", GpuArguments, args=argv)
    limit = Limit(time.perf_counter() + 60 * args.minutes)
    if not args.dry and not torch.cuda.is_available():
        refuse("no GPU on this machine; --dry True runs all of it on tiny shapes on the CPU", status=1)
    transformers.logging.set_verbosity_error()
    device = torch.device("cpu" if args.dry else "cuda")
    about = {
        "device": "cpu" if args.dry else torch.cuda.get_device_name(device),
        "dry": args.dry,
        "copy_gb_per_s": copy_bandwidth(device) / 1e9,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    run = Run.create(args.output_dir, "gpu", {**describe("gpu", (args,), ""), **about})
    table = Table(run)
    with ExitStack() as stack:
        if args.dry:
            stack.enter_context(patch.object(torch, "compile", partial(torch.compile, backend="eager")))
            stack.enter_context(patch.object(adaptive_generator, "_PATIENCE", 0.0))
        checks = check(device, args, limit)
        print(
            f"{about['device']}, a copy moves {about['copy_gb_per_s']:.0f} GB/s\n"
            f"checks: {checks['answers']} answers of small models, {checks['near_ties']} near-ties, "
            f"{checks['wrong']} wrong tokens, {len(checks['failed'])} failed"
        )
        print("\n".join(checks["failed"]), end="")
        for number, name in enumerate(args.models):
            try:
                measure_model(name, device, args, limit.share(len(args.models) - number), about, table)
            except RuntimeError as error:  # it finds no room, or a kernel left the GPU in disorder
                table.add_error(name, error)
            torch._dynamo.reset()
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    wrong = checks["wrong"] + sum((row.get("ids") or {}).get("wrong", 0) for row in table.rows)
    failed = len(checks["failed"]) + sum(row["error"] is not None for row in table.rows)
    summary = {
        **about, "new_tokens": args.new_tokens, "num_speculations": args.num_speculations,
        "rounds": args.rounds, "checks": checks, "wrong": wrong, "failed": failed,
        "stopped_by_limit": limit.over,
    }  # fmt: skip
    run.finish(table.rows, summary)
    if tables := table.panels():
        bar_panels(tables, "tokens/s", run.folder / "gpu")
    if limit.over:
        print(f"\nstopped after {args.minutes:g} minutes: --minutes and --models allow for the rest")
    print(f"\n{run.folder}/: run.json, records.jsonl" + (", gpu.png" if tables else ""))
    print(json.dumps({**summary, "rows": table.rows}))
    return 1 if wrong or failed else 0


@torch.inference_mode()
def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second read and written by a copy on the device."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = []
    for _ in range(8):
        wait()
        started = time.perf_counter()
        target.copy_(source)
        wait()
        seconds.append(time.perf_counter() - started)
    return 2 * source.nbytes / min(seconds)


def check(device: torch.device, args: GpuArguments, limit: Limit) -> Record:
    """Greedy ids of every strategy on small models: heads of queries that have keys alone, or share them."""
    greedy = GenerationConfig(max_steps=_CHECKED_TOKENS, sample=False)
    drafts: dict[str, Any] = {
        "generation_strategy": "self_speculative", "exit_layer": _SMALL.exit_layer,
        "num_speculations": args.num_speculations,
    }  # fmt: skip
    eager = {
        AUTOREGRESSIVE: greedy,
        SPECULATIVE: replace(greedy, **drafts),
        "lookups, confidence": replace(greedy, **drafts, prompt_lookup=3, draft_confidence="auto"),
        ADAPTIVE: replace(greedy, generation_strategy="adaptive"),
    }
    compiled = {f"compiled {name}": eager[name] for name in (AUTOREGRESSIVE, SPECULATIVE)}
    lengths, small = (_CHECKED[::8], replace(_SMALL, **_TINY)) if args.dry else (_CHECKED, _SMALL)
    judged, answers, failed = Judged(), 0, []
    for kv_heads, settings, prompts in (
        (_SMALL.num_heads, eager, lengths), (1, eager, lengths), (1, compiled, lengths[:-1]),
    ):  # fmt: skip
        shape = replace(small, num_kv_heads=kv_heads)
        model, _ = random_llama(shape.config(), shape.exit_layer, _AGREEMENT, device, args.seed)
        fuse(model)
        if settings is compiled:
            compile_decoding(model)
        for length in prompts:
            prompt = torch.randint(shape.vocab_size, (length,)).tolist()
            for name, config in settings.items():
                if limit.over:
                    break
                try:
                    judged += judge_greedy(model, prompt, ours(model, [], config)(prompt).ids)
                    answers += 1
                except RuntimeError as error:
                    failed.append(f"{name}, prompt of {length}: {type(error).__name__}: {one_line(error)}\n")
    return {"answers": answers, **asdict(judged), "failed": failed}


def measure_model(
    name: str, device: torch.device, args: GpuArguments, limit: Limit, about: Record, table: Table
) -> None:
    """All rows of one shape: eager ones first, then those that have to be compiled."""
    if limit.over:
        return
    shape = SHAPES[name].dry() if args.dry else SHAPES[name]
    lengths = [length // 16 for length in args.prompts] if args.dry else args.prompts
    model, agreement = random_llama(shape.config(), shape.exit_layer, _AGREEMENT, device, args.seed)
    fuse(model)
    print(f"\n{name}: exit {shape.exit_layer} agrees at {agreement:.0%} of positions")
    new_tokens = args.new_tokens // 8 if args.dry else args.new_tokens
    config = GenerationConfig(
        max_steps=new_tokens, exit_layer=shape.exit_layer, num_speculations=args.num_speculations,
        generation_strategy="self_speculative", sample=False,
    )  # fmt: skip
    tasks = []
    for length in lengths:
        prompts = torch.randint(shape.vocab_size, (args.rounds, length)).tolist()
        tasks += [
            Task(name, model, replace(config, sample=sample), prompts, 1e9 * about["copy_gb_per_s"])
            for sample in (False, True)
        ]
    for compiled in (False, True):
        if compiled:
            prepared(model).costs.clear()
            compile_decoding(model)
        for task in tasks:
            table.add(task, compiled, measure(task, compiled, args.seed, limit))


def measure(task: Task, compiled: bool, seed: int, limit: Limit) -> dict[str, Measured]:
    """Every side, warmed up and then timed in turns; empty where there was no time for one turn."""
    model, few = task.model, warm_up_tokens(task.config.num_speculations)
    names = (AUTOREGRESSIVE, SPECULATIVE) if compiled else (AUTOREGRESSIVE, SPECULATIVE, ADAPTIVE)
    strategies = task.strategies(*names)
    sides: dict[str, Generate] = {}
    if not compiled:
        sides = {TRANSFORMERS: theirs(model, [], task.config), EARLY_EXIT: early_exit(model, [], task.config)}
    sides |= {name: ours(model, [], config) for name, config in strategies.items()}
    found = {name: Measured() for name in sides}

    def attempt(name: str, *calls: Any) -> None:
        """One that fails is left out from then on."""
        try:
            for call in calls:
                call()
        except RuntimeError as error:
            found[name].error = f"{type(error).__name__}: {one_line(error)}"

    def warm_up(name: str) -> None:
        if name in strategies:
            strategy = make_strategy(strategies[name].generation_strategy)
            run_every_pass(strategy, model, task.prompts[0], strategies[name])
        elif name == EARLY_EXIT:
            found[name].tokens_per_pass = count_passes(model, sides[name], task.prompts[:1])
        else:
            sides[name](task.prompts[0], few)
        found[name].work = work_per_token(model, sides[name], task.prompts[0], few)

    def answer(name: str, prompt: list[int]) -> None:
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        found[name].answers.append(sides[name](prompt))
        found[name].peak_mib = max(found[name].peak_mib, peak_memory_mib(model.device))

    for name in sides:
        if limit.over:
            return {}
        attempt(name, partial(warm_up, name))
    for turn, prompt in enumerate(task.prompts):
        for name in [*sides][turn % len(sides) :] + [*sides][: turn % len(sides)]:
            if limit.over:
                return _complete(found)
            if not found[name].error:
                torch.manual_seed(seed + turn)
                attempt(name, partial(answer, name, prompt))
    return _complete(found)


def _complete(found: dict[str, Measured]) -> dict[str, Measured]:
    """What all sides have answered; nothing where that is nothing."""
    turns = min((len(seen.answers) for seen in found.values() if not seen.error), default=0)
    for seen in found.values():
        del seen.answers[turns:]
    return found if turns or all(seen.error for seen in found.values()) else {}


class Table:
    """Rows as they come: shown, and written to the folder of the run."""

    def __init__(self, run: Run) -> None:
        self.rows: list[Record] = []
        self._writer: Writer = run.writer(0)
        self._speeds: dict[tuple[str, str], list[float]] = {}  # by title and side
        self._judged: dict[Any, Judged] = {}  # by model, prompt and output

    def add(self, task: Task, compiled: bool, found: dict[str, Measured]) -> None:
        if not found:
            return
        prefix = "compiled " if compiled else ""
        print(f"\n{task.title}{', compiled' if compiled else ''}\n{_HEADING}")
        for name, seen in found.items():
            speeds = [answer.decode_tokens_per_second for answer in seen.answers]
            self._speeds[task.title, prefix + name] = speeds
        for name, seen in found.items():
            row = {
                "model": task.name,
                "prompt": len(task.prompts[0]),
                "sampled": task.config.sample,
                "compiled": compiled,
                "side": name,
                "error": seen.error,
                **(self._figures(task, prefix, name, seen) if seen.answers else {}),
            }
            self._keep(row)
            print(_shown(row))
            if row.get("of_formula"):
                print(f"  {row['of_formula']:.0%} of what the formula allows at this acceptance")

    def add_error(self, model: str, error: Exception) -> None:
        """A model whose other rows are missing."""
        said = f"{type(error).__name__}: {one_line(error)}"
        self._keep({"model": model, "error": said})
        print(f"\n{model}: {said}")

    def _keep(self, row: Record) -> None:
        self.rows.append({"index": len(self.rows), **row})
        self._writer.append(self.rows[-1])

    def _figures(self, task: Task, prefix: str, name: str, seen: Measured) -> Record:
        speed = statistics.median(self._speeds[task.title, prefix + name])
        read = task.bytes_per_token(name, seen.answers, seen.tokens_per_pass)
        results = [asdict(a.result) for a in seen.answers if a.result is not None]
        acceptance = formula = None
        if name == EARLY_EXIT:
            acceptance = (seen.tokens_per_pass - 1) / task.config.num_speculations
        elif drafted := sum(sum(result["drafted_by_position"] or ()) for result in results):
            acceptance = sum(sum(result["accepted_by_position"]) for result in results) / drafted
        gain = self._ratio(task, prefix + name, prefix + AUTOREGRESSIVE)
        if name == SPECULATIVE:
            exit_layer, k = task.config.exit_layer, task.config.num_speculations
            costs = Costs.estimated(task.model, exit_layer, "exact")
            formula = predicted_speedup(token_acceptance(results) or 0.0, k, exit_layer, costs)
        return {
            "tokens/s": speed,
            "tokens/s with prefill": statistics.median(a.tokens_per_second for a in seen.answers),
            "prefill_ms": 1000 * statistics.median(a.prefill_time for a in seen.answers),
            "x ours": self._ratio(task, prefix + name, AUTOREGRESSIVE),
            "x transformers": self._ratio(task, prefix + name, TRANSFORMERS),
            "gb_per_token": read / 1e9,
            "limit": speed * read / task.bandwidth,
            "acceptance": acceptance,
            "formula": formula,
            "of_formula": gain / formula if gain and formula else None,
            "reads": seen.work and seen.work.reads,
            "kernels": seen.work and seen.work.kernels,
            "peak_gib": seen.peak_mib / 1024,
            "ids": None if task.config.sample else asdict(self._judge(task, seen.answers)),
        }

    def _ratio(self, task: Task, side: str, other: str) -> float | None:
        """Median over the prompts that both have answered."""
        pairs = zip(self._speeds[task.title, side], self._speeds.get((task.title, other), []), strict=False)
        ratios = [a / b for a, b in pairs]
        return statistics.median(ratios) if ratios else None

    def _judge(self, task: Task, answers: Sequence[Answer]) -> Judged:
        judged = Judged()
        for prompt, answer in zip(task.prompts, answers, strict=False):
            key = (task.name, tuple(prompt), tuple(answer.ids))
            if key not in self._judged:  # most sides give the same ids
                self._judged[key] = judge_greedy(task.model, prompt, answer.ids)
            judged += self._judged[key]
        return judged

    def panels(self) -> dict[str, pandas.DataFrame]:
        """Speeds by side, for each task."""
        found: dict[str, dict[str, float]] = {}
        for (title, side), speeds in self._speeds.items():
            if speeds:
                found.setdefault(title, {})[side] = statistics.median(speeds)
        return {title: pandas.DataFrame({"tokens/s": speeds}) for title, speeds in found.items()}


# Of a row: heading, width, format; a line has 80 columns.
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
    """A row as a line of the table."""
    if row["error"]:
        return f"{row['side']:<23} {row['error']}"[:80]
    cells = [
        f"{'-' if row[key] is None else format(row[key], style):>{width}}"
        for key, (_, width, style) in _COLUMNS.items()
    ]
    ids = "-" if row["ids"] is None else row["ids"]["wrong"] or "="
    return f"{row['side']:<22}" + "".join(cells) + f"{ids:>4}"


if __name__ == "__main__":
    sys.exit(main())
