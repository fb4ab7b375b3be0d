"""Adaptive decoding against decoding token by token, and against the best fixed setting that a search finds.

    python benchmarks/adaptive.py --max_steps 128
    python benchmarks/adaptive.py --model FOLDER_OR_FILE --draft_weights auto --max_steps 128

On questions, on prompts of HumanEval and on text to be repeated, greedy and sampled, in one process on one
loaded model, prompt by prompt in turns. Fixed settings are searched for on the first prompts of each
workload: exits, draft lengths, the model's own layers and a copy in fewer bits, with and without lookups and
the short vocabulary of --draft_vocabulary. The best of them and adaptive decoding then answer all prompts.
Adaptive decoding goes on with what it has learnt, as in a program that answers one prompt after the other,
from nothing at the start of a workload. The last line is one JSON object.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from arguments import GenerationConfig, ModelArguments, parse
from measures.metrics import quartiles
from measures.sides import Answer, Generate, ours
from measures.workloads import workloads
from runs.startup import adaptive, autoregressive, load_generator, model_name
from runs.status import bars_fit_the_output
from self_speculation.adaptive_generator import candidate_layers
from self_speculation.config import DraftWeights
from self_speculation.model.prepared import prepared

PLAIN, ADAPTIVE = "autoregressive", "adaptive"


@dataclass(frozen=True)
class AdaptiveArguments:
    """How much to measure."""

    workloads: list[str] = field(default_factory=lambda: ["chat", "code", "repeat"])
    """Which."""
    picking: list[str] = field(default_factory=lambda: ["greedy", "sampled"])
    """How tokens are picked: greedy, sampled, or both."""
    num_prompts: int | None = None
    """Prompts of each workload; without it, all."""
    rounds: int = 1
    """How often each prompt is answered by each side, in turn."""
    lengths: list[int] = field(default_factory=lambda: [2, 4, 8])
    """Draft lengths of the fixed settings."""
    searched: int = 2
    """Prompts of each workload that fixed settings are searched on."""
    finalists: int = 2
    """Fixed settings that answer all prompts; 0: no search."""


def fixed_settings(
    config: GenerationConfig, num_layers: int, lengths: Sequence[int]
) -> dict[str, GenerationConfig]:
    """The grid, by name."""
    weights: list[DraftWeights] = ["exact"]
    if config.draft_weights != "exact":
        weights.append(config.draft_weights)
    return {
        f"{kind} {layer} x {k}{' + lookup' if lookup else ''}{f', {ids} ids' if ids else ''}": replace(
            config, generation_strategy="self_speculative", exit_layer=layer, num_speculations=k,
            draft_weights=kind, prompt_lookup=lookup, draft_vocabulary=ids,
        )
        for kind in weights
        for layer in candidate_layers(num_layers, kind)
        for k, lookup, ids in itertools.product(lengths, (0, 4), {None, config.draft_vocabulary})
    }  # fmt: skip


def in_turns(
    sides: Mapping[str, Generate], prompts: Sequence[list[int]], rounds: int, seed: int, title: str
) -> Iterator[dict[str, Answer]]:
    """What all sides answer to each prompt; another one goes first each time."""
    turns = list(itertools.product(range(rounds), enumerate(prompts)))
    for turn, (number, ids) in tqdm(turns, desc=title, leave=False):
        order = list(sides)
        start = (turn + number) % len(order)
        answers = {}
        for side in order[start:] + order[:start]:
            torch.manual_seed(seed + number)
            answers[side] = sides[side](ids)
        if all(len(answer.ids) > answer.num_first for answer in answers.values()):
            yield answers


def seconds_per_token(answer: Answer) -> float:
    return 1.0 / answer.decode_tokens_per_second


def ratios(answers: Sequence[Mapping[str, Answer]], side: str, other: str) -> list[float]:
    """How many times as fast a side decodes as another one, prompt by prompt."""
    return [seconds_per_token(each[other]) / seconds_per_token(each[side]) for each in answers]


def typical(values: Sequence[float]) -> float:
    return statistics.geometric_mean(values) if values else math.nan


def main() -> None:
    model_args, config, args = parse(__doc__ or "", ModelArguments, GenerationConfig, AdaptiveArguments)
    generator = load_generator(model_args, config)
    model, end_ids = generator.model, generator.eos_token_ids
    given = workloads(generator.tokenizer)
    rows: list[dict[str, Any]] = []
    for picking, workload in itertools.product(args.picking, args.workloads):
        picked = replace(config, sample=picking == "sampled")
        plain = {PLAIN: ours(model, end_ids, autoregressive(generator, picked)[1])}
        prompts = given[workload][: args.num_prompts]
        longest = max(prompts, key=len)
        for generate in (*plain.values(), ours(model, end_ids, adaptive(generator, picked)[1])):
            generate(longest)  # warms up, and measures what passes cost
        grid = {
            name: ours(model, end_ids, setting)
            for name, setting in fixed_settings(picked, len(model.base_model.layers), args.lengths).items()
        }
        found: list[str] = []
        if args.finalists:
            trial = in_turns({**plain, **grid}, prompts[: args.searched], 1, model_args.seed, "searching")
            tried = list(trial)
            found = sorted(grid, key=lambda name: typical(ratios(tried, name, PLAIN)))[-args.finalists :]
        prepared(model).learnt.clear()
        sides = {**plain, ADAPTIVE: ours(model, end_ids, adaptive(generator, picked)[1])}
        sides |= {name: grid[name] for name in found}
        answers = list(in_turns(sides, prompts, args.rounds, model_args.seed, f"{picking}, {workload}"))
        for side in [ADAPTIVE, *found]:
            low, middle, high = quartiles(ratios(answers, side, PLAIN))
            took = [each[side] for each in answers]
            rows.append(
                {
                    "picking": picking,
                    "workload": workload,
                    "side": side,
                    "x plain": middle,
                    "low": low,
                    "high": high,
                    "first": ratios(answers, side, PLAIN)[0],
                    # of all prompts together, which long answers count more in
                    "in all": sum(each[PLAIN].decode_time for each in answers)
                    / sum(len(each[PLAIN].ids) - 1 for each in answers)
                    * sum(len(answer.ids) - 1 for answer in took)
                    / sum(answer.decode_time for answer in took),
                    "sources": _sources(took),
                }
            )
        print(_shown(rows[-1 - len(found) :]), flush=True)
    best = [row for row in rows if row["side"] == ADAPTIVE]
    print(
        json.dumps({"model": model_name(model_args), "rows": rows, "worst": min(r["x plain"] for r in best)})
    )


def _sources(answers: Sequence[Answer]) -> dict[str, list[int]]:
    """Source -> rounds, drafted and accepted tokens of all answers."""
    totals: dict[str, list[int]] = {}
    for answer in answers:
        for source, counts in ((answer.result and answer.result.drafts_by_source) or {}).items():
            before = totals.get(source, [0, 0, 0])
            totals[source] = [a + b for a, b in zip(before, counts, strict=True)]
    return totals


def _shown(rows: Sequence[Mapping[str, Any]]) -> str:
    table = pandas.DataFrame(rows).drop(columns=["sources"])
    lines = [table.to_string(index=False, float_format="{:.2f}".format)]
    for source, counts in rows[0]["sources"].items():
        lines.append(f"  {source}: {counts[2]} of {counts[1]} in {counts[0]} rounds")
    return "\n".join(lines)


if __name__ == "__main__":
    bars_fit_the_output()
    main()
