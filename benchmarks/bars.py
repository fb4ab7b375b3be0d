"""The picture of several programs' speeds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas
from matplotlib import pyplot

from measures.plots import SMALL, save


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
        table: the index has the names; rows of one name stand together. `by` names the color of each.
        label: of the axis of values.
        path: without suffix.
        line: a value that all are compared with.
        colors: of the values of `by`, in their order.
    """
    names = table.index.unique()
    number = table.groupby(level=0).cumcount()
    each = 1 + number.max()  # bars of a name
    height = 0.8 / each
    size = (8.0, 1.2 + 0.22 * len(names) * (1 + each))
    figure, axes = pyplot.subplots(figsize=size, constrained_layout=True)
    table = table.assign(place=names.get_indexer(table.index) + (number - (each - 1) / 2) * height)
    for color, (kind, group) in zip(colors, table.groupby("by", sort=False), strict=False):
        ends = group[["low", "high"]].astype(float).sub(group["value"], axis=0).abs().fillna(0.0)
        how: dict[str, Any] = {"xerr": ends.T.to_numpy(), "ecolor": "#333333", "color": color, "label": kind}
        drawn = axes.barh(group["place"], group["value"].astype(float), height, **how)
        axes.bar_label(drawn, fmt="%.2f", padding=4, fontsize=SMALL)
    if line is not None:
        axes.axvline(line, color="#333333", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.02)
    axes.set_xlabel(label, fontsize=SMALL)
    if (kinds := table["by"].nunique()) > 1:
        figure.legend(loc="outside lower center", ncols=kinds, fontsize=SMALL)
    save(figure, title, path)
