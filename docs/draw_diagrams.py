"""Draw the diagrams of the pages in docs/.

    python docs/draw_diagrams.py

Writes round.png, batch.png, family.png and dataset.png beside itself.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

HERE = Path(__file__).parent
PLAIN, DRAFT, KEPT, VERIFIED, LOST = "#eceff4", "#f3d27a", "#cfe3f7", "#9fd3a4", "#f0b4ae"


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, color: str = PLAIN) -> None:
    shape = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", fc=color, ec="#5b6270"
    )
    axes.add_patch(shape)
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0) -> None:
    style = f"arc3,rad={bend}"
    shape = FancyArrowPatch(
        start, end, arrowstyle="-|>", mutation_scale=11, color="#5b6270", connectionstyle=style, zorder=3
    )
    axes.add_patch(shape)


def canvas(width: float, height: float) -> Axes:
    _, axes = pyplot.subplots(figsize=(width, height), constrained_layout=True)
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.set_aspect("equal")
    axes.axis("off")
    return axes


def save(name: str) -> None:
    pyplot.savefig(HERE / f"{name}.png", dpi=130)
    pyplot.close()


def draw_round() -> None:
    """A round with three drafted tokens, two of them accepted."""
    axes = canvas(8.4, 5.4)
    left, column = 2.3, 1.45
    inputs = [("return", VERIFIED), ("line", DRAFT), (".split", DRAFT), ("(", LOST)]
    for i, (token, color) in enumerate(inputs):
        x = left + i * column
        box(axes, x, 0.2, 1.25, 0.45, token, color)
        box(axes, x, 1.0, 1.25, 0.95, "layers\n0 .. E-1", DRAFT if i < 3 else PLAIN)
        box(axes, x, 2.3, 1.25, 0.45, "exit state", KEPT)
        arrow(axes, (x + 0.62, 0.65), (x + 0.62, 1.0))
        arrow(axes, (x + 0.62, 1.95), (x + 0.62, 2.3))
        if i < 3:  # the guess is the next input
            arrow(axes, (x + 1.25, 1.1), (x + column + 0.06, 0.5))
    box(axes, left, 3.05, 3 * column + 1.25, 0.6, "layers E .. L-1, once, over all four exit states", PLAIN)
    for i in range(4):
        arrow(axes, (left + i * column + 0.62, 2.75), (left + i * column + 0.62, 3.05))
        arrow(axes, (left + i * column + 0.62, 3.65), (left + i * column + 0.62, 4.0))
    for i, (token, color) in enumerate(
        [("line", VERIFIED), (".split", VERIFIED), ("()", VERIFIED), ("not read", PLAIN)]
    ):
        box(axes, left + i * column, 4.0, 1.25, 0.45, token, color)
    notes = [
        (0.42, "tokens"), (1.47, "draft: one pass\nfor each guess"), (2.52, "kept for\nverification"),
        (3.35, "verification:\none pass"), (4.22, "the model's\nown tokens"),
    ]  # fmt: skip
    for y, text in notes:
        axes.text(0.1, y, text, va="center", fontsize=9, color="#333a46")
    axes.text(
        left, 4.95,
        "Two guesses are the model's own, the third is not: '()' takes its place, and the keys and values\n"
        "after it are forgotten by setting a position back. Three tokens for one pass of layers E .. L-1.",
        va="center", fontsize=9, color="#333a46",
    )  # fmt: skip
    save("round")


def draw_batch() -> None:
    """A ragged round of three rows: what is in the cache during and after it, and before the next one."""
    axes = canvas(10.2, 6.1)
    left, size = 1.0, 0.5
    notes = left + 12 * size + 0.2

    def note(x: float, y: float, text: str) -> None:
        axes.text(x, y, text, va="center", fontsize=9, color="#333a46")

    def row(number: int, y: float, *runs: tuple[int, str], outcome: str = "") -> None:
        """So many of each color, from the first position on."""
        note(0.1, y + 0.18, f"row {number}")
        for i, color in enumerate([color for times, color in runs for _ in range(times)]):
            box(axes, left + i * size, y, size - 0.06, 0.36, "", color)
        note(notes, y + 0.18, outcome)

    last = (1, DRAFT)
    note(0.1, 5.8, "Verification: one pass over 3 x 4 tokens, each at its row's own position")
    row(0, 5.2, (5, KEPT), last, (2, VERIFIED), (1, LOST), outcome="two of three guesses stand")
    row(1, 4.7, (2, KEPT), last, (3, VERIFIED), outcome="all three stand")
    row(2, 4.2, (8, KEPT), last, (1, VERIFIED), (2, LOST), outcome="one stands, and ends the text")
    note(0.1, 3.55, "After it: what was rejected is masked, and written over by what comes there later")
    row(0, 2.95, (8, KEPT), last, outcome="three tokens further")
    row(1, 2.45, (6, KEPT), last, outcome="four tokens further")
    row(2, 1.95, (10, KEPT), (2, LOST), outcome="has ended: its answer goes out")
    note(0.1, 1.3, "Before the next round: the next prompt takes the free place, by a pass of its own")
    row(2, 0.7, (5, KEPT), last)
    colors = {"in the cache": KEPT, "last token": DRAFT, "accepted": VERIFIED, "rejected": LOST}
    for i, (text, color) in enumerate(colors.items()):
        box(axes, left + i * 2.1, 0.08, 0.3, 0.26, "", color)
        note(left + i * 2.1 + 0.38, 0.21, text)
    save("batch")


def draw_family() -> None:
    """What of a transformers model is used, and by which names."""
    axes = canvas(10, 3.1)
    parts = [
        ("embed_tokens", "ids -> states"),
        ("layers[0]", "residual"),
        ("layers[E-1]", "residual"),
        ("layers[L-1]", "residual"),
        ("norm, lm_head", "state -> logits"),
    ]
    for i, (name, what) in enumerate(parts):
        x = 0.2 + i * 1.95
        box(axes, x, 1.3, 1.55, 0.75, f"{name}\n{what}", VERIFIED if i in (0, 4) else PLAIN)
        if i:
            arrow(axes, (x - 0.4, 1.67), (x, 1.67))
        if 1 < i < 4:
            axes.text(x - 0.2, 1.85, "…", ha="center", fontsize=11)
    arrow(axes, (4.9, 1.3), (8.7, 1.3), 0.3)
    axes.text(6.8, 0.42, "early exit: the same norm and head", ha="center", fontsize=9)
    box(axes, 2.1, 2.5, 5.4, 0.45, "rotary_emb: made once, sliced by position", KEPT)
    for x in (2.9, 4.85, 6.8):
        arrow(axes, (x, 2.5), (x, 2.05))
    save("family")


def draw_dataset() -> None:
    """How a row becomes a prompt."""
    axes = canvas(10, 2.6)
    box(axes, 0.2, 0.9, 2.1, 0.9, "row\nutterance, parse", PLAIN)
    box(axes, 3.0, 0.9, 2.1, 0.9, "Example\nprompt, reference", KEPT)
    box(axes, 5.8, 1.5, 3.9, 0.45, "shots: prompt between reference", DRAFT)
    box(axes, 5.8, 1.05, 3.9, 0.45, "prompt", KEPT)
    axes.text(7.75, 2.15, "what the model is given", ha="center", fontsize=9)
    axes.text(7.75, 0.75, "around all of it: --template", ha="center", fontsize=9)
    arrow(axes, (2.3, 1.35), (3.0, 1.35))
    arrow(axes, (5.1, 1.35), (5.8, 1.35))
    axes.text(2.65, 1.5, "pairs", ha="center", fontsize=9)
    axes.text(4.05, 0.45, "order and choice: --seed alone", ha="center", fontsize=9)
    save("dataset")


if __name__ == "__main__":
    draw_round()
    draw_batch()
    draw_family()
    draw_dataset()
