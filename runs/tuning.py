"""The best cell of a sweep: sweep.py writes it, the other scripts use it through --tuned."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from arguments import GenerationConfig, ModelArguments, given_flags, read_run, refuse
from self_speculation.config import default_model

# This file beside the table of a predicted sweep has the count of each token id in the outputs.
COUNTS = "vocabulary.json"


@dataclass(frozen=True)
class TuningArguments:
    """Settings that a sweep found."""

    tuned: str | None = None
    """Folder of a sweep, its CSV, or its --output_dir: use the best exit layer and draft length, and for
    --draft_vocabulary the ids that it counted."""


def tuned(
    config: GenerationConfig,
    args: TuningArguments,
    model_args: ModelArguments,
    argv: Sequence[str] | None = None,
) -> GenerationConfig:
    """Put exit layer, draft length and draft weights of --tuned's best cell into the config."""
    if args.tuned is None:
        return config
    if config.generation_strategy == "adaptive":
        refuse("--tuned: adaptive chooses for itself, leave it out")
    given = given_flags(argv, GenerationConfig)
    if given & {"exit_layer", "num_speculations"}:
        refuse("--tuned sets exit_layer and num_speculations: leave these flags out")
    _, sweep = _sweep(args.tuned, model_args.model)
    if (best := sweep["metrics"]["best"]) is None:
        refuse(f"--tuned {args.tuned}: no answers to compare in there")
    found: dict[str, Any] = {name: best[name] for name in ("exit_layer", "num_speculations")}
    if "draft_weights" not in given:
        found["draft_weights"] = sweep["arguments"]["draft_weights"]
    return replace(config, generation_strategy="self_speculative", **found)


def counts(tuned: str | None, model_args: ModelArguments) -> dict[int, int]:
    """The count of each token id in the outputs of the --tuned sweep; empty if it was measured."""
    path = None if tuned is None else _sweep(tuned, model_args.model)[0] / COUNTS
    if path is None or not path.exists():
        return {}
    return {int(id_): number for id_, number in json.loads(path.read_text("utf-8")).items()}


def _sweep(tuned: str, model: str | None) -> tuple[Path, dict[str, Any]]:
    """The folder of --tuned's newest sweep, and its `run.json`. It must be finished, and of this model."""
    path = Path(tuned).expanduser()
    folder = path if path.is_dir() else path.parent
    runs = [*folder.glob("run.json"), *folder.glob("sweep_*/run.json")] if path.exists() else []
    if not runs:
        refuse(f"--tuned {tuned}: no sweep in there")
    last = max(runs, key=lambda run: run.stat().st_mtime)
    try:
        sweep = read_run(str(last.parent))
    except ValueError as error:
        refuse(f"--tuned {tuned}: {error}")
    if sweep["status"] != "finished":
        refuse(f"--tuned {tuned}: the sweep is unfinished, go on with sweep.py --resume {last.parent}")
    names = sweep["model"], default_model() if model is None else model
    if len({Path(name).expanduser().resolve() for name in names}) > 1:
        refuse(f"--tuned {tuned}: is a sweep of --model {names[0]}, not of {names[1]}")
    return last.parent, sweep
