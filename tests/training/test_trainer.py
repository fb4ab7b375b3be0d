"""EarlyExitTrainer as a library: it takes or refuses the arguments of a Trainer."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_llama
from datasets import Dataset
from transformers import LlamaConfig, TrainingArguments

from training.flags import RecipeArguments
from training.texts import padded
from training.trainer import EarlyExitTrainer


@pytest.fixture
def trainer(tmp_path):
    def make(model=None, recipe=None, **more):
        torch.manual_seed(0)
        rows = [torch.randint(3, 50, (8,)).tolist() for _ in range(24)]
        data = Dataset.from_dict({"input_ids": rows, "labels": rows})
        more = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "logging_steps": 2} | more
        args = TrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True, report_to="none", **more)
        return EarlyExitTrainer(
            copy.deepcopy(model or tiny_llama()), recipe or RecipeArguments(), args, train_dataset=data,
            eval_dataset=data, data_collator=partial(padded, 0, 8),
        )  # fmt: skip

    return make


def test_epochs_and_evaluations(trainer):
    """Guards against schedules that need max_steps, and metrics that are another exit's."""
    made = trainer(optim="sgd")
    made.train()
    assert made.state.global_step == 6
    metrics = made.evaluate()
    ids = torch.tensor(made.eval_dataset["input_ids"])
    with torch.no_grad():
        output = made.model(ids, labels=ids)
    right = (output.logits[:, :-1].argmax(-1) == ids[:, 1:]).float().mean()
    for name, expected in (("loss", output.loss), ("accuracy", right)):
        found = metrics[f"eval_{name}"], metrics[f"eval_{name}_exit_4"]
        assert found == pytest.approx((float(expected),) * 2, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "factor", "bad", "noticed", "kept"),
    [
        ({"logging_steps": 6}, "nan", 4, 6, []),
        ({"logging_steps": 50, "save_steps": 1}, "inf", 3, 3, ["checkpoint-1", "checkpoint-2"]),
    ],
)
def test_steps_that_are_not_finite_end_the_training(settings, factor, bad, noticed, kept, trainer, tmp_path):
    """Guards against a model or a checkpoint of nan; the loss of the bad step is finite."""
    made = trainer(**settings)
    made.model.model.norm.weight.register_hook(
        lambda grad: grad * float(factor) if made.state.global_step == bad - 1 else grad
    )
    with pytest.raises(FloatingPointError, match=rf"^loss or gradient is not finite at step {noticed}:"):
        made.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == kept


def test_what_it_refuses(trainer):
    """Guards against another loss than the model's: gemma2 caps logits, the losses here do not; and
    against weights of losses that are divided by 0.
    """
    for change, message in (
        ({"recipe": RecipeArguments(exits=[9])}, "exits .9.: must be between 1 and 3"),
        ({"model": tiny_llama(1)}, "model: has no layer to exit from before the last"),
        ({"model": SimpleNamespace(config=LlamaConfig(model_type="gemma2"))}, "'gemma2' is not supported"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer(**change)
