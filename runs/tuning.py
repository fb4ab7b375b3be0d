"""The best cell of a sweep: written by sweep.py, used by the others through --tuned."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from arguments import GenerationConfig, ModelArguments, given_flags, refuse

# Beside the table of a predicted sweep: how often each token id was output.
COUNTS = "vocabulary.json"


@dataclass(frozen=True)
class TuningArguments:
    """Settings that were found by a sweep."""

    tuned: str | None = None
    """Folder or CSV of a sweep, or their --output_dir: use the best exit layer and draft length, and for
    --draft_vocabulary the ids that it counted."""


def best_cell(cells: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The cell of the highest speed-up; predicted ones count only where none was measured.

    Raises:
        ValueError: there are none.
        KeyError: a cell without mode or speed-up.
    """
    if not cells:
        raise ValueError("no cells in there")
    cells = [cell for cell in cells if cell["speedup"] != ""]
    if not cells:
        raise ValueError("no answers to compare in there")
    measured = [cell for cell in cells if cell["mode"] == "measured"]
    return max(measured or cells, key=lambda cell: float(cell["speedup"]))


def tuned(
    config: GenerationConfig,
    args: TuningArguments,
    model_args: ModelArguments,
    argv: Sequence[str] | None = None,
) -> GenerationConfig:
    """The config with exit layer, draft length and the drafts' weights of the sweep that --tuned names, if it
    names one. A sweep of another model ends the program.

    Args:
        argv: the command line, as for `parse`.
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
            best = best_cell(list(csv.DictReader(file)))
        found: dict[str, Any] = {name: int(best[name]) for name in ("exit_layer", "num_speculations")}
        # Older tables lack a column, and mean the model's own layers; or have one more, for short heads.
        if "draft_weights" not in given:
            found["draft_weights"] = best.get("draft_weights") or "exact"
        if "draft_vocabulary" not in given:
            found["draft_vocabulary"] = int(best.get("draft_vocabulary") or 0) or None
        return replace(config, generation_strategy="self_speculative", **found)


def counts(tuned: str | None, model_args: ModelArguments) -> dict[int, int]:
    """How often each token id was output in the sweep that --tuned names; empty where nobody counted. A sweep
    of another model ends the program.
    """
    if tuned is None:
        return {}
    with _refused(tuned):
        path = _table(tuned, model_args.model).with_name(COUNTS)
    with _refused(f"{tuned}: {COUNTS}"):
        if not path.exists():
            return {}  # by a sweep that measured, or one of before there were counts
        return {int(id_): int(number) for id_, number in json.loads(path.read_text("utf-8")).items()}


@contextmanager
def _refused(what: str) -> Iterator[None]:
    """What cannot be read of --tuned ends the program in one line."""
    try:
        yield
    except KeyError as error:
        refuse(f"--tuned {what}: no column or field {error}")
    # TypeError: a row of too few fields; AttributeError: JSON that is no object
    except (OSError, ValueError, TypeError, AttributeError, csv.Error) as error:
        refuse(f"--tuned {what}: {getattr(error, 'strerror', None) or error}")


def _other_model(table: Path, asked: str | None) -> str | None:
    """Which two models they are, where the sweep is not of the one asked for.

    A table by itself does not tell; a name is a hub id or a path.
    """
    if not (about := table.with_name("run.json")).exists():
        return None
    swept = json.loads(about.read_text("utf-8"))["model"]
    if asked is None:
        from self_speculation import default_model  # heavy, as the model that comes next is

        asked = default_model()
    same = Path(swept).expanduser().resolve() == Path(asked).expanduser().resolve()
    return None if same else f"is a sweep of --model {swept}, not of {asked}"


def _table(tuned: str, model: str | None) -> Path:
    """The path itself if it is a file; of a folder, the CSV of the newest sweep in there.

    Args:
        model: that is asked for; None: the default one.

    Raises:
        ValueError: there is no sweep, it is unfinished, or one of another model.
    """
    table = _newest(Path(tuned).expanduser())
    if (other := _other_model(table, model)) is not None:
        raise ValueError(other)
    return table


def _newest(path: Path) -> Path:
    """As `_table`, of whichever model."""
    if not path.is_dir():
        return path
    runs = [*path.glob("run.json"), *path.glob("sweep_*/run.json")]
    if not runs:
        raise ValueError("no sweep in there")
    last = max(runs, key=lambda run: run.stat().st_mtime)
    if json.loads(last.read_text()).get("status") != "finished":
        raise ValueError(f"the sweep is unfinished, go on with sweep.py --resume {last.parent}")
    return last.with_name("sweep.csv")
