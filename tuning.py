"""The best cell of a sweep: written by sweep.py, used by the others through --tuned."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pandas

from arguments import GenerationConfig, TuningArguments, refuse


def best_cell(table: pandas.DataFrame) -> pandas.Series:
    """The row of the highest speed-up; measured ones count before predicted ones."""
    measured = table[table["mode"] == "measured"]
    candidates = measured if len(measured) else table
    return candidates.loc[candidates["speedup"].idxmax()]


def _when(path: Path) -> float:
    return path.stat().st_mtime if path.exists() else 0.0


def tuned(config: GenerationConfig, args: TuningArguments) -> GenerationConfig:
    """The config with exit layer and draft length of the sweep that --tuned names, if it names one."""
    if args.tuned is None:
        return config
    if config.exit_layer != -1 or config.num_speculations != -1:
        refuse("--tuned sets exit_layer and num_speculations: leave these flags out")
    path = Path(args.tuned).expanduser()
    if path.is_dir():  # of a sweep, or of several, of which the last counts
        path = max([path / "sweep.csv", *path.glob("sweep_*/sweep.csv")], key=_when)
    try:
        best = best_cell(pandas.read_csv(path))
        exit_layer, num_speculations = int(best["exit_layer"]), int(best["num_speculations"])
    except (OSError, KeyError, ValueError) as error:
        refuse(f"--tuned {args.tuned}: no table of a sweep in there ({error})")
    return dataclasses.replace(
        config,
        generation_strategy="self_speculative",
        exit_layer=exit_layer,
        num_speculations=num_speculations,
    )
