"""The best cell of a sweep: sweep.py writes it, the other scripts use it through --tuned."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from arguments import GenerationConfig, ModelArguments, given_flags, refuse
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
    with _refused(args.tuned):
        _, sweep = _sweep(args.tuned, model_args.model)
        if (best := sweep["metrics"]["best"]) is None:
            raise ValueError("no answers to compare in there")
        found: dict[str, Any] = {name: best[name] for name in ("exit_layer", "num_speculations")}
        if "draft_weights" not in given:
            found["draft_weights"] = sweep["arguments"]["draft_weights"]
        return replace(config, generation_strategy="self_speculative", **found)


def counts(tuned: str | None, model_args: ModelArguments) -> dict[int, int]:
    """The count of each token id in the outputs of the --tuned sweep; empty if it was measured."""
    if tuned is None:
        return {}
    with _refused(tuned):
        path = _sweep(tuned, model_args.model)[0] / COUNTS
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
        refuse(f"--tuned {what}: no field {error}")
    except (OSError, ValueError, TypeError, AttributeError) as error:  # the latter two: JSON of another kind
        refuse(f"--tuned {what}: {getattr(error, 'strerror', None) or error}")


def _sweep(tuned: str, model: str | None) -> tuple[Path, dict[str, Any]]:
    """The folder of --tuned's newest sweep, and its `run.json`.

    Raises:
        ValueError: there is no sweep, it is unfinished, or it is of another model than `model`.
    """
    path = Path(tuned).expanduser()
    path.stat()  # raises OSError
    folder = path if path.is_dir() else path.parent
    runs = [*folder.glob("run.json"), *folder.glob("sweep_*/run.json")]
    if not runs:
        raise ValueError("no sweep in there")
    last = max(runs, key=lambda run: run.stat().st_mtime)
    sweep = json.loads(last.read_text("utf-8"))
    if sweep["status"] != "finished":
        raise ValueError(f"the sweep is unfinished, go on with sweep.py --resume {last.parent}")
    if model is None:
        model = default_model()
    if Path(sweep["model"]).expanduser().resolve() != Path(model).expanduser().resolve():
        raise ValueError(f"is a sweep of --model {sweep['model']}, not of {model}")
    return last.parent, sweep
