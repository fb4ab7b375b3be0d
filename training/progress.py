"""Progress bar and log.csv of a training, and its end by a signal."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pandas
from accelerate.utils import gather_object
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState

from runs.ranks import num_processes
from runs.records import RecordError


class Stop(TrainerCallback):
    """End a training on all ranks after the current step, with a log row and a checkpoint, if one rank gets
    SIGINT or SIGTERM or cannot write the log.

    A second SIGINT ends it at once, but not under torchrun, which sends a second one to every rank. A signal
    outside of `train` also ends it at once.

    Attributes:
        reason: why the training ended early, or None.
        status: the exit status if it ended early.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.reason: str | None = None
        self.status = 1
        self._requested = 0, ""  # status and reason of this rank
        self._is_over = False
        self._trainer = trainer
        trainer.add_callback(self)

    def after_this_step(self, status: int, reason: str) -> None:
        """End the training after the current step, with this exit status."""
        self._requested = status, reason

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM in this block of the main thread."""
        before = {signum: signal.signal(signum, self._handle) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _handle(self, signum: int, _: Any) -> None:
        again = signum == signal.SIGINT and self._requested[0] > 128 and num_processes() == 1
        self.after_this_step(128 + signum, "interrupted")
        if again or self._is_over or not self._trainer.is_in_train:
            self.status = 128 + signum
            raise KeyboardInterrupt

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        if status := max(gather_object([self._requested[0]])):
            self.status, self.reason = status, self._requested[1] or "another rank was interrupted"
            control.should_log = control.should_save = control.should_training_stop = True

    def on_train_end(self, *args: Any, **others: Any) -> None:
        self.on_step_end(*args, **others)  # a signal may have come after the last step
        self._is_over = True


class Progress(ProgressCallback):
    """A bar with the loss, a line for each evaluation, and a table of all logged values.

    Args:
        write_table: writes the CSV after each new row. If it raises RecordError, `stop` ends the training.
    """

    def __init__(self, write_table: Callable[[str], None], stop: Stop) -> None:
        super().__init__()
        self._write_table, self._stop = write_table, stop

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ARG002
        if not state.is_world_process_zero:
            return
        # Leave out the trainer's summary: it counts the time since the last resumption only.
        table = pandas.DataFrame([row for row in state.log_history if "train_runtime" not in row])
        # A resumption must not change the order of the columns.
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
