"""A transformers.Trainer for the LayerSkip recipe: it drops layers and trains early exits.

The seed, the step and the place of a sample in the step decide which layers it skips. The number of ranks and
a resumption change nothing.

Private parts of transformers 5.24's Trainer: this overrides `_save_checkpoint` and
`_maybe_log_save_evaluate`.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import numpy
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import EvalPrediction

from data import one_line
from runs.failures import Failed
from self_speculation.backends.full_forward import hidden_after_each_layer
from self_speculation.models.families import check_supported
from training import losses, recipe
from training.flags import RecipeArguments

# The scores of each exit in an evaluation. Agreement: how often it predicts the token of the last layer.
# Entropy: of the exit's distributions, relative to the last layer's.
EXIT_SCORES = ("loss", "accuracy", "agreement", "entropy")


def newest_checkpoint(folder: Path) -> tuple[int, str | None]:
    """Optimizer steps and path of the newest complete checkpoint, or (0, None)."""
    complete: list[tuple[int, str | None]] = [(0, None)]
    for state in folder.glob("checkpoint-*/trainer_state.json"):  # the trainer writes it last
        with suppress(ValueError):  # it was cut
            complete.append((json.loads(state.read_text())["global_step"], str(state.parent)))
    return max(complete)


def early_exit_loss(
    model: PreTrainedModel,
    input_ids: Tensor,
    labels: Tensor,
    weights: dict[int, float],
    kept: numpy.ndarray | None = None,
    distill: bool = False,
    num_items_in_batch: Tensor | int | None = None,
    **_: object,
) -> dict[str, Tensor]:
    """J of one micro-batch [B, T] (eq. 4), in the form of a model's `forward`.

    Args:
        model: the head computes `losses.exit_losses`.
        weights: see `recipe.loss_weights`.
        kept: see `hidden_after_each_layer`.
        distill: early exits learn the distribution of the last layer instead of the labels.
        num_items_in_batch: number of labels in the step; without it, the number in this micro-batch.
    """
    states = enumerate(hidden_after_each_layer(model, input_ids, kept), 1)
    # No label follows the last position.
    learning = {exit: hidden[:, :-1].flatten(0, 1) for exit, hidden in states if weights.get(exit)}
    targets = labels[:, 1:].flatten()
    normed = model.base_model.norm(torch.stack(list(learning.values())))
    by_exit = model.get_output_embeddings()(normed, targets, distill)  # [E, B * (T - 1)]
    sums = by_exit.sum(1, dtype=torch.promote_types(by_exit.dtype, torch.float32))
    total = sum(weights[exit] * exit_sum for exit, exit_sum in zip(learning, sums, strict=True))
    count = (targets != recipe.IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return {"loss": total / count}


@torch.no_grad()
def exit_scores(model: PreTrainedModel, input_ids: Tensor, labels: Tensor, **_: object) -> Tensor:
    """[B, L, 5] sums over the labels of a sample, by exit: cross-entropy, correct tokens, tokens that agree
    with the last layer, entropy, number of labels. The model's head computes `losses.exit_scores`.
    """
    targets = labels[:, 1:].flatten()
    found = [
        model.get_output_embeddings()(model.base_model.norm(hidden[:, :-1].flatten(0, 1)), targets)
        for hidden in hidden_after_each_layer(model, input_ids)
    ]
    by_exit, guesses, entropies = (torch.stack(each) for each in zip(*found, strict=True))  # [L, B * (T - 1)]
    counted = (targets != recipe.IGNORED).expand_as(guesses)
    columns = [by_exit, guesses == targets, guesses == guesses[-1], entropies, counted]
    scores = torch.stack(columns, dim=-1) * counted[..., None]
    return scores.view(len(scores), len(labels), -1, len(columns)).sum(2).transpose(0, 1)


def plain(model: nn.Module) -> PreTrainedModel:
    """The model without peft's wrapper."""
    return cast(PreTrainedModel, getattr(model, "get_base_model", lambda: model)())


