"""Prompts that a model of train.py has not seen: functions of the held-out files of the standard library.

    python benchmarks/held_out_functions.py --file models/held_out.jsonl
    python benchmark.py --dataset custom_jsonl --data_path models/held_out.jsonl --num_samples 50

A prompt is what stands before a function, its header and its docstring; the response is its body.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from arguments import parse
from training.flags import TrainingDataArguments
from training.texts import load_texts

LINES_BEFORE = 10


@dataclass(frozen=True)
class HeldOutArguments:
    """Where to."""

    file: str = "models/held_out.jsonl"
    """The JSONL to write, with `prompt` and `response`."""


def functions(text: str) -> Iterator[dict[str, str]]:
    """Functions of a module that have a docstring and something after it."""
    lines = text.splitlines(keepends=True)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
            docstring, body = node.body[0], node.body[1:]
            end = docstring.end_lineno or 0
            prompt = "".join(lines[max(0, node.lineno - 1 - LINES_BEFORE) : end])
            yield {"prompt": prompt, "response": "".join(lines[end : body[-1].end_lineno])}


def main() -> None:
    (args,) = parse(__doc__ or "", HeldOutArguments)
    _, held_out = load_texts(TrainingDataArguments())
    rows = [row for text in held_out["text"] for row in functions(text)]
    path = Path(args.file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} functions of {len(held_out)} files: {path}")


if __name__ == "__main__":
    main()
