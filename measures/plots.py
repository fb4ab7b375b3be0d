"""Pictures of results, as PNG and PDF."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # never opens a window, never blocks

import numpy
import pandas
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from runs import ranks

_SMALL = 9  # a line of 100 characters fits above two panels
_FRAME: dict[str, Any] = {"fill": False, "color": "gold", "linewidth": 3}


def heat_maps(
    table: pandas.DataFrame,
    mode: str,
    framed: tuple[tuple[int, int], str],
    title: str,
    path: Path,
    measured: float | None = None,
) -> None:
    """Draw speed-up and acceptance over exit layer and draft length.

    Args:
        mode: how the speed-ups came about, the first word above them.
        framed: exit layer and draft length of the cell with a frame, and the meaning of the frame.
        path: without suffix.
        measured: the framed cell's measured speed-up, where the map has another one.
    """
    rows, columns = table["exit_layer"].nunique(), table["num_speculations"].nunique()
    size = (max(9.0, 2.4 + 1.5 * columns), max(3.6, 1.8 + 0.5 * rows))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=size, constrained_layout=True)
    spread = max(0.05, float((table["speedup"] - 1).abs().max()))
    cell, meaning = framed
    norm = TwoSlopeNorm(1.0, 1.0 - spread, 1.0 + spread)
    below = "" if measured is None else f"\nmeasured {measured:.2f}"
    _heat_map(left, table, cell, "speedup", "{:.2f}", "RdBu", norm, below)
    left.set_title(f"{mode} speed-up over decoding without drafts (red: slower)", fontsize=10)
    _heat_map(right, table, cell, "acceptance_rate", "{:.0%}", "viridis", Normalize(0.0, 1.0))
    right.set_title("acceptance rate", fontsize=10)
    frame = pyplot.Rectangle((0, 0), 1, 1, label=meaning, **_FRAME)
    figure.legend(handles=[frame], loc="outside lower right", fontsize=_SMALL)
    figure.suptitle(title, fontsize=_SMALL)
    save(figure, path)


def bars(
    table: pandas.DataFrame,
    label: str,
    title: str,
    path: Path,
    line: float | None = None,
    colors: Sequence[str] = ("C0", "C1"),
) -> None:
    """Draw a bar for each row to `value`, with a line from `low` to `high` where they are.

    Args:
        table: its index has the names; rows of one name stand together. `by` names the color of each.
        label: of the axis of values.
        path: without suffix.
        line: a value that all are compared with.
        colors: of the values of `by`, in their order.
    """
    names, number = table.index.unique(), table.groupby(level=0).cumcount()
    each = 1 + number.max()  # bars of a name
    height = 0.8 / each
    size = (8.0, 1.2 + 0.22 * len(names) * (1 + each))
    figure, axes = pyplot.subplots(figsize=size, constrained_layout=True)
    places = names.get_indexer(table.index) + (number - (each - 1) / 2) * height
    kinds = table["by"].unique()
    for kind, color in zip(kinds, colors, strict=False):
        own = table["by"] == kind
        value = table["value"][own].astype(float)
        low, high = (table[end][own].astype(float).fillna(value) for end in ("low", "high"))
        how: dict[str, Any] = {"xerr": [value - low, high - value], "ecolor": "#333333"}
        drawn = axes.barh(places[own], value, height, color=color, label=kind, **how)
        axes.bar_label(drawn, fmt="%.2f", padding=4, fontsize=_SMALL)
    if line is not None:
        axes.axvline(line, color="#333333", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.02)
    axes.set_xlabel(label, fontsize=_SMALL)
    if len(kinds) > 1:
        figure.legend(loc="outside lower center", ncols=len(kinds), fontsize=_SMALL)
    figure.suptitle(title, fontsize=_SMALL)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """`path` has no suffix."""
    for suffix in (".png", ".pdf") if ranks.writes() else ():
        figure.savefig(path.with_suffix(suffix), dpi=130)
    pyplot.close(figure)


def _heat_map(
    axes: Axes,
    table: pandas.DataFrame,
    framed: tuple[int, int],
    value: str,
    form: str,
    colors: str,
    norm: Normalize,
    below: str = "",  # the framed cell's value
) -> None:
    grid = table.pivot(index="exit_layer", columns="num_speculations", values=value)
    image = axes.imshow(grid.to_numpy(dtype=float), cmap=colors, norm=norm, aspect="auto", origin="lower")
    axes.set_xticks(range(len(grid.columns)), grid.columns)
    axes.set_yticks(range(len(grid.index)), grid.index)
    axes.set_xlabel("draft length [tokens]")
    axes.set_ylabel("exit layer")
    for (row, column), number in numpy.ndenumerate(grid.to_numpy(dtype=float)):
        red, green, blue, _ = image.cmap(image.norm(number))
        color = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.5 else "black"
        is_framed = (grid.index[row], grid.columns[column]) == framed
        text = form.format(number) + below * is_framed
        axes.text(column, row, text, ha="center", va="center", fontsize=9, color=color)
        if is_framed:
            corner = (column - 0.48, row - 0.46)
            axes.add_patch(pyplot.Rectangle(corner, 0.96, 0.92, **_FRAME))


def agreement_by_exit(table: pandas.DataFrame, trained: Collection[int], title: str, path: Path) -> None:
    """Draw `agreement` over `exit_layer`: how often an exit's draft would be accepted.

    Args:
        trained: exits to be marked.
        path: without suffix.
    """
    figure, panel = pyplot.subplots(figsize=(7.0, 3.6), constrained_layout=True)
    marked = table[table["exit_layer"].isin(trained)]
    panel.plot(table["exit_layer"], table["agreement"], marker="o", markersize=3)
    panel.plot(marked["exit_layer"], marked["agreement"], "o", color="C1", label="trained exits")
    panel.set_xlabel("exit layer")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.set_xlim(left=0)
    panel.set_ylabel("tokens on which the exit agrees with the last layer")
    panel.yaxis.set_major_formatter(PercentFormatter(1.0))
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
    if len(marked):
        panel.legend(loc="lower right", fontsize=_SMALL)
    figure.suptitle(title, fontsize=_SMALL)
    save(figure, path)
