"""What a model is worth at each exit layer: accuracy and perplexity of two tasks of the evaluation harness.

    python benchmarks/exit_quality.py
    python benchmarks/exit_quality.py --model ID --picture models/exit_quality --step 4

The tasks are python_lines and python_text of eval_tasks/. Writes a PNG, a PDF and a CSV.
"""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import pandas
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

import eval as eval_script
from arguments import ModelArguments, parse
from plots import curves_by_exit
from startup import model_name, number_of_layers

TASKS = Path(__file__).parent.parent / "eval_tasks"


@dataclass(frozen=True)
class QualityArguments:
    """Which layers, and where to."""

    picture: str = "docs/exit_quality"
    """Path of the picture and the table, without suffix."""
    step: int = 1
    """Distance of exit layers."""


def main() -> None:
    model_args, args = parse(__doc__ or "", ModelArguments, QualityArguments)
    num_layers = number_of_layers(model_args)
    rows = []
    for exit_layer in tqdm([*range(1, num_layers, args.step), num_layers], desc="exit layers"):
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
            flags = {
                "model": model_name(model_args),
                "dtype": model_args.dtype,
                "device": model_args.device,
                "include_path": TASKS,
                "tasks": "python_lines,python_text",
                "exit_layer": exit_layer if exit_layer < num_layers else -1,
                "output_dir": folder,
                "batch_size": 4,
                "bootstrap_iters": 0,
            }
            eval_script.main([text for name, value in flags.items() for text in (f"--{name}", str(value))])
            (path,) = Path(folder).glob("*/*/results_*.json")
            results = json.loads(path.read_text())["results"]
        rows.append(
            {
                "exit_layer": exit_layer,
                "accuracy of python_lines": results["python_lines"]["acc,none"],
                "byte perplexity of python_text": results["python_text"]["byte_perplexity,none"],
            }
        )
    table = pandas.DataFrame(rows)
    path = Path(args.picture)
    table.to_csv(path.with_suffix(".csv"), index=False)
    curves_by_exit({"": table}, list(table)[1:], path)
    print(table.to_string(index=False, float_format="{:.3f}".format))
    print(f"\n{path}: .png, .pdf, .csv")


if __name__ == "__main__":
    main()
