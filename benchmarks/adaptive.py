"""Adaptive decoding against autoregressive decoding, and against the best fixed setting that a search finds.

    python benchmarks/adaptive.py --max_steps 128
    python benchmarks/adaptive.py --model FOLDER_OR_FILE --draft_weights int4 --max_steps 128

For each workload (questions, prompts of HumanEval, text to repeat, ...), in one process on one loaded
model, sides alternating prompt by prompt: the search tries fixed settings on the first prompts (exits and
draft lengths, the model's own layers and the copy of --draft_weights, with and without n-gram drafts). Its
best ones and adaptive decoding then answer all prompts. Adaptive decoding learns from prompt to prompt, and
begins each workload with nothing learned.

*x* is the decode speed-up over autoregressive decoding, the median over all prompts, with its middle half;
*first* that of the first prompt; *of best* that of adaptive decoding over the best fixed setting; *sums*
all tokens by all time. The last line is one JSON object.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import pandas

sys.path.insert(0, str(Path(__file__).parent.parent))

from arguments import GenerationConfig, ModelArguments, at_least, check, parse, refuse
from benchmarks.sides import ADAPTIVE, PLAIN, Answers, in_turns, ours, strategies
from benchmarks.workloads import NAMES, workloads
from measures.metrics import quartiles
from runs.heading import heading
from runs.program import run
from runs.records import describe, describe_model
from runs.startup import load_generator, model_name
from self_speculation.config import DraftWeights
from self_speculation.drafts.registry import forget_what_was_learnt


@dataclass(frozen=True)
class AdaptiveArguments:
    """How much to measure."""

    workloads: list[str] = field(default_factory=lambda: list(NAMES))
    """Which: chat, code, repeat, translate, summarise, question, maths, retrieve."""
    picking: list[str] = field(default_factory=lambda: ["greedy", "sampled"])
    """greedy, sampled, or both."""
    num_prompts: int | None = None
    """Prompts of each workload; without it, all."""
    rounds: int = 1
    """Answers of each side to each prompt."""
    lengths: list[int] = field(default_factory=lambda: [2, 4, 8])
    """Draft lengths of the fixed settings."""
    searched: int = 2
    """Prompts of each workload that fixed settings are searched on."""
    finalists: int = 2
    """Fixed settings that answer all prompts; 0: no search."""

    def __post_init__(self) -> None:
        for name, allowed in (("workloads", NAMES), ("picking", ("greedy", "sampled"))):
            check(self, name, {*getattr(self, name)} <= {*allowed}, f"must be among {', '.join(allowed)}")
        at_least(self, 1, "num_prompts", "rounds", "searched", "lengths")


def fixed_settings(
    config: GenerationConfig, num_layers: int, lengths: Sequence[int]
) -> dict[str, GenerationConfig]:
    """Name -> setting: exits at a twelfth to a third of the layers, and all layers of a copy."""
    exits = sorted({max(1, round(num_layers * share)) for share in (1 / 12, 1 / 8, 1 / 4, 1 / 3)})
    kinds: dict[DraftWeights, None] = dict.fromkeys(("exact", config.draft_weights))
    return {
        f"{kind} {layer} x {k}{' + n-grams' if ngrams else ''}": replace(
            config, generation_strategy="self_speculative", exit_layer=layer, num_speculations=k,
            draft_weights=kind, prompt_lookup=ngrams,
        )
        for kind in kinds
        for layer in (exits if kind == "exact" else [*exits, num_layers])
        for k, ngrams in itertools.product(lengths, (0, 4))
    }  # fmt: skip


def ratios(turns: Sequence[Mapping[str, Answers]], side: str, other: str) -> list[float]:
    """Decode speed-up of one side over another, prompt by prompt."""
    return [
        each[side].decode_tokens_per_second / each[other].decode_tokens_per_second
        for each in turns
        if each[side].num_decoded and each[other].num_decoded
    ]


def typical(values: Sequence[float]) -> float:
    """The geometric mean; 0 if nothing was decoded."""
    return statistics.geometric_mean(values) if values else 0.0


def main(argv: Sequence[str] | None = None) -> int:
    groups = (ModelArguments, GenerationConfig, AdaptiveArguments)
    model_args, config, args = parse(__doc__ or "", *groups, args=argv)
    if config.max_steps < 2:
        refuse(f"--max_steps {config.max_steps}: must be at least 2, decoding begins after the first token")
    generator = load_generator(model_args, config)
    model, end_ids, seed = generator.model, generator.eos_token_ids, model_args.seed
    num_layers = len(model.base_model.layers)
    described = describe("adaptive", (model_args, replace(config, generation_strategy="adaptive")), "")
    print(heading(described | describe_model(model_name(model_args), model), left_out=("sample",)))
    given = workloads(generator.tokenizer)
    rows: list[dict[str, Any]] = []
    for picking, workload in itertools.product(args.picking, args.workloads):
        picked = replace(config, sample=picking == "sampled")
        prompts = [[ids] for ids in given[workload][: args.num_prompts]]
        configs = strategies(picked, num_layers)
        sides = {name: ours(model, end_ids, configs[name]) for name in (PLAIN, ADAPTIVE)}
        for side in sides.values():
            side(max(prompts, key=lambda group: len(group[0])))  # warms up
        settings = fixed_settings(picked, num_layers, args.lengths) if args.finalists else {}
        grid = {name: ours(model, end_ids, setting) for name, setting in settings.items()}
        tried = list(in_turns({PLAIN: sides[PLAIN], **grid}, prompts[: args.searched], 1, seed, "searching"))
        best = sorted(grid, key=lambda name: typical(ratios(tried, name, PLAIN)), reverse=True)
        fixed = best[: args.finalists]
        sides |= {name: grid[name] for name in fixed}
        forget_what_was_learnt(model)
        turns = list(in_turns(sides, prompts, args.rounds, seed, f"{picking}, {workload}"))
        new = [
            {"picking": picking, "workload": workload, **figures(turns, name, fixed)}
            for name in [ADAPTIVE, *fixed]
        ]
        show(new)
        rows += new
    worst = min((row["x"] for row in rows if row["side"] == ADAPTIVE and row["x"]), default=None)
    print(json.dumps({"model": Path(model_name(model_args)).name, "rows": rows, "worst": worst}))
    return 0


def figures(turns: Sequence[Mapping[str, Answers]], side: str, fixed: Sequence[str]) -> dict[str, Any]:
    """The row of a side; `fixed` are the names of the fixed settings."""
    each = ratios(turns, side, PLAIN)
    low, middle, high = quartiles(each) if each else (None, None, None)
    paired: list[float] = []
    if side == ADAPTIVE and fixed:
        paired = ratios(turns, ADAPTIVE, max(fixed, key=lambda name: typical(ratios(turns, name, PLAIN))))
    own, plain = (reduce(add, (turn[name] for turn in turns)) for name in (side, PLAIN))
    return {
        "side": side, "x": middle, "low": low, "high": high, "first": each[0] if each else None,
        "of best": statistics.median(paired) if paired else None,
        "sums": own.decode_tokens_per_second / plain.decode_tokens_per_second,
        "sources": {source: counts._asdict() for source, counts in own.draft_stats.by_source.items()},
    }  # fmt: skip


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the sides of one workload, and the draft sources of adaptive decoding."""
    table = pandas.DataFrame(rows).drop(columns=["sources"])
    print(table.to_string(index=False, float_format="{:.2f}".format, na_rep="-"))
    for source, counts in rows[0]["sources"].items():
        print(f"  {source}: {counts['accepted']} of {counts['drafted']} in {counts['rounds']} rounds")
    sys.stdout.flush()


if __name__ == "__main__":
    run(main)
