"""Pictures of results, as PNG and PDF."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")  # never opens a window, never blocks

import numpy
from matplotlib import pyplot
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from arguments import JSONObject
from runs.failures import Failed

if TYPE_CHECKING:
    import pandas  # which equality.py does without

SMALL = 9  # a line of 100 characters fits above two panels


def heat_maps(table: pandas.DataFrame, title: str, path: Path) -> None:
    """Draw how much of the drafts is accepted, over exit layer and draft length; measured speed-ups stand in
    their cells.

    Args:
        path: without suffix.
    """
    rows = table["exit_layer"].nunique()
    columns = table["num_speculations"].nunique()
    size = (max(9.0, 2.4 + 1.5 * columns), max(3.6, 1.8 + 0.5 * rows))
    figure, panels = pyplot.subplots(1, 2, figsize=size, constrained_layout=True)
    length = "mean_accepted_length"
    speedups = table.set_index(["exit_layer", "num_speculations"])["speedup"]
    lengths = Normalize(1.0, float(table[length].max()))
    first = (length, "mean accepted length (x: measured speed-up)", "{:.2f}", lengths)
    second = ("acceptance_rate", "acceptance rate", "{:.0%}", Normalize(0.0, 1.0))
    for axes, (name, label, form, norm) in zip(panels, (first, second), strict=True):
        grid = table.pivot(index="exit_layer", columns="num_speculations", values=name).astype(float)
        axes.imshow(grid, norm=norm, aspect="auto", origin="lower")
        axes.set_xticks(range(columns), grid.columns)
        axes.set_yticks(range(rows), grid.index)
        axes.set(xlabel="draft length [tokens]", ylabel="exit layer")
        axes.set_title(label, fontsize=10)
        for (row, column), number in numpy.ndenumerate(grid):
            cell = (grid.index[row], grid.columns[column])
            text = form.format(number)
            if name == length and numpy.isfinite(speedups[cell]):
                text += f"\nx {speedups[cell]:.2f}"
            color = "white" if norm(number) < 0.6 else "black"  # the colours of large values are bright
            axes.text(column, row, text, ha="center", va="center", fontsize=9, color=color)
    save(figure, title, path)


def paired_ratios(
    ratios: numpy.ndarray, interval: Sequence[float] | None, label: str, title: str, path: Path
) -> None:
    """Draw each ratio in ascending order, the median with an interval, and 1.

    Args:
        ratios: [n], at least one.
        label: of the axis of ratios.
        path: without suffix.
    """
    figure, axes = pyplot.subplots(figsize=(8.0, 3.6), constrained_layout=True)
    median = float(numpy.median(ratios))
    colors = numpy.where(ratios > 1, "C0", "C3")[numpy.argsort(ratios)]
    axes.scatter(numpy.sort(ratios), numpy.arange(1, len(ratios) + 1), c=colors, s=25, zorder=3)
    axes.axvline(1.0, color="#333333", linestyle="--", linewidth=1)
    shown = f"median {median:.2f}"
    if interval is not None:
        axes.axvspan(*interval, color="C0", alpha=0.15, linewidth=0)
        shown += f", 90 % confidence interval {interval[0]:.2f}-{interval[1]:.2f}"
    axes.axvline(median, color="C0", label=f"{shown}; above 1 in {(ratios > 1).sum()} of {len(ratios)}")
    axes.set_xlabel(label, fontsize=SMALL)
    axes.set_ylabel("in ascending order", fontsize=SMALL)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower center", fontsize=SMALL)
    save(figure, title, path)


def shares(pairs: Sequence[JSONObject], label: str, title: str, path: Path) -> None:
    """Draw `share` and `interval` of each pair of `ways`, in one color for each `picking`.

    Args:
        label: of the axis of shares.
        path: without suffix.
    """
    figure, axes = pyplot.subplots(figsize=(8.0, 1.4 + 0.26 * len(pairs)), constrained_layout=True)
    kinds = [*dict.fromkeys(pair["picking"] for pair in pairs)]
    for place, pair in enumerate(pairs):
        low, high = pair["interval"]
        color = f"C{kinds.index(pair['picking'])}"
        axes.barh(place, pair["share"], 0.7, color=color)
        axes.plot([low, high], [place, place], color="#333333", linewidth=1)
    names = [f"{pair['picking']}, {' / '.join(pair['ways'])}" for pair in pairs]
    axes.set_yticks(range(len(pairs)), names, fontsize=SMALL)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xlim(0.0, 1.0)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel(label, fontsize=SMALL)
    save(figure, title, path)


def save(figure: Figure, title: str, path: Path) -> None:
    """Write a figure with a title above it; `path` has no suffix. Raises Failed."""
    figure.suptitle(title, fontsize=SMALL)
    partial = path.with_suffix(".partial")
    try:
        for kind in ("png", "pdf"):
            figure.savefig(partial, dpi=130, format=kind)
            partial.replace(path.with_suffix(f".{kind}"))
    except OSError as error:
        raise Failed(f"cannot write {path}.{kind}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)
    pyplot.close(figure)
