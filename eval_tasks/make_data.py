"""Make python_lines.jsonl and python_text.jsonl from the files that train.py holds out.

    python eval_tasks/make_data.py

A question of python_lines is a function up to some line. The right answer is the next line; the wrong answers
are lines of other functions at the same indentation. A text of python_text is the beginning of a file.
"""

from __future__ import annotations

import ast
import json
import random
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from training.flags import TrainingDataArguments
from training.texts import load_texts

NUM_QUESTIONS, NUM_TEXTS, LENGTH_OF_TEXT, SHORTEST_LINE = 120, 20, 1500, 12


def functions(text: str) -> Iterator[tuple[list[str], list[int]]]:
    """Lines of each function of a module, and the indices of lines that begin a statement."""
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            begins = {child.lineno - node.lineno for child in ast.walk(node) if isinstance(child, ast.stmt)}
            yield lines[node.lineno - 1 : node.end_lineno], sorted(begins)


def questions(texts: list[str], rng: random.Random) -> list[dict[str, Any]]:
    lines_at: dict[int, set[str]] = defaultdict(set)  # by indentation
    places = []
    for lines, begins in (function for text in texts for function in functions(text)):
        for number in begins:
            line = lines[number]
            if 3 <= number < 40 and len(line.strip()) >= SHORTEST_LINE and '"""' not in line:
                indent = len(line) - len(line.lstrip())
                lines_at[indent].add(line)
                places.append((lines, number, lines_at[indent]))
    rows = []
    for lines, number, alike in rng.sample([place for place in places if len(place[2]) > 100], NUM_QUESTIONS):
        wrong = rng.sample(sorted(alike - set(lines)), 3)
        choices = rng.sample([lines[number], *wrong], 4)
        rows.append(
            {"prompt": "".join(lines[:number]), "choices": choices, "answer": choices.index(lines[number])}
        )
    return rows


def main() -> None:
    _, held_out = load_texts(TrainingDataArguments())
    texts = sorted(held_out["text"])
    rng = random.Random(0)
    _write("python_lines.jsonl", questions(texts, rng))
    _write("python_text.jsonl", [{"text": text[:LENGTH_OF_TEXT]} for text in rng.sample(texts, NUM_TEXTS)])


def _write(name: str, rows: list[dict[str, Any]]) -> None:
    Path(__file__).with_name(name).write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    print(f"{name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
