"""Answers in the format of Spec-Bench (github.com/hemingkx/Spec-Bench)."""

import json
import time
from collections.abc import Sequence

from measures import metrics
from runs.description import Record
from self_speculation.requests.results import DraftStats


def answers(rows: Sequence[Record], records: Sequence[Record], model_id: str, prefix: str = "") -> str:
    """JSON lines in the order of the questions, as `speed.py` and `equal.py` of Spec-Bench read them.

    `new_tokens` leaves out the end id, `wall_time` [s] has the prefill. `decoding_steps` are passes of the
    full model after the prefill, `accept_lengths` the tokens of each; in no order.
    """
    lines = []
    pairs = zip(rows, records, strict=True)
    # Numbers by value, and any other ids.
    for row, record in sorted(pairs, key=lambda pair: (len(pair[0]["question_id"]), pair[0]["question_id"])):
        id_ = row["question_id"]
        turns = [metrics.without_prefix(turn, prefix) for turn in record.get("turns", [record])]
        accepted = [_accept_lengths(turn) for turn in turns]
        choice = {
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
