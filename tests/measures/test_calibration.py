"""A predicted sweep times the passes of real rounds, alternating with plain steps."""

from dataclasses import replace
from unittest.mock import patch

import pytest
from conftest import tiny_llama
from helpers import watch

from measures import calibration
from measures.calibration import calibrate, medians
from self_speculation import GenerationConfig
from self_speculation.model.model_runner import ModelRunner

GREEDY = GenerationConfig(sample=False)


def costs_of(model, config=GREEDY, exit_layers=(1, 2, 3), longest=10, patience=0.0, most=9):
    with patch.multiple(calibration, _PATIENCE=patience, _TURNS=most):
        return calibrate(model, config, list(exit_layers), 100, longest)


@pytest.mark.parametrize("flags", [{}, {"draft_weights": "int4"}, {"draft_vocabulary": 9}], ids=str)
def test_every_exit_and_length_has_a_cost(flags, monkeypatch):
    """Guards against parts that are not timed, and exits that are given another exit's cost."""
    monkeypatch.setattr(calibration, "_EXITS", 2)
    costs = costs_of(tiny_llama(num_layers=6, fused=True), replace(GREEDY, **flags), [1, 3, 5])
    assert list(costs.lengths) == [0, 1, 2, 3, 4, 7, 8, 10]
    parts = [
        costs.draft_step,
        *({layer: costs.round(layer, k) for layer in (1, 3, 5)} for k in range(11)),
    ]
    for part in parts:
        assert min(part.values()) > 0
        assert part[3] == pytest.approx((part[1] + part[5]) / 2)  # between two exits costs lie on a line


@pytest.mark.parametrize("weights", ["exact", "int4"])
def test_passes_are_those_of_rounds(weights, monkeypatch):
    """Guards against a verification that runs more or fewer layers than a real one."""
    flags = {"config": replace(GREEDY, draft_weights=weights), "exit_layers": [1, 3], "longest": 2, "most": 2}
    model = tiny_llama(num_layers=4, fused=True)
    costs_of(model, **flags)  # copies are made by passes of their own
    calls = watch(monkeypatch, ModelRunner, "run")
    costs_of(model, **flags)
    passes = {(first, last, ids.shape[1], num_logits) for (*_, ids, first, last, num_logits), _ in calls}
    drafts = {(0, last, 1, 1) for last in (1, 3, 4)}  # and plain steps
    verifications = {(0, 4, width, width) for width in (1, 2, 3)}
    if weights == "exact":
        verifications = {(first, 4, width, width) for first in (1, 3) for width in (1, 2, 3)}
        # What drafts of one or two tokens leave behind, and their last token.
        verifications |= {(0, last, width, 0) for last in (1, 3) for width in (1, 2)}
    assert passes == drafts | verifications


def test_turns_end_with_patience_on_all_ranks(monkeypatch):
    """Guards against a calibration without an end or without a turn, and against ranks that end it
    by their own clocks or keep their own costs.
    """
    sent = []
    monkeypatch.setattr(calibration, "broadcast_from_rank0", lambda model, value: sent.append(value) or value)
    model = tiny_llama(num_layers=4, fused=True)
    for patience, late, num_turns in ((1e9, [False, False], 3), (0.0, [True], 1)):
        costs_of(model, patience=patience, most=4)
        assert sent[:-1] == late
        assert len(sent[-1]) == num_turns  # without the first one, which warms up
        sent.clear()


def test_a_slow_turn_or_a_stall_does_not_move_the_medians():
    """Guards against the pace of a busy turn in the cost of a part, and a stall in one turn."""
    paces = ((1.0, 1.0), (2.0, 9.0), (1.0, 1.0), (3.0, 1.0), (1.0, 1.0))
    turns = [[pace, 0.3 * pace, 1.2 * pace * stall] for pace, stall in paces]
    assert medians(turns) == pytest.approx([1.0, 0.3, 1.2])
