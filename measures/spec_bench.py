"""Spec-Bench: results by category, and answers in its own format (github.com/hemingkx/Spec-Bench)."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import pandas

from measures import metrics
from measures.timed_runs import BASELINE
from runs.description import Record
from self_speculation.results import DraftStats

# The categories of its conversations of two turns, which it reports as one.
_MT_BENCH = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")

_HEADINGS = {
    "questions": "questions", "tokens_per_second": "tokens/s", "autoregressive": "without drafts",
    "speedup": "speed-up", "low": "from", "high": "to", "mean_accepted_length": "accepted length",
}  # fmt: skip


def by_category(rows: Sequence[Record], records: Sequence[Record]) -> dict[str, Record]:
    """The figures of each category.

    `speedup` is the median over questions, `low` and `high` are its 90 % confidence interval.

    Args:
        rows: of the dataset, one for each record.
    """
    groups: dict[str, list[Record]] = {}
    for row, record in zip(rows, records, strict=True):
        name = "mt_bench" if row["category"] in _MT_BENCH else row["category"]
        groups.setdefault(name, []).append(record)
    found: dict[str, Record] = {}
    for name, own in groups.items():
        speed = metrics.speed(own)["tokens_per_second_median"]
        found[name] = {"questions": len(own), "tokens_per_second": speed}
        if f"{BASELINE}tokens" in own[0]:
            baseline, compared = metrics.speed(own, BASELINE), metrics.speedup(own, BASELINE)
            low, high = compared["speedup_interval"] or (None, None)
            found[name]["autoregressive"] = baseline["tokens_per_second_median"]
            found[name] |= {"speedup": compared["speedup"], "low": low, "high": high}
        if "drafts" in own[0]:
            found[name]["mean_accepted_length"] = metrics.draft_stats(own).mean_accepted_length
    return found


def table(categories: dict[str, Record]) -> str:
    """Lines of at most 85 columns."""
    shown = pandas.DataFrame(categories).T.astype({"questions": int}).rename(columns=_HEADINGS)
    lines = shown.to_string(float_format="{:.2f}".format, na_rep="-")
    grouped = f"\nmt_bench: {', '.join(_MT_BENCH)}" if "mt_bench" in categories else ""
    return f"medians of questions; from and to are the 90 % confidence interval{grouped}\n{lines}"


def answers(rows: Sequence[Record], records: Sequence[Record], model_id: str, prefix: str = "") -> str:
    """JSON lines in the order of the questions, as its `speed.py` and `equal.py` read them.

    `new_tokens` leaves out the end id, `wall_time` [s] has the prefill. `decoding_steps` are passes of the
    full model after the prefill, `accept_lengths` the tokens of each; in no order.
    """
    lines = []
    pairs = zip(rows, records, strict=True)
    # Numbers by value, and any other ids.
    for row, record in sorted(pairs, key=lambda pair: (len(pair[0]["question_id"]), pair[0]["question_id"])):
        own, id_ = metrics.without_prefix(record, prefix), row["question_id"]
        turns = own.get("turns") or [own]
        accepted = [_accept_lengths(turn) for turn in turns]
        choice: dict[str, Any] = {
            "index": 0,
            "turns": [turn["prediction"] for turn in turns],
            "decoding_steps": [len(lengths) for lengths in accepted],
            "new_tokens": [turn["num_tokens"] for turn in turns],
            "wall_time": [turn["wall_time"] for turn in turns],
            "accept_lengths": [length for lengths in accepted for length in lengths],
        }
        answer = {
            "question_id": int(id_) if id_.isdecimal() else id_, "category": row["category"],
            "answer_id": f"{model_id}-{id_}", "model_id": model_id,
            "choices": [choice], "tstamp": time.time(),
        }  # fmt: skip
        lines.append(json.dumps(answer) + "\n")
    return "".join(lines)


def _accept_lengths(turn: Record) -> list[int]:
    if "drafts" not in turn:
        return [1] * turn["num_decode_tokens"]
    rounds = DraftStats.from_rows(turn["drafts"]).rounds
    return [kind.emitted for kind, n in rounds.items() for _ in range(n)]
