"""What a predicted sweep times: the passes of real rounds, each in turn with a plain step."""

from collections import Counter
from dataclasses import replace
from unittest.mock import patch

import pytest
from conftest import tiny_llama

from measures import calibration
from measures.calibration import calibrate, medians
from self_speculation import GenerationConfig
from self_speculation.drafts.costs import Costs
from self_speculation.model.model_runner import ModelRunner

GREEDY = GenerationConfig(sample=False)


def turns_of(model, config=GREEDY, exit_layers=(1, 2, 3), longest=10, patience=0.0, most=9):
    with patch.multiple(calibration, _PATIENCE=patience, _TURNS=most):
        return calibrate(model, config, list(exit_layers), 100, longest)


@pytest.mark.parametrize("flags", [{}, {"draft_weights": "int4"}, {"draft_vocabulary": 9}], ids=str)
def test_every_exit_and_length_has_a_cost(flags):
    """Guards against parts that are not timed. What they amount to is the machine's business."""
    turns = turns_of(tiny_llama(num_layers=12, fused=True), replace(GREEDY, **flags), [1, 2, 4, 7, 8, 11])
    assert len(turns) == 1  # no patience
    (costs,) = turns
    assert list(costs.lengths) == [0, 1, 2, 3, 4, 7, 8, 10]
    for layer in (1, 2, 4, 7, 8, 11):
        assert costs.draft_step[layer] > 0
        assert len(costs.verifications[layer]) == 8
        assert min(costs.verifications[layer]) > 0
        between = 5 * costs.draft_step[layer] + costs.verification(layer, 5)
        assert costs.round(layer, 5) == pytest.approx(between)


@pytest.mark.parametrize("weights", ["exact", "int4"])
def test_passes_are_those_of_rounds(weights, monkeypatch):
    """Guards against a verification by layers that a real one leaves out, or the other way round."""
    flags = {"config": replace(GREEDY, draft_weights=weights), "exit_layers": [1, 3], "longest": 2, "most": 2}
    model = tiny_llama(num_layers=4, fused=True)
    turns_of(model, **flags)  # copies are made by passes of their own
    passes, run = Counter(), ModelRunner.run

    def counted(self, inputs, first, last, num_logits):
        passes[first, last, inputs.shape[1], num_logits] += 1
        return run(self, inputs, first, last, num_logits)

    monkeypatch.setattr(ModelRunner, "run", counted)
    turns_of(model, **flags)
    turns = 2  # the first one warms up
    drafts = {(0, layer, 1, 1): 4 * turns for layer in (1, 3)}
    plain = {(0, 4, 1, 1): 1 + (4 + 2) * turns}  # in each: four plain steps, and one before each draft
    if weights == "exact":
        verifications = {(layer, 4, k + 1, k + 1): turns for layer in (1, 3) for k in (0, 1, 2)}
        # The last token of each draft; what drafts of one or two tokens leave behind.
        verifications |= {(0, layer, 1, 0): 4 * turns for layer in (1, 3)}
        verifications |= {(0, layer, 2, 0): turns for layer in (1, 3)}
    else:
        plain[0, 4, 1, 1] += turns
        verifications = {(0, 4, k + 1, k + 1): turns for k in (1, 2)}
    assert passes == Counter(drafts) + Counter(plain) + Counter(verifications)


def test_between_two_exits_costs_lie_on_a_line(monkeypatch):
    """Guards against exits that are given another exit's cost."""
    monkeypatch.setattr(calibration, "_EXITS", 2)
    (costs,) = turns_of(tiny_llama(num_layers=6, fused=True), exit_layers=[1, 3, 5], longest=4)
    for of in (costs.draft_step, {layer: of[4] for layer, of in costs.verifications.items()}):
        assert of[3] == pytest.approx((of[1] + of[5]) / 2)


def test_turns_end_with_patience_or_the_range():
    """Guards against a calibration without an end, or without a turn that counts."""
    model = tiny_llama(num_layers=4, fused=True)
    assert len(turns_of(model, patience=1e9, most=4)) == 3
    assert len(turns_of(model, patience=0.0, most=4)) == 1


def test_ranks_of_one_model_take_the_costs_of_the_first(monkeypatch):
    """Guards against ranks that end their turns, or choose cells, each by a clock of its own."""
    asked = []
    monkeypatch.setattr(
        calibration, "broadcast_from_rank0", lambda model, value: asked.append(value) or value
    )
    turns = turns_of(tiny_llama(num_layers=4, fused=True), patience=1e9, most=4)
    assert asked[:-1] == [False, False]
    assert asked[-1] == turns


def test_a_slow_turn_or_a_stall_is_no_part_of_the_medians():
    """Guards against a machine whose pace is taken for the cost of a part, and a part held up in one turn."""
    turns = [
        Costs(pace, {2: 0.3 * pace}, {2: (1.0 * pace, 1.2 * pace * stall)}, (0, 4))
        for pace, stall in ((1.0, 1.0), (2.0, 9.0), (1.0, 1.0), (3.0, 1.0), (1.0, 1.0))
    ]
    costs = medians(turns)
    assert (costs.plain_step, costs.draft_step[2], costs.verification(2, 4)) == pytest.approx((1.0, 0.3, 1.2))
    assert costs.verification(2, 2) == pytest.approx(1.1)
