"""What a model is worth at each exit layer: accuracy and perplexity of two tasks of the evaluation harness.

    python benchmarks/exit_quality.py --picture docs/exit_quality
    python benchmarks/exit_quality.py --model ID --step 4

The tasks are python_lines and python_text of eval_tasks/. Writes a PNG, a PDF and a CSV.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from arguments import GenerationConfig, ModelArguments, parse
from measures.harness_model import HarnessModel
from measures.plots import curves_by_exit
from runs.startup import load_generator
from runs.status import bars_fit_the_output

TASKS = Path(__file__).parent.parent / "eval_tasks"


@dataclass(frozen=True)
class QualityArguments:
    """Which layers, and where to."""

    picture: str = "models/exit_quality"
    """Path of the picture and the table, without suffix."""
    step: int = 1
    """Distance of exit layers."""


def main() -> None:
    model_args, args = parse(__doc__ or "", ModelArguments, QualityArguments)
    path = Path(args.picture)
    path.parent.mkdir(parents=True, exist_ok=True)
    config = GenerationConfig()
    generator = load_generator(model_args, config)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    num_layers = generator.model.config.num_hidden_layers
    rows = []
    for exit_layer in tqdm([*range(1, num_layers, args.step), num_layers], desc="exit layers"):
        early = dataclasses.replace(config, exit_layer=exit_layer if exit_layer < num_layers else -1)
        model = HarnessModel(generator, early, model_args.seed, batch_size=4)
        results = simple_evaluate(
            model, tasks=["python_lines", "python_text"], task_manager=manager, bootstrap_iters=0
        )["results"]
        rows.append(
            {
                "exit_layer": exit_layer,
                "accuracy of python_lines": results["python_lines"]["acc,none"],
                "byte perplexity of python_text": results["python_text"]["byte_perplexity,none"],
            }
        )
    table = pandas.DataFrame(rows)
    table.to_csv(path.with_suffix(".csv"), index=False)
    curves_by_exit({"": table}, list(table)[1:], path)
    print(table.to_string(index=False, float_format="{:.3f}".format))
    print(f"\n{path}: .png, .pdf, .csv")


if __name__ == "__main__":
    bars_fit_the_output()
    main()
