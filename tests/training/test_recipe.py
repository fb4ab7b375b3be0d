"""The formulas of the recipe against values computed by hand, and the loss against finite differences."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import assert_close, tiny_llama

from self_speculation.model.whole_texts import hidden_after_each_layer
from training import recipe, trainer
from training.flags import RecipeArguments
from training.recipe import IGNORED
from training.trainer import exit_scores

early_exit_loss = partial(trainer.early_exit_loss, num_steps=10, seed=0)

PAPER = RecipeArguments(0.0, "constant", 0.2, "label", "depth", "all", 1, [1, 2, 3])


def settings(**changes):
    return replace(PAPER, **changes)


def test_dropout_rises_with_depth():
    """Guards against D(l) shifted by a layer: 2^(l/(L-1)) - 1 is 0 at the first, 1 at the last."""
    rates = recipe.dropout_rates(5, 0.2)
    expected = [0.2 * (2 ** (layer / 4) - 1) for layer in range(5)]
    assert rates == pytest.approx(expected)
    assert rates[0] == 0
    assert rates[-1] == pytest.approx(0.2)


def test_exponential_schedule_rises_over_the_training():
    at = [recipe.dropout_rates(3, 0.1, "exponential", step, 11)[-1] for step in (0, 5, 10)]
    assert at == pytest.approx([0.0, 0.1 * (math.sqrt(2) - 1), 0.1])


def test_rotation_shifts_by_one_exit_each_step():
    turns = [recipe.enabled_exits(range(1, 8), 8, "rotational", 3, step, 100) for step in range(4)]
    assert turns == [[1, 4, 7], [2, 5], [3, 6], [1, 4, 7]]


def test_rotation_takes_turns_over_the_exits_that_were_asked_for():
    turns = [recipe.enabled_exits([2, 5, 6], 8, "rotational", 2, step, 100) for step in range(2)]
    assert turns == [[2, 6], [5]]


def test_gradual_enables_from_the_last_layer_down():
    """One more exit every T / 2L steps: with T 80 and L 4, every 10; all of them at half time."""
    at = {step: recipe.enabled_exits([1, 2, 3], 4, "gradual", 1, step, 80) for step in (0, 9, 10, 20, 30, 79)}
    assert at == {0: [], 9: [], 10: [3], 20: [2, 3], 30: [1, 2, 3], 79: [1, 2, 3]}


def test_loss_weights_by_hand():
    """L 4, e_scale 0.5: e(0..2) = 0.5 x (0, 1, 3), e(3) = 3 + 0.5 x 3."""
    weights = recipe.loss_weights([1, 2, 3], 4, 0.5, "depth")
    assert weights == pytest.approx({1: 0.0, 2: 0.5 / 6.5, 3: 1.5 / 6.5, 4: 4.5 / 6.5})
    assert recipe.loss_weights([2], 4, 0.5, "depth") == pytest.approx({2: 0.1, 4: 0.9})
    assert recipe.loss_weights([1, 3], 4, 0.6, "equal") == pytest.approx({1: 0.3, 3: 0.3, 4: 1.0})
    for weighting in ("depth", "equal"):
        assert recipe.loss_weights([], 4, 0.5, weighting) == {4: 1.0}


def test_losses_by_hand():
    logits = torch.tensor([[0.0, math.log(3)], [1.0, 1.0], [5.0, 0.0]])
    labels = torch.tensor([0, 1, IGNORED])
    assert recipe.label_loss(logits, labels).item() == pytest.approx(math.log(4) + math.log(2))
    target = torch.zeros(3, 2)
    # KL((1/2, 1/2) || (1/4, 3/4)) and none where the distributions agree or nothing is labelled
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert recipe.distillation_loss(logits, target, labels).item() == pytest.approx(expected, abs=1e-6)


def test_dropped_samples_are_drawn_at_the_rate_and_by_the_seed_alone():
    kept = recipe.draw_kept([0.0, 0.3], 10_000, (1, 2))
    assert kept[0].all()
    assert kept[1].float().mean().item() == pytest.approx(0.7, abs=0.02)  # 4 standard deviations
    assert torch.equal(kept, recipe.draw_kept([0.0, 0.3], 10_000, (1, 2)))
    assert not torch.equal(kept, recipe.draw_kept([0.0, 0.3], 10_000, (1, 3)))


def batch(rows=3, width=7):
    torch.manual_seed(1)
    ids = torch.randint(3, 50, (rows, width))
    labels = ids.clone()
    labels[0, :3] = IGNORED
    return ids, labels


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_states_are_those_of_the_model(attention):
    """Without dropout the last state leads to transformers' own logits; the mask is causal either way."""
    model = tiny_llama(attn_implementation=attention)
    ids, _ = batch()
    with torch.no_grad():
        *_, last = hidden_after_each_layer(model, ids)
        logits = model.lm_head(model.model.norm(last))
        assert_close(logits, model(ids).logits)


