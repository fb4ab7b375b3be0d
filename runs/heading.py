"""Model, data, strategy, settings and machine of a run: above its tables and in its pictures."""

from __future__ import annotations

import textwrap
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path

from arguments import GenerationConfig, ModelArguments
from data import DataArguments
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
    asked, path = run["arguments"], Path(run["model"]).expanduser()
    strategy, hidden = asked.get("generation_strategy"), {*_HIDDEN, *left_out}
    if "exit_layer" not in hidden and (alone := early_exit_alone(asked)):
        strategy, hidden = f"{strategy} {alone}", {*hidden, "exit_layer"}
    names = (path.name if path.exists() else run["model"], asked.get("dataset"), strategy)
    settings: list[str] = []
    for name, group in zip(names, (ModelArguments, DataArguments, GenerationConfig), strict=True):
        own = [each for each in fields(group) if each.name in asked.keys() - hidden]
        changed = [f"{each.name} {asked[each.name]}" for each in own if asked[each.name] != each.default]
        settings += [*filter(None, [name]), *changed]
    sizes = [f"batch size {asked['batch_size']}"] if "batch_size" in asked else []
    return "\n".join(map(_filled, (settings, [*machine(run).split(", "), *sizes])))


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
