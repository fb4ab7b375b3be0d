"""Drafts of layers, and when they end. What they may change is in test_self_speculation_generator.py."""

import pytest
from conftest import PROMPT, config_of, generate, in_batch, mixed_drafts, tiny_llama
from helpers import watch
from test_llama_model_utils import mixture

from self_speculation import Request
from self_speculation.drafts.composer import DraftComposer
from self_speculation.drafts.costs import draft_ratio
from self_speculation.drafts.layers import LayerDrafts


@pytest.fixture
def end_below(monkeypatch):
    """Ends drafts after a token whose probability is below, as the policy of adaptive decoding may."""

    def end(least):
        decide = property(
            lambda _: lambda rows: [bool(row) and row[-1] >= least for row in rows], lambda *_: None
        )
        monkeypatch.setattr(DraftComposer, "_should_continue", decide, raising=False)

    return end


def test_a_draft_ends_with_its_first_unlikely_token(end_below, monkeypatch):
    """Guards against a threshold for another token than the last one."""
    end_below(0.3)
    calls = watch(monkeypatch, LayerDrafts, "draft")
    generate(tiny_llama(), PROMPT, max_steps=50, eos=[], exit_layer=2, num_speculations=5)
    rows = [
        (limits[0], [chance >= 0.3 for chance in draft.confidences[0]]) for (*_, limits, _), draft in calls
    ]
    assert all(all(likely[:-1]) for _, likely in rows)
    assert all(len(likely) == limit for limit, likely in rows if all(likely))
    assert len({len(likely) for _, likely in rows if not all(likely)}) > 1


@mixed_drafts("exit 2")
def test_a_greedy_row_beside_a_sampled_one_has_its_own_confidence(end_below):
    """Guards against drafts that never end: in one distribution for all rows a greedy token has all of it."""
    model = tiny_llama()
    end_below(0.3)
    drafts = {"max_steps": 30, "exit_layer": 2, "num_speculations": 5}
    greedy = Request(PROMPT, config=config_of(**drafts))
    alone = in_batch(model, [greedy], 1, sample=True, **drafts)[0]
    beside = in_batch(model, [greedy, Request([8, 2], seed=1)], 2, sample=True, **drafts)[0]
    assert beside.predicted_tokens == alone.predicted_tokens
    assert beside.draft_stats == alone.draft_stats
    assert 0 < alone.num_drafted < 5 * alone.num_verifications - sum(range(5))


@mixed_drafts()
@pytest.mark.parametrize("weights", ["exact", "int4"])
@pytest.mark.parametrize("confidence", [0.2, 0.5])
def test_running_ahead_of_a_threshold_changes_nothing(confidence, weights, end_below, monkeypatch):
    """As on a GPU, a pass begins before the threshold is asked. Guards against a pass too many in the cache,
    or in the states that verification starts from.
    """
    end_below(confidence)
    shared = {"max_steps": 50, "eos": [], "draft_weights": weights, "exit_layer": 2, "num_speculations": 5}
    model = tiny_llama(fused=True)
    waiting = generate(model, PROMPT, **shared)
    always = property(lambda source: True, lambda source, value: None)
    monkeypatch.setattr(LayerDrafts, "_runs_ahead", always, raising=False)
    ahead = generate(model, PROMPT, **shared)
    assert (ahead.predicted_tokens, ahead.draft_stats) == (waiting.predicted_tokens, waiting.draft_stats)
    # Besides the last rounds, which have no room for more, some ended early.
    assert ahead.num_drafted < 5 * ahead.num_verifications - sum(range(5))


def test_drafts_of_a_mixture_read_some_of_its_experts():
    """Guards against drafts that seem to read all experts, and so nothing for the head."""
    model = mixture("mixtral", num_local_experts=8)
    layer, head = model.model.layers[0], model.lm_head.weight.nbytes
    experts = sum(weight.nbytes for weight in layer.mlp.experts.parameters())
    read = sum(weight.nbytes for weight in layer.parameters()) - 0.75 * experts
    assert draft_ratio(model, 1, "exact") == pytest.approx((read + head) / (4 * read + head))
