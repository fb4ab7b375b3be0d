"""Checkpoints in the folder of a training."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path


def newest_checkpoint(folder: Path) -> Path | None:
    """The last one that was written to its end: the trainer writes its state last."""
    complete = []
    for state in folder.glob("checkpoint-*/trainer_state.json"):
        with suppress(ValueError):
            json.loads(state.read_text())
            complete.append(state.parent)
    return max(complete, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
