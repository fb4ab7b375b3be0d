"""Formulas of the recipe against values computed by hand, and the loss against finite differences."""

import math
from functools import partial
from unittest.mock import Mock, patch

import numpy
import pytest
import torch
from conftest import assert_close, own_llama, tiny_llama
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from training import losses, recipe, trainer
from training.recipe import IGNORED

ALL = recipe.loss_weights([1, 2, 3], 4, 0.2, equal=False)


def by_head(compute, model):
    """The head computes this."""
    head = model.get_output_embeddings()
    return patch.object(head, "forward", partial(compute, head))


def test_dropout_rises_with_depth_and_over_the_training():
    """Guards against D(l) and S(t) shifted by one: 2^(l/(L-1)) - 1 is 0 at the first, 1 at the last."""
    rates = recipe.dropout_rates(5, 0.2)
    assert rates == pytest.approx([0.2 * (2 ** (layer / 4) - 1) for layer in range(5)])
    assert (rates[0], rates[-1]) == (0, pytest.approx(0.2))
    at = [recipe.dropout_rates(3, 0.1, "exponential", step, 11)[-1] for step in (0, 5, 10)]
    assert at == pytest.approx([0.0, 0.1 * (math.sqrt(2) - 1), 0.1])


@pytest.mark.parametrize(
    ("exits", "curriculum", "rotation", "num_steps", "expected"),
    [
        (range(1, 8), "rotational", 3, 100, {0: [1, 4, 7], 1: [2, 5], 2: [3, 6], 3: [1, 4, 7]}),
        ([2, 5, 6], "rotational", 2, 100, {0: [2, 6], 1: [5]}),
        ([2, 5, 6], "rotational", 1, 100, {0: [2, 5, 6], 1: [2, 5, 6]}),
        # One more exit every T / 2L steps, here 5; all of them at half time.
        ([5, 6, 7], "gradual", 1, 80, {0: [], 4: [], 5: [7], 10: [6, 7], 15: [5, 6, 7], 79: [5, 6, 7]}),
    ],
)
def test_exits_that_learn_at_a_step(exits, curriculum, rotation, num_steps, expected):
    """Guards against exits that never learn, and against a rotation over layers in place of exits."""
    found = {step: recipe.enabled_exits(exits, 8, curriculum, rotation, step, num_steps) for step in expected}
    assert found == expected


def test_loss_weights_by_hand():
    """Guards against e(l) shifted by a layer: with L 4, e(0..2) = 0.5 x (0, 1, 3), e(3) = 3 + 0.5 x 3."""
    weights = recipe.loss_weights([1, 2, 3], 4, 0.5, equal=False)
    assert weights == pytest.approx({1: 0.0, 2: 0.5 / 6.5, 3: 1.5 / 6.5, 4: 4.5 / 6.5})
    assert recipe.loss_weights([2], 4, 0.5, equal=False) == pytest.approx({2: 0.1, 4: 0.9})
    assert recipe.loss_weights([1, 3], 4, 0.6, equal=True) == pytest.approx({1: 0.3, 3: 0.3, 4: 1.0})
    for equal in (False, True):
        assert recipe.loss_weights([], 4, 0.5, equal) == {4: 1.0}


@pytest.mark.parametrize("distill", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_chunks_change_nothing(distill, bias, monkeypatch):
    """Guards against losses or gradients that differ from those of all logits at once."""
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 37, bias=bias)
    states = torch.randn(3, 11, 8, requires_grad=True)
    labels = torch.randint(37, (11,))
    labels[[0, 7]] = IGNORED
    logits = head(states)
    whole = functional.cross_entropy(logits.transpose(1, 2), labels.expand(3, 11), reduction="none")
    if distill:
        goal = logits[-1].detach().log_softmax(-1)
        apart = (goal.exp() * (goal - logits[:-1].log_softmax(-1))).sum(-1)
        whole = torch.cat([apart * (labels != IGNORED), whole[-1:]])
    weight = torch.rand(3, 11)
    wanted = [states, *head.parameters()]
    expected = torch.autograd.grad((whole * weight).sum(), wanted)
    for chunk in (1, 37 * 4, 37 * 5 * 4, 2**26):
        monkeypatch.setattr(losses, "CHUNK", chunk)
        found = losses.exit_losses(head, states, labels, distill)
        assert_close(found, whole)
        for mine, theirs in zip(torch.autograd.grad((found * weight).sum(), wanted), expected, strict=True):
            assert_close(mine, theirs)
        scored, guesses, entropies = losses.exit_scores(head, states[0], labels)
        assert_close(scored, functional.cross_entropy(logits[0], labels, reduction="none"))
        assert torch.equal(guesses, logits[0].argmax(-1))
        assert_close(entropies, -(logits[0].softmax(-1) * logits[0].log_softmax(-1)).sum(-1))


