"""A transformers.Trainer that drops layers and teaches early exits by the recipe.

What is drawn depends on the seed, the step and the sample alone, so that neither the number of ranks nor a
resumption changes it.

Of what is private in the trainer of transformers 5.24, it overrides `_save_checkpoint` and `_get_grad_norm`,
calls `_prepare_for_training` and `_load_from_checkpoint`, and sets `_tr_loss` and `_globalstep_last_logged`,
the sum and the beginning of the next mean in the log.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import ChainMap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy
import torch
import torch.distributed as dist
from accelerate.utils import DynamoBackend
from accelerate.utils.constants import FSDP_MODEL_NAME, OPTIMIZER_NAME
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from runs.failures import is_disk_full
from runs.ranks import PATIENCE
from self_speculation.model.families import check_supported
from self_speculation.model.whole_texts import hidden_after_each_layer
from training import losses, recipe
from training.flags import RecipeArguments

# The means that `evaluate` gives of each exit; agreement: how often it guesses as the last layer does.
EXIT_SCORES = ("loss", "accuracy", "agreement")

_RUNNING_LOSS = "running_loss.json"  # in a checkpoint: what the next row of the log is to be the mean of

# So many losses and gradient norms are looked at together where neither the log nor a checkpoint asks sooner.
_LOOK_AT = 1000


class DivergedError(Exception):
    """A loss or a gradient is not a number.

    Attributes:
        step: in which it was computed, from 1.
        what: "a loss" or "the gradient".
        value: inf or nan; of the gradient, its norm's.
        documents: [first, last] of each sample of those batches, where the data have such a column.
    """

    def __init__(self, step: int, what: str, value: float, documents: list[list[int]]) -> None:
        super().__init__(f"{what} is {value} at step {step}")
        self.step, self.what, self.value, self.documents = step, what, value, documents


class CheckpointError(Exception):
    """A checkpoint cannot be written; those before it are kept."""


class _NotWritten(NamedTuple):
    """Why a checkpoint is not there. The disk is full only where that stopped every rank that failed."""

    reason: str
    disk_is_full: bool


def early_exit_loss(
    model: PreTrainedModel,
    input_ids: Tensor,
    labels: Tensor,
    weights: dict[int, float],
    kept: numpy.ndarray | None = None,
    distill: bool = False,
    num_items_in_batch: Tensor | int | None = None,
    **_: Any,
) -> dict[str, Tensor]:
    """J of one micro-batch [B, T] (eq. 4), as a model's `forward` returns its loss.

    Args:
        model: its head computes losses, see `losses.exit_losses`.
        weights: of the exits, see `recipe.loss_weights`.
        kept: see `hidden_after_each_layer`.
        distill: exits learn what the last layer says, not the labels.
        num_items_in_batch: labels of all micro-batches of the step; without it, of this one.
    """
    states = enumerate(hidden_after_each_layer(model, input_ids, kept), 1)
    # No label follows the last position.
    learning = {exit: hidden[:, :-1].flatten(0, 1) for exit, hidden in states if weights.get(exit)}
    targets = labels[:, 1:].flatten()
    normed = model.base_model.norm(torch.stack(list(learning.values())))
    by_exit = model.get_output_embeddings()(normed, targets, distill)  # [E, B * (T - 1)]
    sums = by_exit.sum(1, dtype=torch.promote_types(by_exit.dtype, torch.float32))
    total = sum(weights[exit] * part for exit, part in zip(learning, sums, strict=True))
    count = (targets != recipe.IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return {"loss": total / count}


@torch.no_grad()
def exit_scores(model: PreTrainedModel, input_ids: Tensor, labels: Tensor, **_: Any) -> Tensor:
    """[B, L, 4] sums over the labels of each sample, by exit: cross-entropy, tokens guessed right, tokens
    guessed as the last layer guesses them, and ones. The model's head computes scores, see `losses`.
    """
    targets = labels[:, 1:].flatten()
    found = [
        model.get_output_embeddings()(model.base_model.norm(hidden[:, :-1].flatten(0, 1)), targets)
        for hidden in hidden_after_each_layer(model, input_ids)
    ]
    by_exit, guesses = (torch.stack(part) for part in zip(*found, strict=True))  # [L, B * (T - 1)]
    counted = (targets != recipe.IGNORED).expand_as(guesses)
    scores = torch.stack([by_exit, guesses == targets, guesses == guesses[-1], counted], dim=-1)
    scores = scores * counted[..., None]
    return scores.view(len(scores), len(labels), -1, 4).sum(2).transpose(0, 1)


@contextmanager
def calling(module: nn.Module, function: Callable) -> Iterator[None]:
    """Calls of the module run `function` between its hooks, by which its weights may have to be gathered."""
    before = module.__dict__.get("forward")
    module.forward = function
    try:
        yield
    finally:
        del module.forward
        if before is not None:  # what accelerate puts there
            module.forward = before


def plain(model: nn.Module) -> PreTrainedModel:
    """The model, or the one that an adapter of peft is around."""
    return cast(PreTrainedModel, getattr(model, "get_base_model", lambda: model)())


class EarlyExitTrainer(Trainer):
    """Trains by the recipe; evaluates every exit. Takes what a Trainer takes.

    Data have `input_ids` and `labels`, padded on the right. A column `documents` of [first, last] is
    not learnt but named where a loss is not a number.

    Args:
        model: of a supported family; or one that peft has wrapped.
        settings: the recipe.

    Raises:
        ValueError: the model cannot be driven layer by layer, has no such exit, or the arguments ask for
            another loss.
    """

    control: TrainerControl
    data_collator: Callable[[list[Any]], dict[str, Any]]

    def __init__(
        self, model: nn.Module, settings: RecipeArguments, args: TrainingArguments, **kwargs: Any
    ) -> None:
        check_supported(plain(model).config)
        if args.label_smoothing_factor or kwargs.get("compute_loss_func"):
            raise ValueError("label_smoothing_factor, compute_loss_func: the recipe has a loss of its own")
        if kwargs.get("compute_metrics") or kwargs.get("preprocess_logits_for_metrics"):
            raise ValueError("compute_metrics, preprocess_logits_for_metrics: no logits are kept to measure")
        if args.n_gpu > 1:
            raise ValueError(f"{args.n_gpu} GPUs in one process: start one process for each, by torchrun")
        self._settings = settings
        self._exits = settings.exit_layers(plain(model).config.num_hidden_layers)
        self._micro_step = 0  # of the optimizer's step
        # Since the last look: by step, losses of micro-batches and then the gradient's norm; the documents.
        self._recent: list[tuple[tuple[int, str], Tensor, Tensor | None]] = []
        self._restart_clock()
        super().__init__(model=model, args=args, **kwargs)
        self.model_accepts_loss_kwargs = True  # whatever the signature of the model's own `forward`
        self.data_collator = partial(_padded_right, self.data_collator)
        if args.torch_compile:  # the layers alone, in place: what is around them differs from step to step
            self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
            for layer in plain(model).base_model.layers:
                layer.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        self.add_callback(_BeginsAndGoesOn(self))
        # In which ranks agree on the CPU, so that none waits for its GPU.
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if args.world_size > 1 else None

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:  # fmt: skip
        inputs = dict(inputs)
        documents = inputs.pop("documents", None)
        if isinstance(num_items_in_batch, Tensor):  # as a float, FSDP would round it to what is computed in
            num_items_in_batch = num_items_in_batch.long()
        inputs |= self._plan(model.training, len(inputs["input_ids"]))
        with self._computing(early_exit_loss, losses.exit_losses):
            answer = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self._tokens += inputs["input_ids"].numel()
        if model.training:
            self._recent.append(((self.state.global_step + 1, "a loss"), answer.detach(), documents))
        return answer

    def _plan(self, is_training: bool, num_samples: int) -> dict[str, Any]:
        """What the recipe says of this micro-batch."""
        settings, step, num_steps = self._settings, self.state.global_step, self.state.max_steps
        num_layers = plain(self.model).config.num_hidden_layers
        enabled = recipe.enabled_exits(
            self._exits, num_layers, settings.curriculum, settings.rotation, step, num_steps
        )
        weights = recipe.loss_weights(enabled, num_layers, settings.early_exit_scale, settings.exit_weighting)
        plan: dict[str, Any] = {"weights": weights, "distill": settings.exit_loss == "distill"}
        if not is_training:
            return plan
        rates = recipe.dropout_rates(
            num_layers, settings.layer_dropout, settings.dropout_schedule, step, num_steps
        )
        ranks, accumulated = self.args.world_size, self.args.gradient_accumulation_steps
        kept = recipe.draw_kept(rates, ranks * accumulated * self._train_batch_size, self.args.seed, step)
        # Batches of the data go to the ranks in turn.
        first = (self._micro_step * ranks + self.args.process_index) * self._train_batch_size
        self._micro_step += 1
        return plan | {"kept": kept[:, first : first + num_samples]}

    @contextmanager
    def _computing(self, whole: Callable, by_head: Callable) -> Iterator[None]:
        """Calls of the model run `whole`, with a head that computes `by_head`."""
        model = self.accelerator.unwrap_model(self.model)
        head = plain(model).get_output_embeddings()
        autocast = self.accelerator.autocast()  # instead of the one that accelerate put around `forward`
        with calling(model, partial(whole, plain(model))), calling(head, partial(by_head, head)), autocast:
            yield

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        if not self.args.fp16:  # there, a step without a finite one is skipped
            step = self.state.global_step + 1
            batches = [pairs for at, _, pairs in self._recent if at[0] == step and pairs is not None]
            whole = norm.full_tensor() if hasattr(norm, "full_tensor") else torch.as_tensor(norm)
            documents = torch.cat(batches) if batches else None
            self._recent.append(((step, "the gradient"), whole.to(self.args.device), documents))
        if len(self._recent) > _LOOK_AT:
            self._check_losses()
        return norm

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            self._check_losses()
            seconds = time.perf_counter() - self._since
            logs["tokens_per_second"] = round(self._tokens * self.args.world_size / seconds)
            self._restart_clock()
        super().log(logs, *args, **kwargs)

    def _restart_clock(self) -> None:
        self._since, self._tokens = time.perf_counter(), 0

    def _check_losses(self) -> None:
        """Raises DivergedError where a loss or gradient since the last look is not finite, on any rank."""
        recent, self._recent = self._recent, []
        values = torch.stack([value.float() for _, value, _ in recent]).tolist() if recent else []
        bad = [
            (what, value, [] if documents is None else documents.tolist())
            for (what, _, documents), value in zip(recent, values, strict=True)
            if not numpy.isfinite(value)
        ]
        if not self.highest(len(bad)):
            return
        parts: list[Any] = [bad]
        if self._group is not None:
            parts = [None] * self.args.world_size
            dist.all_gather_object(parts, bad, group=self._group)
        found: list[tuple[tuple[int, str], float, list[list[int]]]] = list(chain(*parts))
        first, value, _ = min(found, key=lambda batch: batch[0])  # a loss sorts before its gradient
        raise DivergedError(*first, value, [pair for at, _, pairs in found if at == first for pair in pairs])

    def highest(self, here: int) -> int:
        """Of all ranks; called by all of them in step."""
        if self._group is None:
            return here
        number = torch.tensor(here)
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self._group)
        return int(number)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the trainer does; where the disk is full, once more without the oldest of several."""
        self._check_losses()
        folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        loss = self.accelerator.gather(self._tr_loss).mean().item()
        running = {"loss": loss, "since": self._globalstep_last_logged}
        write = partial(super()._save_checkpoint, model, trial)
        while (failure := self._try_to_write(folder, running, write)) is not None:
            older = sorted(folder.parent.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
            makes_room = failure.disk_is_full and len(older) > 1 and self.args.should_save
            if not self.highest(makes_room):
                raise CheckpointError(f"cannot write {folder}: {failure.reason}")
            if self.args.should_save:
                shutil.rmtree(older[0])
        self._restart_clock()

    def _try_to_write(
        self, folder: Path, running: dict[str, float], write: Callable[[], None]
    ) -> _NotWritten | None:
        """None, or on every rank why one of them could not write; nothing is left then."""

        def write_own() -> None:
            if self.args.should_save:
                parts = (FSDP_MODEL_NAME, OPTIMIZER_NAME) if self.is_fsdp_enabled else ()
                for part in ("", *(f"{name}_0" for name in parts)):
                    (folder / part).mkdir(parents=True, exist_ok=True)
                (folder / _RUNNING_LOSS).write_text(json.dumps(running))
                if self.is_fsdp_enabled and self.processing_class is not None:  # else the trainer does
                    self.processing_class.save_pretrained(folder)

        for step in (write_own, write):  # in the second, ranks wait for each other: all must get there
            reason, severity = "another rank could not", 0  # 1: a full disk, 2: anything else
            try:
                step()
            except (OSError, RuntimeError, MemoryError, SafetensorError, CheckpointException) as error:
                reason = str(error).partition("\n")[0] or type(error).__name__
                severity = 1 if is_disk_full(error, folder.parent) else 2
            if highest := self.highest(severity):
                if self.args.should_save:
                    shutil.rmtree(folder, ignore_errors=True)
                return _NotWritten(reason, highest == 1)
        return None

    def restore(self, checkpoint: str) -> None:
        """Load the weights and the history of a finished training."""
        self.state = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json")
        self.state.is_world_process_zero = self.is_world_process_zero()
        if self.is_fsdp_enabled:
            self._prepare_for_training(self.state.max_steps, None, checkpoint)
        else:
            self._load_from_checkpoint(checkpoint)

    def evaluate(
        self, eval_dataset: Any = None, metric_key_prefix: str = "eval", **_: Any
    ) -> dict[str, float]:
        """The last layer's loss and accuracy, and EXIT_SCORES of each exit E as `..._exit_E`."""
        if isinstance(data := eval_dataset or self.eval_dataset, dict):
            parts = [self.evaluate(part, f"{metric_key_prefix}_{name}") for name, part in data.items()]
            return dict(ChainMap(*parts))
        loader = self.get_eval_dataloader(eval_dataset)
        if self.is_fsdp_enabled and not isinstance(self.model, FSDPModule):  # before a training
            self._prepare_for_training(self.args.max_steps, None, None)
        self.model.eval()
        total = torch.zeros(plain(self.model).config.num_hidden_layers, 4, dtype=torch.float64)
        with self._computing(exit_scores, losses.exit_scores):
            silent = self.args.disable_tqdm or not self.is_local_process_zero()
            for batch in tqdm(loader, desc="evaluation", leave=False, disable=silent):
                scores = self.model(input_ids=batch["input_ids"], labels=batch["labels"])
                total += self.accelerator.gather_for_metrics(scores).cpu().double().sum(0)
        self.model.train()
        *sums, count = total.T
        by_exit = dict(zip(EXIT_SCORES, (column / count for column in sums), strict=True))
        metrics = {f"{metric_key_prefix}_{name}": by_exit[name][-1].item() for name in ("loss", "accuracy")}
        for name, values in by_exit.items():
            metrics |= {f"{metric_key_prefix}_{name}_exit_{e}": v for e, v in enumerate(values.tolist(), 1)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._restart_clock()
        return metrics


def _padded_right(collate: Callable, rows: list[Any]) -> dict[str, Any]:
    """Raises ValueError where the batch is padded on the left, whose padding the rest would attend to."""
    batch = collate(rows)
    if "attention_mask" in batch and not batch["attention_mask"][:, 0].all():
        raise ValueError('a batch is padded on the left: set padding_side = "right" of its tokenizer')
    return batch


class _BeginsAndGoesOn(TrainerCallback):
    """Passes are counted by step; the mean in the next row of the log goes on where a checkpoint left it."""

    def __init__(self, trainer: EarlyExitTrainer) -> None:
        self._trainer = trainer

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._trainer._micro_step = 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        trainer = self._trainer
        saved = Path(trainer.args.output_dir, f"checkpoint-{trainer.state.global_step}", _RUNNING_LOSS)
        if saved.is_file():
            running = json.loads(saved.read_text())
            trainer._tr_loss += running["loss"]
            trainer._globalstep_last_logged = running["since"]
