"""Model, data, strategy, settings and machine of a run: above its tables and in its pictures."""

from __future__ import annotations

import textwrap
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path

from arguments import DataArguments, GenerationConfig, ModelArguments
from runs.records import Record

# These arguments stand elsewhere in the lines or in the table, or do not change the figures.
_HIDDEN = {
    "model", "dtype", "device", "seed", "output_dir", "threads", "dataset", "num_samples",
    "generation_strategy",
}  # fmt: skip


def heading(run: Record, left_out: Collection[str] = ()) -> str:
    """Model, dataset and strategy with their arguments other than defaults, then the machine; in 100 columns.

    Args:
        run: the content of `run.json`.
        left_out: arguments that vary in the table, or that it shows.
    """
    sizes = [f"batch size {run['arguments']['batch_size']}"] if "batch_size" in run["arguments"] else []
    return "\n".join(map(_filled, (_settings(run, left_out), [*machine(run).split(", "), *sizes])))


def _settings(run: Record, left_out: Collection[str]) -> list[str]:
    asked, path = run["arguments"], Path(run["model"]).expanduser()
    names = (
        path.name if path.exists() else run["model"],
        asked.get("dataset"),
        asked.get("generation_strategy"),
    )
    parts: list[str] = []
    if "exit_layer" not in left_out and (alone := early_exit_alone(asked)):
        names, left_out = (*names[:2], f"{names[2]} {alone}"), {*left_out, "exit_layer"}
    for name, group in zip(names, (ModelArguments, DataArguments, GenerationConfig), strict=True):
        own = [field for field in fields(group) if field.name in asked.keys() - {*_HIDDEN, *left_out}]
        changed = [field.name for field in own if asked[field.name] != field.default]
        parts += [*filter(None, [name]), *(f"{name} {asked[name]}" for name in changed)]
    return parts


def _filled(parts: list[str]) -> str:
    """Lines that end between two parts; no part is divided."""
    text = ", ".join(part.replace(" ", "\xa0") for part in parts)
    return textwrap.fill(text, 100, subsequent_indent="  ", break_on_hyphens=False).replace("\xa0", " ")


def machine(run: Record) -> str:
    """Number format, GPU or processor with threads, and number of ranks."""
    same = run["computed_in"] == run["dtype"]
    dtype = run["dtype"] if same else f"weights in {run['dtype']}, products in {run['computed_in']}"
    on_cpu = run["device"] == "cpu"
    where = f"{run['processor']}, {counted(run['threads'], 'thread')}" if on_cpu else run["device"]
    return f"{dtype}, {where}, {counted(run['num_ranks'], 'rank')}"


def early_exit_alone(asked: Record) -> str:
    """Whose tokens a generation by these arguments has, if they are not the full model's."""
    if asked.get("generation_strategy") != "autoregressive" or asked["exit_layer"] == -1:
        return ""
    return f"by the early exit at layer {asked['exit_layer']} alone, not by the full model"


def note(remark: str) -> str:
    """A remark below a table, in 80 columns."""
    return textwrap.fill(f"note: {remark}", 80, subsequent_indent="  ", break_on_hyphens=False)


def counted(number: int, what: str) -> str:
    """Such as "1 round" or "2 rounds"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
