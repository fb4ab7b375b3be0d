"""Model, data, strategy, settings and machine of a run: above its tables, in its pictures, in a citation."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Collection, Sequence
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
    parts = _settings(run, left_out)
    return "\n".join(_filled(line) for line in (parts, _machine_with_batch(run)))


def citation(run: Record, figure: str) -> str:
    """One line for a paper: a figure, with the settings that it holds for.

    Args:
        figure: with its baseline, the number of examples and an interval.
    """
    asked, libraries = run["arguments"], run["libraries"]
    picked = "greedy"
    if asked["sample"] and asked["temperature"]:
        picked = (
            f"sampled at temperature {asked['temperature']}, top_p {asked['top_p']}, top_k {asked['top_k']}"
        )
    parts = _settings(run, {"sample", "temperature", "top_p", "top_k", "max_steps"})
    settings = ", ".join([*parts, picked, f"at most {asked['max_steps']} new tokens"])
    used = ", ".join(f"{name} {libraries[name]}" for name in ("torch", "transformers"))
    commit = f"commit {run['commit']}" if run["commit"] else "no commit"
    by = f"self-speculation {run['version']}, {commit}, {used}"
    line = f"{figure}; {settings}; {', '.join(_machine_with_batch(run))}; {by}"
    return " ".join(line.split())  # a template may have several lines


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


def _machine_with_batch(run: Record) -> list[str]:
    asked = run["arguments"]
    sizes = [f"batch size {asked['batch_size']}"] if "batch_size" in asked else []
    return [*machine(run).split(", "), *sizes]


def _filled(parts: list[str]) -> str:
    """Lines that end between two parts; no part is divided."""
    text = ", ".join(part.replace(" ", "\xa0") for part in parts)
    return textwrap.fill(text, 100, subsequent_indent="  ", break_on_hyphens=False).replace("\xa0", " ")


def machine(run: Record) -> str:
    """Number format, GPU or processor with threads, and number of ranks."""
    same = run["computed_in"] == run["dtype"]
    dtype = run["dtype"] if same else f"weights in {run['dtype']}, products in {run['computed_in']}"
    on_cpu = run["device"] == "cpu"
    threads = run.get("threads_used") or counted(run["threads"], "thread")
    where = f"{run['processor']}, {threads}" if on_cpu else run["device"]
    return f"{dtype}, {where}, {counted(run['num_ranks'], 'rank')}"


def early_exit_alone(asked: Record) -> str:
    """Whose tokens a generation by these arguments has, if they are not the full model's."""
    if asked.get("generation_strategy") != "autoregressive" or asked["exit_layer"] == -1:
        return ""
    return f"by the early exit at layer {asked['exit_layer']} alone, not by the full model"


def threads_used(used: Sequence[int], most: int, what: str) -> str:
    """Such as "1 of 2 threads in 3 of 10 examples"; empty if none had fewer than `most` threads."""
    fewer = sorted(number for number in used if number < most)
    if not fewer:
        return ""
    few = " to ".join(map(str, dict.fromkeys((fewer[0], fewer[-1]))))
    return f"{few} of {counted(most, 'thread')} in {len(fewer)} of {counted(len(used), what)}"


def note_threads(about: Record, used: Sequence[int], what: str) -> None:
    """Add the numbers of threads that were used to the content of `run.json`, if some are fewer than all."""
    if few := threads_used(used, about["threads"], what):
        about["threads_used"] = few


def least_threads(record: Record) -> int:
    """The fewest threads of a record's strategies; records of earlier versions have none."""
    return min((value for name, value in record.items() if name.endswith("threads")), default=sys.maxsize)


def note(remark: str) -> str:
    """A remark below a table, in 80 columns."""
    return textwrap.fill(f"note: {remark}", 80, subsequent_indent="  ", break_on_hyphens=False)


def counted(number: int, what: str) -> str:
    """Such as "1 round" or "2 rounds"."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
