"""The answers of eval.py against those of the harness's own Hugging Face model: the same? how fast?

    python benchmarks/eval_side_by_side.py --exit_layer 2 --num_speculations 4
    python benchmarks/eval_side_by_side.py --model ID --exit_layer 8 --num_speculations 6 --limit 10

Over the tasks of eval_tasks/, greedy, in one process on one loaded model; generation is timed in turns. The
last line is one JSON object; exit status 1 when anything differs.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from arguments import GenerationConfig, ModelArguments, parse
from measures.harness_model import HarnessModel
from runs.startup import autoregressive, load_generator

TASKS = Path(__file__).parent.parent / "eval_tasks"


@dataclass(frozen=True)
class SideBySideArguments:
    """How much to compare."""

    limit: int | None = None
    """Documents of each task; without it, all."""
    rounds: int = 3
    """How often each side generates, in turn."""
    batch_size: int = 1
    """Sequences at a time, on each side."""


def main() -> int:
    model_args, config, args = parse(__doc__ or "", ModelArguments, GenerationConfig, SideBySideArguments)
    config = dataclasses.replace(config, generation_strategy="self_speculative")
    generator = load_generator(model_args, config)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)

    def ours(generator: Any, config: GenerationConfig) -> HarnessModel:
        return HarnessModel(generator, config, model_args.seed, args.batch_size)

    sides: dict[str, HFLM] = {
        "hf": HFLM(pretrained=generator.model, tokenizer=generator.tokenizer, batch_size=args.batch_size),
        "autoregressive": ours(*autoregressive(generator, config)),
        "self_speculative": ours(generator, config),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for name, model in sides.items():
        model.generate_until = _timed(model.generate_until, seconds[name])
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)

    def evaluate(model: HFLM, *tasks: str) -> dict[str, list[Any]]:
        results = simple_evaluate(
            model, tasks=list(tasks), task_manager=manager, limit=args.limit, bootstrap_iters=0
        )
        return {task: [sample["resps"] for sample in results["samples"][task]] for task in tasks}

    others = {name: evaluate(model, "python_lines", "python_text") for name, model in sides.items()}
    answers = {}
    for _ in range(1 + args.rounds):  # the first one warms up
        for name, model in sides.items():
            answers[name] = evaluate(model, "python_functions")
    outcome: dict[str, Any] = {}
    for name in sides:
        said = {**answers[name], **others[name]}
        reference = {**answers["hf"], **others["hf"]}
        ratios = [theirs / own for theirs, own in zip(seconds["hf"][1:], seconds[name][1:], strict=True)]
        outcome[name] = {
            "identical": {task: said[task] == reference[task] for task in said},
            "median_seconds": statistics.median(seconds[name][1:]),
            "speed_of_hf": statistics.median(ratios),
            "lowest": min(ratios),
            "highest": max(ratios),
        }
        same = all(outcome[name]["identical"].values())
        print(
            f"{name:<17} {outcome[name]['median_seconds']:8.2f} s   {outcome[name]['speed_of_hf']:5.2f} x hf "
            f"({min(ratios):.2f}-{max(ratios):.2f})   {'identical' if same else 'DIFFERENT'}"
        )
    print(json.dumps({"model": model_args.model, "rounds": args.rounds, **outcome}))
    return 0 if all(all(side["identical"].values()) for side in outcome.values()) else 1


def _timed(generate: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        answers = generate(*args, **kwargs)
        seconds.append(time.perf_counter() - started)
        return answers

    return timed


if __name__ == "__main__":
    sys.exit(main())
