"""How far a training is: what it shows and logs, when it gives up, and its checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas
from transformers import ProgressCallback, TrainerControl, TrainerState


class DivergedError(Exception):
    """The loss is no longer a number."""


class Progress(ProgressCallback):
    """A bar with the loss, a line for each evaluation, and a table of all logged numbers.

    Args:
        write_table: called with the CSV whenever a row has come.
    """

    def __init__(self, write_table: Callable[[str], None]) -> None:
        super().__init__()
        self._write_table = write_table

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_step_end(args, state, control, **kwargs)
        if control.should_save:  # a loss that is averaged over a checkpoint would be lost with a kill
            control.should_log = True

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ARG002
        for name, value in logs.items():
            if "loss" in name and not math.isfinite(float(value)):
                raise DivergedError(f"{name} is {value} at step {state.global_step}; lower --learning_rate")
        if not state.is_world_process_zero:
            return
        # Without the trainer's own summary, which counts only the time since the last resumption.
        table = pandas.DataFrame([row for row in state.log_history if "train_runtime" not in row])
        # In an order that does not change with a resumption.
        table = table[sorted(table, key=lambda name: (name != "step", len(name), name))]
        self._write_table(table.to_csv(index=False))
        if self.training_bar is None:
            return
        if "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {float(logs['loss']):.3f}", refresh=False)
        if "eval_loss" in logs:
            exits = sum(key.startswith("eval_loss_exit_") for key in logs)
            shown = sorted({exits * part // 8 for part in (1, 2, 4, 8)} - {0})
            losses = ", ".join(f"exit {exit} {logs[f'eval_loss_exit_{exit}']:.3f}" for exit in shown)
            self.training_bar.write(f"step {state.global_step}: held-out loss {losses}")


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