@pytest.mark.parametrize(
    ("device", "dtype"), [("cuda:0", torch.bfloat16), ("cuda:0", torch.float32), ("cpu", torch.bfloat16)]
)
def test_the_gradient_of_the_head_is_summed_in_fp32_on_a_gpu(device, dtype, monkeypatch):
    """Guards against a sum over chunks and exits in 16 bits, which is torch's default there."""
    loss = Mock(side_effect=lambda states, weight, labels, **_: torch.zeros(len(labels), device=device))
    monkeypatch.setattr(functional, "linear_cross_entropy", loss)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    with FakeTensorMode():
        head = torch.nn.Linear(8, 37, bias=False, device="meta")
        states, labels = (torch.empty(*size, device=device, dtype=dtype) for size in ((2, 5, 8), (5,)))
        losses.exit_losses(head, states, labels)
    narrow_on_gpu = device == "cuda:0" and dtype == torch.bfloat16
    for (_, weight, _), more in loss.call_args_list:
        assert weight.dtype == dtype
        in_fp32 = (more["options"].acc_policy, more["options"].acc_dtype) == ("balanced", torch.float32)
        assert in_fp32 == narrow_on_gpu


def test_drops_follow_the_rate_and_depend_on_seed_and_step_only():
    """Guards against a keep rate in place of a drop rate, and against the same drops at each step."""
    kept = recipe.draw_kept([0.0, 0.3], 10_000, 1, 2)
    assert kept[0].all()
    assert kept[1].mean() == pytest.approx(0.7, abs=0.02)  # 4 standard deviations
    assert (kept == recipe.draw_kept([0.0, 0.3], 10_000, 1, 2)).all()
    assert (kept != recipe.draw_kept([0.0, 0.3], 10_000, 1, 3)).any()


def batch(rows=3, width=7):
    torch.manual_seed(1)
    ids = torch.randint(3, 50, (rows, width))
    labels = ids.clone()
    labels[0, :3] = IGNORED
    return ids, labels


def loss_one_by_one(model, ids, labels, kept):
    """The loss of samples one by one, each through the layers that it does not skip."""
    total = 0.0
    for row, targets, runs in zip(ids, labels, kept.T, strict=True):
        hidden = model.model.embed_tokens(row[None])
        rotation = model.model.rotary_emb(hidden, torch.arange(len(row))[None])
        for exit, (layer, runs_here) in enumerate(zip(model.model.layers, runs, strict=True), 1):
            if runs_here:
                hidden = layer(hidden, position_embeddings=rotation)
            logits = model.lm_head(model.model.norm(hidden))[0, :-1]
            summed = functional.cross_entropy(logits, targets[1:], ignore_index=IGNORED, reduction="sum")
            total += ALL[exit] * summed
    return total / (labels[:, 1:] != IGNORED).sum()


def test_loss_and_gradients_are_those_of_samples_one_by_one():
    """Guards against dropped samples that are computed or put back in another order, against weights of
    another exit, and against a layer without a gradient where all samples skip it: with sharded weights,
    other ranks would wait for it forever.
    """
    model = own_llama().train()
    ids, labels = batch()
    kept = numpy.array([[1, 1, 1], [1, 0, 1], [0, 0, 0], [1, 1, 1]], dtype=bool)
    sizes = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda layer, _, output: sizes.append(len(output)))
    with by_head(losses.exit_losses, model):
        loss = trainer.early_exit_loss(model, ids, labels, ALL, kept)["loss"]
    assert sizes == [3, 2, 1, 3]  # the third layer runs on one sample, without effect
    expected = loss_one_by_one(model, ids, labels, kept)
    assert_close(loss, expected)
    parameters = list(model.parameters())
    theirs = torch.autograd.grad(expected, parameters, allow_unused=True)
    for mine, other in zip(torch.autograd.grad(loss, parameters), theirs, strict=True):
        assert_close(mine, torch.zeros_like(mine) if other is None else other)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_scores_count_labels_only(attention):
    """Guards against scores of ignored labels or of the last position, and a mask that is not causal."""
    model = tiny_llama(attn_implementation=attention)
    ids, labels = batch()
    with by_head(losses.exit_scores, model):
        scores = trainer.exit_scores(model, ids, labels).sum(0)  # [L, 5]
    assert scores[:, 4].tolist() == [3 * 6 - 2] * 4
    assert scores[-1, 2] == 3 * 6 - 2  # the last layer agrees with itself
    assert_close(scores[-1, 0] / scores[-1, 4], model(ids, labels=labels).loss)