def test_dropped_samples_skip_the_layer_and_cost_nothing():
    """Guards against computing what is then thrown away, and against rows put back in another order."""
    model = tiny_llama()
    ids, _ = batch()
    kept = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 0], [1, 1, 1]], dtype=torch.bool)
    sizes = []
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        states = list(hidden_after_each_layer(model, ids, kept))
        full = list(hidden_after_each_layer(model, ids))
    for hook in hooks:
        hook.remove()
    assert sizes[:3] == [3, 2, 3]  # the third layer was not run at all
    assert_close(states[1][[0, 2]], full[1][[0, 2]])
    assert torch.equal(states[1][1], states[0][1])
    assert torch.equal(states[2], states[1])


def test_loss_is_the_weighted_sum_of_the_exits():
    """Against the model cut off after each layer; the ignored labels and the last position count nowhere."""
    model = tiny_llama()
    ids, labels = batch()
    scores = exit_scores(model, ids, labels).sum(0)  # [L, 4]
    assert scores[:, 3].tolist() == [3 * 6 - 2] * 4
    weights = recipe.loss_weights([1, 2, 3], 4, 0.2, "depth")
    expected = sum(weights[exit] * scores[exit - 1, 0] / scores[0, 3] for exit in weights)
    loss = early_exit_loss(model, PAPER, ids, labels, step=0, micro_step=0)["loss"]
    assert_close(loss, expected)
    last = model(ids, labels=labels).loss
    assert_close(scores[-1, 0] / scores[-1, 3], last)


def test_gradient_against_finite_differences():
    """Norms compute in fp32 even in a double model: a step of 1e-3 is large enough for its roundings not to
    count (they would be 2 % of a step of 1e-5) and small enough for the curvature not to: errors are below
    1e-4.
    """
    model = tiny_llama(vocab_size=49).double()  # of its own: the precision changes for good
    ids, labels = batch()
    changed = settings(layer_dropout=0.4)
    model.train()

    def loss():
        return early_exit_loss(model, changed, ids % 49, labels.clamp(max=48), step=3, micro_step=0)["loss"]

    loss().backward()
    for parameter in (
        model.model.layers[1].mlp.up_proj.weight,
        model.model.norm.weight,
        model.lm_head.weight,
    ):
        direction = torch.randn_like(parameter)
        analytic = (parameter.grad * direction).sum().item()
        with torch.no_grad():
            values = []
            for step in (1e-3 * direction, -1e-3 * direction):
                parameter += step
                values.append(loss().item())
                parameter -= step
        assert analytic == pytest.approx((values[0] - values[1]) / 2e-3, rel=2e-3)
    model.eval()


def test_evaluation_mode_drops_nothing():
    model = tiny_llama()
    ids, labels = batch()
    dropping = settings(layer_dropout=1.0)
    plain = early_exit_loss(model, PAPER, ids, labels, step=0, micro_step=0)["loss"]
    assert torch.equal(early_exit_loss(model, dropping, ids, labels, step=0, micro_step=0)["loss"], plain)
    model.train()
    try:
        assert not torch.equal(
            early_exit_loss(model, dropping, ids, labels, step=0, micro_step=0)["loss"], plain
        )
    finally:
        model.eval()


def test_distillation_teaches_the_exits_only():
    """Guards against a target that moves towards its pupils: layers above exits learn the labels alone."""
    model = tiny_llama(vocab_size=48)
    ids, labels = batch()
    ids, labels = ids % 48, labels.clamp(max=47)

    def gradient(**changes):
        model.zero_grad()
        early_exit_loss(model, settings(**changes), ids, labels, step=0, micro_step=0)["loss"].backward()
        return model.model.layers[-1].mlp.up_proj.weight.grad.clone()

    equal = {"exit_loss": "distill", "exit_weighting": "equal"}
    assert_close(gradient(**equal, early_exit_scale=1.0), gradient(exits=(), exit_weighting="equal"))
