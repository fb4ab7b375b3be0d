"""Pictures of results, as PNG and PDF."""

from __future__ import annotations

from collections.abc import Collection, Mapping
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
from matplotlib.ticker import MaxNLocator

_SMALL = 9  # a line of 100 characters fits above two panels
_FRAME: dict[str, Any] = {"fill": False, "color": "gold", "linewidth": 3}
_UNITS = {
    "loss": "loss [nats per token]",
    "accuracy": "accuracy [share of tokens]",
    "agreement": "agreement [share of tokens]",
}


def heat_maps(
    table: pandas.DataFrame, mode: str, framed: tuple[tuple[int, int], str], title: str, path: Path
) -> None:
    """Draw speed-up and acceptance over exit layer and draft length.

    Args:
        mode: how the speed-ups came about, the first word above them.
        framed: exit layer and draft length of the cell with a frame, and the meaning of the frame.
        path: without suffix.
    """
    rows, columns = table["exit_layer"].nunique(), table["num_speculations"].nunique()
    size = (max(9.0, 2.4 + 1.5 * columns), max(3.6, 1.8 + 0.5 * rows))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=size, constrained_layout=True)
    spread = max(0.05, float((table["speedup"] - 1).abs().max()))
    cell, meaning = framed
    norm = TwoSlopeNorm(1.0, 1.0 - spread, 1.0 + spread)
    _heat_map(left, table, cell, "speedup", "{:.2f}", "RdBu", norm)
    left.set_title(f"{mode} speed-up over autoregressive decoding (red: slower)", fontsize=10)
    _heat_map(right, table, cell, "acceptance_rate", "{:.0%}", "viridis", Normalize(0.0, 1.0))
    right.set_title("acceptance rate", fontsize=10)
    frame = pyplot.Rectangle((0, 0), 1, 1, label=meaning, **_FRAME)
    figure.legend(handles=[frame], loc="outside lower right", fontsize=_SMALL)
    figure.suptitle(title, fontsize=_SMALL)
    save(figure, path)


def bars(series: Mapping[str, pandas.DataFrame], label: str, title: str, path: Path) -> None:
    """Draw a bar for each row and each series, to `value`, with a line from `low` to `high` where they are.

    Args:
        series: name -> table; all have the same index, the names of the rows.
        label: of the axis of values.
        path: without suffix.
    """
    names = next(iter(series.values())).index
    height = 0.8 / len(series)
    size = (8.0, 1.2 + 0.22 * len(names) * (1 + len(series)))
    figure, axes = pyplot.subplots(figsize=size, constrained_layout=True)
    for number, (name, table) in enumerate(series.items()):
        places = numpy.arange(len(names)) + (number - (len(series) - 1) / 2) * height
        value = table["value"].astype(float)
        low, high = (table[end].astype(float).fillna(value) for end in ("low", "high"))
        spread = [value - low, high - value]
        drawn = axes.barh(places, value, height, xerr=spread, ecolor="#333333", label=name)
        axes.bar_label(drawn, fmt="%.2f", padding=4, fontsize=_SMALL)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.02)
    axes.set_xlabel(label, fontsize=_SMALL)
    if len(series) > 1:
        figure.legend(loc="outside lower center", ncols=len(series), fontsize=_SMALL)
    figure.suptitle(title, fontsize=_SMALL)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """`path` has no suffix."""
    for suffix in (".png", ".pdf"):
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
        axes.text(column, row, form.format(number), ha="center", va="center", fontsize=9, color=color)
        if (grid.index[row], grid.columns[column]) == framed:
            corner = (column - 0.48, row - 0.46)
            axes.add_patch(pyplot.Rectangle(corner, 0.96, 0.92, **_FRAME))


def curves_by_exit(
    table: pandas.DataFrame, values: list[str], trained: Collection[int], title: str, path: Path
) -> None:
    """Draw one panel for each of `values` over `exit_layer`.

    Args:
        trained: exits to be marked.
        path: without suffix.
    """
    size = (4.8 * len(values), 3.6)
    figure, axes = pyplot.subplots(1, len(values), figsize=size, constrained_layout=True)
    marked = table[table["exit_layer"].isin(trained)]
    for panel, value in zip(axes, values, strict=True):
        panel.plot(table["exit_layer"], table[value], marker="o", markersize=3)
        panel.plot(marked["exit_layer"], marked[value], "o", color="C1", label="trained exits")
        panel.set_xlabel("exit layer")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.set_xlim(left=0)
        panel.set_ylabel(_UNITS[value])
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    if len(marked):
        axes[-1].legend(loc="lower right", fontsize=_SMALL)
    figure.suptitle(title, fontsize=_SMALL)
    save(figure, path)
