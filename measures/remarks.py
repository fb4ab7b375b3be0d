"""Sentences for below a table: what a reader should know before a figure changes a decision."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence

from measures.timed_runs import BASELINE
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


def on_predictions(pairs: Sequence[tuple[Record, Record]]) -> list[str]:
    """About predicted cells of a sweep that were measured too, in this order; one with answers at least.

    A machine that is slower now than while the costs were measured makes all times longer, those of plain
    decoding too; the speed-ups, and so the choice, stay.
    """
    pairs = [pair for pair in pairs if pair[1]["speedup"] and pair[1]["tokens_per_second_median"]]
    if not pairs:
        return []

    def error(key: str) -> float:
        """Of what was predicted, the median cell."""
        return statistics.median(predicted[key] / measured[key] for predicted, measured in pairs) - 1

    ours, plain = error("tokens_per_second_median"), error(f"{BASELINE}tokens_per_second_median")
    remarks = [
        f"predicted tokens/s are {ours:+.0%} off, those of plain decoding {plain:+.0%}, the speed-up "
        f"{error('speedup'):+.0%}. What is off in both is the pace of the machine, which is another now than "
        "in the calibration; all cells share it, so the choice stays. An error of the speed-up may change it"
    ]
    apart = [
        f"{predicted['exit_layer']}/{predicted['num_speculations']}"
        for predicted, measured in pairs
        if _above(predicted, measured) or _above(measured, predicted)
    ]
    if apart:
        remarks.append(
            f"beyond what noise explains, measured and predicted speed-up differ at {', '.join(apart)} "
            "(exit/drafted): trust the measured one, or measure again when the machine is quieter"
        )
    return remarks


def _above(first: Record, second: Record) -> bool:
    """Whether the least that the first speed-up may be is more than the second can be."""
    low, high = first["speedup_low"], second["speedup_high"]
    return low is not None and high is not None and low > high
