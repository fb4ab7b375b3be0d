"""What a run is about: the lines above its tables and in its pictures."""

from __future__ import annotations

import textwrap
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path

from arguments import DataArguments, GenerationConfig, ModelArguments
from runs.records import Record

_WIDTH = 100
# Arguments that lines have words of their own for, that the table shows, or that change nothing in it.
_SAID_OTHERWISE = {
    "model", "dtype", "device", "seed", "output_dir", "dataset", "num_samples", "generation_strategy",
    "max_steps", "sample", "temperature", "top_k", "top_p",
}  # fmt: skip


def heading(run: Record, left_out: Collection[str] = ()) -> str:
    """Model and data, how it generates, and by what: a line for each, in at most 100 columns.

    Args:
        run: what `run.json` says, or will say.
        left_out: arguments that have no single value here, or that a table shows itself.
    """
    asked = {name: value for name, value in run["arguments"].items() if name not in left_out}
    lines = [[_model(run), *_settings(asked, ModelArguments)]]
    if "dataset" in asked:
        lines[0] += [asked["dataset"], *_settings(asked, DataArguments)]
    elif "data" in asked:  # of a training
        lines[0].append(asked["data_path"] or asked["data"])
    if "generation_strategy" in asked:
        lines.append([asked["generation_strategy"], *_settings(asked, GenerationConfig)])
        if "sample" in asked:
            lines[-1].append(_picking(asked))
        if "max_steps" in asked:
            lines[-1].append(f"at most {asked['max_steps']} tokens")
    lines.append([machine(run)])
    if "batch_size" in asked:
        lines[-1].append(f"batch size {asked['batch_size']}")
    return "\n".join(
        textwrap.fill(", ".join(line), _WIDTH, subsequent_indent="  ", break_on_hyphens=False)
        for line in lines
    )


def machine(run: Record) -> str:
    """Number format, processor and threads or GPU, and how many processes there are."""
    same = run["computed_in"] == run["dtype"]
    dtype = run["dtype"] if same else f"{run['dtype']} computed in {run['computed_in']}"
    on_cpu = run["device"] == "cpu"
    where = f"{run['processor']}, {_several(run['threads'], 'thread')}" if on_cpu else run["device"]
    return f"{dtype}, {where}, {_several(run['num_ranks'], 'rank')}"


def _several(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _model(run: Record) -> str:
    """A hub id as it is; of a path, the last part."""
    path = Path(run["model"]).expanduser()
    return path.name if path.exists() else run["model"]


def _settings(asked: Record, group: type) -> list[str]:
    """Name and value of each field of a group of flags that is not at its default."""
    shown = [field for field in fields(group) if field.name in asked and field.name not in _SAID_OTHERWISE]
    return [f"{field.name} {asked[field.name]}" for field in shown if asked[field.name] != field.default]


def _picking(asked: Record) -> str:
    if not asked["sample"] or asked["temperature"] == 0:
        return "greedy"
    return f"sampled (temperature {asked['temperature']}, top_k {asked['top_k']}, top_p {asked['top_p']})"
