"""Progress bar and log.csv of a training, and the end by a signal."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pandas
from accelerate.utils import gather_object
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState

from arguments import JSONObject
from runs.ranks import num_processes
from runs.records import Run, write_atomically
from self_speculation import ThreadGovernor


class Stop(TrainerCallback):
    """End a training on all ranks after the current step, with a log row and a checkpoint, if one rank gets
    SIGINT or SIGTERM; a second SIGINT ends a single process at once. The Trainer's `enable_jit_checkpoint`
    waits three seconds, ends one rank only, whose collective calls other ranks wait for, and ignores SIGINT.

    Attributes:
        status: the exit status of a training that a signal has ended, or 0.
    """

    status = 0

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM in this block of the main thread."""
        before = {signum: signal.signal(signum, self._handle) for signum in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _handle(self, signum: int, _: object) -> None:
        if signum == signal.SIGINT and self.status and num_processes() == 1:  # torchrun sends a second one
            raise KeyboardInterrupt
        self.status = 128 + signum

    def on_step_end(self, args: object, state: TrainerState, control: TrainerControl, **_: object) -> None:  # noqa: ARG002
        self.status = max(gather_object([self.status]))
        if self.status:
            control.should_log = control.should_save = control.should_training_stop = True

    on_train_end = on_step_end  # a signal may have come after the last step


class Threads(TrainerCallback):
    """Leave processors to other programs, before each step and each batch that is evaluated."""

    def __init__(self, governor: ThreadGovernor) -> None:
        self._governor = governor

    def on_step_begin(self, *_: object, **__: object) -> None:
        self._governor.adjust()

    on_prediction_step = on_step_begin


class Progress(ProgressCallback):
    """A bar with the loss, a line for each evaluation, and log.csv with all logged values."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = run

    def on_step_end(self, args: object, state: TrainerState, control: TrainerControl, **more: object) -> None:
        super().on_step_end(args, state, control, **more)
        control.should_evaluate &= state.global_step < state.max_steps  # then the model is saved before

    def on_prediction_step(self, *args: object, **more: object) -> None:
        super().on_prediction_step(*args, **more)
        if self.prediction_bar is not None:
            self.prediction_bar.set_description("held-out losses", refresh=False)

    def on_log(self, args: object, state: TrainerState, *_: object, logs: JSONObject, **__: object) -> None:  # noqa: ARG002
        if not state.is_world_process_zero:
            return
        # Leave out the trainer's summary: it counts the time since the last resumption only.
        table = pandas.DataFrame([row for row in state.log_history if "train_runtime" not in row])
        # A resumption must not change the order of the columns.
        table = table[sorted(table, key=lambda name: (name != "step", len(name), name))]
        write_atomically(self._run.folder / "log.csv", table.to_csv(index=False))
        if self.training_bar is None:
            return
        if "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {float(logs['loss']):.3f}", refresh=False)
        if "eval_loss" in logs:
            self.training_bar.write(f"step {state.global_step}: held-out loss {logs['eval_loss']:.3f}")
