"""Draw round.png: a round of self-speculative decoding.

python docs/draw_round.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

PLAIN, DRAFTED, STATE, ACCEPTED, REJECTED = "#eceff4", "#f3d27a", "#cfe3f7", "#9fd3a4", "#f0b4ae"


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, color: str = PLAIN) -> None:
    shape = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", fc=color, ec="#5b6270"
    )
    axes.add_patch(shape)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color="#5b6270", zorder=3)
    )


def draw_round() -> None:
    """A round with three drafted tokens, two of them accepted."""
    width, height = 8.4, 5.4
    _, axes = pyplot.subplots(figsize=(width, height), constrained_layout=True)
    axes.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axes.axis("off")
    left, column = 2.3, 1.45
    inputs = [("return", ACCEPTED), ("line", DRAFTED), (".split", DRAFTED), ("(", REJECTED)]
    for i, (token, color) in enumerate(inputs):
        x = left + i * column
        box(axes, x, 0.2, 1.25, 0.45, token, color)
        box(axes, x, 1.0, 1.25, 0.95, "layers\n0 .. E-1", DRAFTED if i < 3 else PLAIN)
        box(axes, x, 2.3, 1.25, 0.45, "exit state", STATE)
        arrow(axes, (x + 0.62, 0.65), (x + 0.62, 1.0))
        arrow(axes, (x + 0.62, 1.95), (x + 0.62, 2.3))
        if i < 3:  # the drafted token is the next input
            arrow(axes, (x + 1.25, 1.1), (x + column + 0.06, 0.5))
    box(axes, left, 3.05, 3 * column + 1.25, 0.6, "layers E .. L-1, one pass over four exit states", PLAIN)
    for i in range(4):
        arrow(axes, (left + i * column + 0.62, 2.75), (left + i * column + 0.62, 3.05))
        arrow(axes, (left + i * column + 0.62, 3.65), (left + i * column + 0.62, 4.0))
    for i, (token, color) in enumerate(
        [("line", ACCEPTED), (".split", ACCEPTED), ("()", ACCEPTED), ("unused", PLAIN)]
    ):
        box(axes, left + i * column, 4.0, 1.25, 0.45, token, color)
    notes = [
        (0.42, "last token and\nthree drafted tokens"), (1.47, "draft:\none pass per token"),
        (2.52, "hidden states\nafter layer E-1"), (3.35, "verify:\none pass"),
        (4.22, "the full model's\nown tokens"),
    ]  # fmt: skip
    for y, text in notes:
        axes.text(0.1, y, text, va="center", fontsize=9, color="#333a46")
    axes.text(
        left, 4.95,
        "Two drafted tokens are accepted. The third is rejected, and '()' replaces it.\n"
        "The cache is rolled back by one position. One pass of layers E .. L-1 has given three tokens.",
        va="center", fontsize=9, color="#333a46",
    )  # fmt: skip
    pyplot.savefig(Path(__file__).with_name("round.png"), dpi=130)


if __name__ == "__main__":
    draw_round()
