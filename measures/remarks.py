"""Sentences for below a table: what a reader should know before a figure changes a decision."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from runs.records import Record

# Totals and the median differ by much from this on, as a ratio.
_MUCH = 1.1
_WIDTH = 80


def on_speedup(compared: Record, unit: str) -> list[str]:
    """Whether the speed-up tells which strategy is faster, and whether totals and median agree; none if so.

    Args:
        compared: by `metrics.speedup`.
        unit: what a window of the comparison is called, in the plural.
    """
    median, totals, interval = (compared[f"speedup{of}"] for of in ("", "_of_totals", "_interval"))
    if median is None:
        return ["no example has an answer by both strategies: there is nothing to compare"]
    remarks = []
    if interval is None:
        remarks.append(f"fewer than five {unit}: too few to tell a gain from chance")
    elif interval[0] <= 1 <= interval[1]:
        remarks.append(
            f"these {unit} do not tell which strategy is faster: the median speed-up is somewhere from "
            f"{interval[0]:.2f} to {interval[1]:.2f} (confidence 90 %)"
        )
    if max(median / totals, totals / median) > _MUCH:
        remarks.append(
            f"totals say {totals:.2f} and the median of {unit} {median:.2f}: in totals, slow and long {unit} "
            "count for more, also those during which the machine was held up"
        )
    return remarks


def lines(remarks: Sequence[str]) -> list[str]:
    """For a terminal, an empty line before each."""
    indented = [
        textwrap.fill(f"note: {remark}", _WIDTH, subsequent_indent="  ", break_on_hyphens=False)
        for remark in remarks
    ]
    return [line for text in indented for line in ("", text)]