class EarlyExitTrainer(Trainer):
    """A Trainer for the recipe, which evaluates every exit.

    Batches have `input_ids` and `labels`, padded on the right. Not for `torch_compile`: what surrounds the
    layers differs from step to step.

    Args:
        model: of a supported family, with or without an adapter of peft.

    Raises:
        ValueError: the model is not supported or has no such exit.
    """

    def __init__(
        self, model: nn.Module, settings: RecipeArguments, args: TrainingArguments, **kwargs: Any
    ) -> None:
        check_supported(plain(model).config)
        args._n_gpu = min(args.n_gpu, 1)  # torchrun drives several GPUs, not DataParallel
        self._settings = settings
        self._exits = settings.exit_layers(plain(model).config.num_hidden_layers)
        super().__init__(model=model, args=args, compute_metrics=_metrics_of_exits, **kwargs)
        self.model_accepts_loss_kwargs = True

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self._micro_step = 0
        if self.state.global_step >= self.state.max_steps:
            return [], None  # of a training that resumes after the last step
        return super().get_batch_samples(*args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:  # fmt: skip
        if isinstance(num_items_in_batch, Tensor):  # FSDP would round a float to the computing dtype
            num_items_in_batch = num_items_in_batch.long()
        inputs = inputs | self._plan(len(inputs["input_ids"]))
        with self._computing(early_exit_loss, losses.exit_losses):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _plan(self, num_samples: int) -> dict[str, object]:
        """The recipe's arguments of `early_exit_loss` for this micro-batch."""
        settings = self._settings
        step = self.state.global_step
        num_steps = self.state.max_steps
        num_layers = plain(self.model).config.num_hidden_layers
        enabled = recipe.enabled_exits(
            self._exits, num_layers, settings.curriculum, settings.rotation, step, num_steps
        )
        is_distilled = settings.exit_loss == "distill"
        weights = recipe.loss_weights(enabled, num_layers, settings.early_exit_scale, equal=is_distilled)
        rates = recipe.dropout_rates(
            num_layers, settings.layer_dropout, settings.dropout_schedule, step, num_steps
        )
        ranks = self.args.world_size
        accumulated = self.args.gradient_accumulation_steps
        kept = recipe.draw_kept(rates, ranks * accumulated * self._train_batch_size, self.args.seed, step)
        # The batches of the data go to the ranks in turn.
        first = (self._micro_step * ranks + self.args.process_index) * self._train_batch_size
        self._micro_step += 1
        kept = kept[:, first : first + num_samples]
        return {"weights": weights, "distill": is_distilled, "kept": kept}

    @contextmanager
    def _computing(self, by_model: Callable, by_head: Callable) -> Iterator[None]:
        """In this block the model computes `by_model`, and the head `by_head`. The hooks of modules run: they
        may gather sharded weights.
        """
        model = self.accelerator.unwrap_model(self.model)
        head = plain(model).get_output_embeddings()
        in_model = patch.object(model, "forward", partial(by_model, plain(model)))
        in_head = patch.object(head, "forward", partial(by_head, head))
        autocast = self.accelerator.autocast()  # replaces the one that accelerate puts around `forward`
        with in_model, in_head, autocast:
            yield

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.control.should_log |= self.control.should_save  # `log` checks what would be saved
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Raises FloatingPointError if the mean loss over all ranks, or the gradient of the last step, is not
        finite. Once a gradient is not finite, no later gradient is.
        """
        # fp16 skips a step whose gradient is not finite.
        checked = ("loss",) if self.args.fp16 else ("loss", "grad_norm")
        if not all(math.isfinite(logs.get(name, 0.0)) for name in checked):
            where = f"loss or gradient is not finite at step {self.state.global_step}"
            raise FloatingPointError(f"{where}: begin anew with a lower learning rate")
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        """Raises Failed if this rank cannot write; for a checkpoint in shards, on every rank."""
        folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        try:
            super()._save_checkpoint(model, trial)
        except (Exception, CheckpointException) as error:  # torch raises more than OSError
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            # The error of a checkpoint in shards has the error of each rank.
            causes = [cause for cause, _ in getattr(error, "failures", {}).values()] or [error]
            raise Failed(f"cannot write {folder}: {one_line(causes[0])}") from error

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], *_: object, **__: object
    ) -> tuple[None, Tensor, Tensor]:
        """The scores of a batch, in place of logits and of labels."""
        with self._computing(exit_scores, losses.exit_scores):
            scores = model(**self._prepare_inputs(inputs))
        return None, scores, scores


def _metrics_of_exits(scores: EvalPrediction) -> dict[str, float]:
    """The last layer's loss and accuracy, and EXIT_SCORES of each exit E as `..._exit_E`."""
    *sums, count = scores.predictions.sum(0, dtype=float).T  # each [L]
    by_exit = {name: column / count for name, column in zip(EXIT_SCORES, sums, strict=True)}
    by_exit["entropy"] = by_exit["entropy"] / by_exit["entropy"][-1]
    metrics = {name: by_exit[name][-1] for name in ("loss", "accuracy")}
    return metrics | {
        f"{name}_exit_{exit}": value for name, found in by_exit.items() for exit, value in enumerate(found, 1)
    }
