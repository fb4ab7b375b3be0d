"""The best cell of a sweep: sweep.py writes it, the other scripts use it through --tuned."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from arguments import GenerationConfig, ModelArguments, given_flags, refuse

# This file beside the table of a predicted sweep has the count of each token id in the outputs.
COUNTS = "vocabulary.json"


@dataclass(frozen=True)
class TuningArguments:
    """Settings that a sweep found."""

    tuned: str | None = None
    """Folder or CSV of a sweep, or their --output_dir: use the best exit layer and draft length, and for
    --draft_vocabulary the ids that it counted."""


def tuned(
    config: GenerationConfig,
    args: TuningArguments,
    model_args: ModelArguments,
    argv: Sequence[str] | None = None,
) -> GenerationConfig:
    """Put exit layer, draft length and draft weights of --tuned's best cell into the config, if it is given.

    That is the measured cell with the highest speed-up, or the predicted one if none is measured.
    """
    if args.tuned is None:
        return config
    if config.generation_strategy == "adaptive":
        refuse("--tuned: adaptive chooses for itself, leave it out")
    given = given_flags(argv, GenerationConfig)
    if given & {"exit_layer", "num_speculations"}:
        refuse("--tuned sets exit_layer and num_speculations: leave these flags out")
    with _refused(args.tuned):
        with open(_table(args.tuned, model_args.model), encoding="utf-8", newline="") as file:
            cells = list(csv.DictReader(file))
        compared = [cell for cell in cells if cell["speedup"]]
        if not compared:
            raise ValueError("no answers to compare in there" if cells else "no cells in there")
        best = max(compared, key=lambda cell: (cell["mode"] == "measured", float(cell["speedup"])))
        found: dict[str, Any] = {name: int(best[name]) for name in ("exit_layer", "num_speculations")}
        if "draft_weights" not in given:
            found["draft_weights"] = best["draft_weights"]
        return replace(config, generation_strategy="self_speculative", **found)


def counts(tuned: str | None, model_args: ModelArguments) -> dict[int, int]:
    """The count of each token id in the outputs of the --tuned sweep; empty if it was measured."""
    if tuned is None:
        return {}
    with _refused(tuned):
        path = _table(tuned, model_args.model).with_name(COUNTS)
    with _refused(f"{tuned}: {COUNTS}"):
        if not path.exists():
            return {}
        return {int(id_): int(number) for id_, number in json.loads(path.read_text("utf-8")).items()}


@contextmanager
def _refused(what: str) -> Iterator[None]:
    """End the program in one line if --tuned cannot be read in this block."""
    try:
        yield
    except KeyError as error:
        refuse(f"--tuned {what}: no column or field {error}")
    # TypeError: a row of too few fields; AttributeError: JSON that is no object
    except (OSError, ValueError, TypeError, AttributeError, csv.Error) as error:
        refuse(f"--tuned {what}: {getattr(error, 'strerror', None) or error}")


def _table(tuned: str, model: str | None) -> Path:
    """The CSV of --tuned: the path itself, or in a folder that of the newest sweep.

    Raises:
        ValueError: there is no sweep, it is unfinished, or it is of another model than `model`.
    """
    table = Path(tuned).expanduser()
    if table.is_dir():
        runs = [*table.glob("run.json"), *table.glob("sweep_*/run.json")]
        if not runs:
            raise ValueError("no sweep in there")
        last = max(runs, key=lambda run: run.stat().st_mtime)
        if json.loads(last.read_text()).get("status") != "finished":
            raise ValueError(f"the sweep is unfinished, go on with sweep.py --resume {last.parent}")
        table = last.with_name("sweep.csv")
    if (about := table.with_name("run.json")).exists():
        swept = json.loads(about.read_text("utf-8"))["model"]
        if model is None:
            from self_speculation import default_model  # imports torch

            model = default_model()
        if Path(swept).expanduser().resolve() != Path(model).expanduser().resolve():
            raise ValueError(f"is a sweep of --model {swept}, not of {model}")
    return table
