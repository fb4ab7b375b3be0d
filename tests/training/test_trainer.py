"""EarlyExitTrainer as a library: it takes or refuses the arguments of a Trainer."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_llama
from datasets import Dataset
from transformers import LlamaConfig, TrainingArguments, default_data_collator

from training.flags import RecipeArguments
from training.texts import padded
from training.trainer import EarlyExitTrainer

pad = partial(padded, 0, 8)


@pytest.fixture
def trainer(tmp_path):
    def make(model=None, recipe=None, collator=pad, **more):
        torch.manual_seed(0)
        rows = [torch.randint(3, 50, (8,)).tolist() for _ in range(24)]
        data = Dataset.from_dict({"input_ids": rows, "labels": rows})
        more = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "logging_steps": 2} | more
        args = TrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True, report_to="none", **more)
        return EarlyExitTrainer(
            copy.deepcopy(model or tiny_llama()), recipe or RecipeArguments(), args, train_dataset=data,
            eval_dataset=data, data_collator=collator,
        )  # fmt: skip

    return make


def test_epochs_evaluations_and_the_best_checkpoint(trainer):
    """Guards against schedules that need max_steps, and metrics that a Trainer does not find, as those of
    several sets, or that are another exit's.
    """
    every = dict.fromkeys(("eval_strategy", "save_strategy"), "steps")
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_one_agreement_exit_2"}
    made = trainer(**every, eval_steps=3, save_steps=3, greater_is_better=True, **best, optim="sgd")
    made.eval_dataset = {"one": made.eval_dataset, "two": made.eval_dataset.select(range(5))}
    made.train()
    assert made.state.global_step == 6
    assert made.state.best_model_checkpoint is not None
    metrics = made.evaluate()
    assert "eval_two_agreement_exit_1" in metrics
    ids = torch.tensor(made.eval_dataset["one"]["input_ids"])
    with torch.no_grad():
        output = made.model(ids, labels=ids)
    assert (
        metrics["eval_one_loss"]
        == metrics["eval_one_loss_exit_4"]
        == pytest.approx(float(output.loss), rel=1e-5)
    )
    right = (output.logits[:, :-1].argmax(-1) == ids[:, 1:]).float().mean()
    assert metrics["eval_one_accuracy"] == metrics["eval_one_accuracy_exit_4"] == pytest.approx(float(right))


@pytest.mark.parametrize(
    ("settings", "factor", "bad", "noticed", "kept"),
    [
        ({"logging_steps": 6}, "nan", 4, 6, []),
        ({"logging_steps": 50, "save_steps": 1}, "inf", 3, 3, ["checkpoint-1", "checkpoint-2"]),
        ({"logging_strategy": "no", "save_strategy": "no"}, "nan", 1, 6, []),
    ],
    ids=["row", "checkpoint", "neither"],
)
def test_steps_that_are_not_finite_end_the_training(settings, factor, bad, noticed, kept, trainer, tmp_path):
    """Guards against a model of nan, and against a checkpoint of it: the loss of the bad step is finite, and
    a checkpoint may come before a log row.
    """
    made = trainer(**settings)
    made.model.model.norm.weight.register_hook(
        lambda grad: grad * float(factor) if made.state.global_step == bad - 1 else grad
    )
    with pytest.raises(FloatingPointError, match=rf"^loss or gradient is not finite at step {noticed}$"):
        made.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == kept


def test_padding_on_the_left_is_refused(trainer):
    """Guards against tokens that attend to padding: many tokenizers pad on the left by default."""
    made = trainer(collator=default_data_collator)
    rows = [{"input_ids": [0, 5], "labels": [5, 5], "attention_mask": [0, 1]}] * 4
    made.train_dataset = Dataset.from_list(rows)
    with pytest.raises(ValueError, match='set padding_side = "right"'):
        made.train()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": RecipeArguments(exits=[9])}, "exits .9.: must be between 1 and 3"),
        ({"torch_compile": True}, "torch_compile: what surrounds the layers differs"),
        ({"model": SimpleNamespace(config=LlamaConfig(model_type="gemma2"))}, "'gemma2' is not supported"),
    ],
)
def test_what_it_refuses(change, message, trainer):
    """Guards against another loss than the model's: gemma2 caps its logits, the losses here do not."""
    with pytest.raises(ValueError, match=message):
        trainer(**change)
