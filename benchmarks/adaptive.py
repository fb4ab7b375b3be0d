"""Speed-up of drafts over decoding without drafts by kind of prompt: by fixed settings, and adaptive.

    python benchmarks/adaptive.py --exit_layer 3 --num_speculations 3 --max_steps 96
    python benchmarks/adaptive.py --model FOLDER_OR_FILE --exit_layer 24 --num_speculations 4 \\
        --draft_weights int4 --max_steps 96

In one process on one loaded model, sides alternate prompt by prompt: without drafts; self-speculative by the
flags; the same with n-grams, where they match; adaptive, with a copy if --draft_weights asks for one.
Adaptive decoding learns from prompt to prompt, and begins with nothing learned.

*x* is the decode speed-up over decoding without drafts, the median over prompts, with its middle half;
*tenth* that of the slowest tenth; *sums* all tokens by all time. The last line is one JSON object.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add, attrgetter
from pathlib import Path
from typing import Any

import numpy
import pandas

sys.path.insert(0, str(Path(__file__).parent.parent))

from arguments import GenerationConfig, ModelArguments, at_least, check, parse, refuse
from benchmarks.sides import ADAPTIVE, PLAIN, SPECULATIVE, Answers, in_turns, ours, strategies
from benchmarks.workloads import NAMES, workloads
from measures.metrics import quartiles
from runs.program import run
from runs.records import counted, describe, describe_model, heading
from runs.startup import load_generator, model_name
from self_speculation.drafts.registry import forget_what_was_learnt

_NGRAMS = "n-grams, else these"


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

    def __post_init__(self) -> None:
        for name, allowed in (("workloads", NAMES), ("picking", ("greedy", "sampled"))):
            check(self, name, {*getattr(self, name)} <= {*allowed}, f"must be among {', '.join(allowed)}")
        at_least(self, 1, "num_prompts", "rounds")


def main(argv: Sequence[str] | None = None) -> int:
    groups = (ModelArguments, GenerationConfig, AdaptiveArguments)
    model_args, config, args = parse(__doc__ or "", *groups, args=argv)
    config = replace(config, generation_strategy="self_speculative")
    if config.max_steps < 2:
        refuse(f"--max_steps {config.max_steps}: must be at least 2, decoding begins after the first token")
    generator = load_generator(model_args, config)
    model, end_ids = generator.model, generator.eos_token_ids
    about = describe("adaptive", (model_args, config)) | describe_model(model_name(model_args), model)
    print(heading(about, left_out=("sample",)))
    prompts = {
        name: [[ids] for ids in found[: args.num_prompts]]
        for name, found in workloads(generator.tokenizer).items()
        if name in args.workloads
    }
    rows: list[dict[str, Any]] = []
    for picking in args.picking:
        configs = strategies(replace(config, sample=picking == "sampled"), config.exit_layer)
        configs[_NGRAMS] = replace(configs[SPECULATIVE], prompt_lookup=4)
        sides = {n: ours(model, end_ids, configs[n]) for n in (PLAIN, SPECULATIVE, _NGRAMS, ADAPTIVE)}
        for side in sides.values():
            side(max(itertools.chain(*prompts.values()), key=lambda group: len(group[0])))  # warms up
        forget_what_was_learnt(model)
        every: list[dict[str, Answers]] = []
        for workload in args.workloads:
            turns = list(
                in_turns(sides, prompts[workload], args.rounds, model_args.seed, f"{picking}, {workload}")
            )
            every += turns
            rows += show(turns, picking, workload)
        rows += show(every, picking, "all prompts")
    print(json.dumps({**about, "rows": rows}))
    return 0


def show(turns: Sequence[Mapping[str, Answers]], picking: str, workload: str) -> list[dict[str, Any]]:
    """Print a row for each side, and the draft sources of adaptive decoding."""
    own = {name: reduce(add, (turn[name] for turn in turns)) for name in turns[0]}
    decoded = [turn for turn in turns if all(answers.num_decoded for answers in turn.values())]
    rows, speed = [], attrgetter("decode_tokens_per_second")
    for name in [name for name in own if name != PLAIN and decoded]:
        ratios = [speed(turn[name]) / speed(turn[PLAIN]) for turn in decoded]
        low, middle, high = quartiles(ratios)
        sums = speed(own[name]) / speed(own[PLAIN])
        rows.append(
            {
                "picking": picking, "workload": workload, "side": name, "x": middle, "low": low, "high": high,
                "tenth": float(numpy.percentile(ratios, 10)), "sums": sums,
            }
        )  # fmt: skip
    print(f"\n{pandas.DataFrame(rows).to_string(index=False, float_format='{:.2f}'.format)}")
    for source, counts in own[ADAPTIVE].draft_stats.by_source.items():
        print(f"  {source}: {counts.accepted} of {counts.drafted} in {counted(counts.rounds, 'round')}")
    sys.stdout.flush()
    return rows


if __name__ == "__main__":
    run(main)
