"""A transformers.Trainer that drops layers and teaches early exits by the recipe.

Knows nothing of files. What is drawn depends on seed and step alone, so that all ranks drop the same
layers and a resumed run goes on as if it had never stopped.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedModel, Trainer, TrainerControl, TrainerState, TrainingArguments

from self_speculation.model.whole_texts import exit_logits, hidden_after_each_layer
from training import recipe
from training.flags import RecipeArguments

# The means that `evaluate` gives of each exit; agreement: how often it guesses as the last layer does.
EXIT_SCORES = ("loss", "accuracy", "agreement")


def early_exit_loss(
    model: PreTrainedModel,
    settings: RecipeArguments,
    input_ids: Tensor,
    labels: Tensor,
    step: int,
    micro_step: int,
    num_steps: int,
    seed: int,
    num_items_in_batch: Tensor | None = None,
    **_: Any,
) -> dict[str, Tensor]:
    """J of one micro-batch [B, T] (eq. 4), as a model's `forward` returns its loss.

    Args:
        settings: with the exit layers that learn, each from 1 to L-1.
        num_steps: T, of the whole training.
        seed: of what is dropped.
        num_items_in_batch: labels of all micro-batches of the step; without it, of this one.
    """
    num_layers = model.config.num_hidden_layers
    dropout = settings.layer_dropout if model.training else 0.0
    rates = recipe.dropout_rates(num_layers, dropout, settings.dropout_schedule, step, num_steps)
    kept = recipe.draw_kept(rates, len(input_ids), (seed, step, micro_step))
    enabled = recipe.enabled_exits(
        settings.exits or (), num_layers, settings.curriculum, settings.rotation, step, num_steps
    )
    weights = recipe.loss_weights(enabled, num_layers, settings.early_exit_scale, settings.exit_weighting)
    states = enumerate(hidden_after_each_layer(model, input_ids, kept), 1)
    targets = labels[:, 1:].flatten()
    # [B * (T - 1), V] each; no label follows the last position
    logits = {
        exit: exit_logits(model, hidden[:, :-1]).flatten(0, 1) for exit, hidden in states if exit in weights
    }
    total = logits[num_layers].new_zeros((), dtype=torch.float32)
    for exit, weight in weights.items():
        if exit == num_layers or settings.exit_loss == "label":
            total = total + weight * recipe.label_loss(logits[exit], targets)
        else:
            total = total + weight * recipe.distillation_loss(logits[exit], logits[num_layers], targets)
    count = (targets != recipe.IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return {"loss": total / count}


@torch.no_grad()
def exit_scores(model: PreTrainedModel, input_ids: Tensor, labels: Tensor) -> Tensor:
    """[B, L, 4] sums over the labels of each sample, by exit: cross-entropy, tokens guessed right, tokens
    guessed as the last layer guesses them, and ones.
    """
    targets = labels[:, 1:]
    counted = targets != recipe.IGNORED
    losses, guesses = [], []
    for hidden in hidden_after_each_layer(model, input_ids):
        logits = exit_logits(model, hidden[:, :-1]).float()  # [B, T - 1, V]
        loss = functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=recipe.IGNORED, reduction="none"
        )
        losses.append(loss.view_as(targets))
        guesses.append(logits.argmax(-1))
    scores = [
        torch.stack([loss, guess == targets, guess == guesses[-1], counted], dim=-1)
        for loss, guess in zip(losses, guesses, strict=True)
    ]  # L of [B, T - 1, 4]
    return (torch.stack(scores, dim=1) * counted[:, None, :, None]).sum(2)


class EarlyExitTrainer(Trainer):
    """Trains by the recipe; evaluates every exit."""

    control: TrainerControl

    def __init__(
        self, model: PreTrainedModel, settings: RecipeArguments, args: TrainingArguments, **kwargs: Any
    ) -> None:
        # Replaced on the instance, the model keeps its class, and DistributedDataParallel, autocast and
        # checkpoints take the loss of all exits for the model's own.
        model.forward = partial(early_exit_loss, model, settings, num_steps=args.max_steps, seed=args.seed)
        self._micro_steps: Iterator[int] = iter(())
        self._counted_step = -1
        super().__init__(model=model, args=args, **kwargs)

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        step = self.state.global_step
        if step != self._counted_step:
            self._counted_step, self._micro_steps = step, iter(range(self.args.gradient_accumulation_steps))
        return super().compute_loss(
            model, {**inputs, "step": step, "micro_step": next(self._micro_steps)}, *args, **kwargs
        )

    def restore(self, checkpoint: str) -> None:
        """Load the weights and the history of a finished training."""
        self._load_from_checkpoint(checkpoint)
        self.state = TrainerState.load_from_json(f"{checkpoint}/trainer_state.json")
        self.state.is_world_process_zero = self.is_world_process_zero()

    def evaluate(
        self, eval_dataset: Any = None, metric_key_prefix: str = "eval", **_: Any
    ) -> dict[str, float]:
        """The last layer's loss and accuracy, and EXIT_SCORES of each exit E as `..._exit_E`."""
        loader = self.get_eval_dataloader(eval_dataset)
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        total = torch.zeros(model.config.num_hidden_layers, 4, dtype=torch.float64)
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            for batch in tqdm(loader, desc="evaluation", leave=False, disable=self.args.disable_tqdm):
                scores = exit_scores(model, batch["input_ids"], batch["labels"])
                total += self.accelerator.gather_for_metrics(scores).cpu().double().sum(0)
        model.train()
        *sums, count = total.T
        by_exit = dict(zip(EXIT_SCORES, (column / count for column in sums), strict=True))
        metrics = {f"{metric_key_prefix}_{name}": by_exit[name][-1].item() for name in ("loss", "accuracy")}
        for name, values in by_exit.items():
            metrics |= {f"{metric_key_prefix}_{name}_exit_{e}": v for e, v in enumerate(values.tolist(), 1)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
