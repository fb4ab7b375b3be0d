"""How far a training is: what it shows and logs, when it gives up, and its checkpoints."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState

from runs.ranks import num_processes
from runs.records import RecordError
from training.trainer import EarlyExitTrainer


class Progress(ProgressCallback):
    """A bar with the loss, a line for each evaluation, and a table of all logged numbers.

    Args:
        write_table: called with the CSV whenever a row has come.
        stop: told where that raises RecordError.
    """

    def __init__(self, write_table: Callable[[str], None], stop: Stop) -> None:
        super().__init__()
        self._write_table, self._stop = write_table, stop

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ARG002
        if not state.is_world_process_zero:
            return
        # Without the trainer's own summary, which counts only the time since the last resumption.
        table = pandas.DataFrame([row for row in state.log_history if "train_runtime" not in row])
        # In an order that does not change with a resumption.
        table = table[sorted(table, key=lambda name: (name != "step", len(name), name))]
        try:
            self._write_table(table.to_csv(index=False))
        except RecordError as error:
            self._stop.after_this_step(1, str(error))
        if self.training_bar is None:
            return
        if "loss" in logs:
            postfix = f"loss {float(logs['loss']):.3f}, {logs['tokens_per_second']} tokens/s"
            self.training_bar.set_postfix_str(postfix, refresh=False)
        if "eval_loss" in logs:
            exits = sum(key.startswith("eval_loss_exit_") for key in logs)
            shown = sorted({exits * part // 8 for part in (1, 2, 4, 8)} - {0})
            losses = ", ".join(f"exit {exit} {logs[f'eval_loss_exit_{exit}']:.3f}" for exit in shown)
            self.training_bar.write(f"step {state.global_step}: held-out loss {losses}")


class Stop(TrainerCallback):
    """Ends a training after the current step with a checkpoint, on all ranks, if one of them has a reason to:
    Ctrl-C, SIGTERM, or a log that cannot be written.

    A second Ctrl-C ends it at once; but not under torchrun, which passes on what the ranks have had already.
    So does any signal before the first step and after the last one.

    Attributes:
        reason: why the training ended early, None where it did not.
        status: the exit status that tells so.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.status = 1
        self._wanted: tuple[int, str | None] = 0, None  # status and reason, of this rank
        self._has_steps = False
        self._trainer: EarlyExitTrainer | None = None

    def follow(self, trainer: EarlyExitTrainer) -> None:
        self._trainer = trainer
        trainer.add_callback(self)

    def after_this_step(self, status: int, reason: str) -> None:
        self._wanted = status, reason

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Meanwhile it hears of signals; to be called in the main thread."""
        before = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, _: Any) -> None:
        again = number == signal.SIGINT and self._wanted[0] > 128 and num_processes() == 1
        self.after_this_step(128 + number, "interrupted")
        if again or not self._has_steps:
            self.status = 128 + number
            raise KeyboardInterrupt

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._has_steps = True

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._has_steps = False

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        assert self._trainer is not None
        if status := self._trainer.highest(self._wanted[0]):
            self.status, self.reason = status, self._wanted[1] or "another rank was interrupted"
            control.should_save = control.should_training_stop = True


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
