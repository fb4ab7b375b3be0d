"""Drafts that read a few rows of the head: which ones, when they are copied, and what comes of the others.

That the output does not depend on it is in test_self_speculation_generator.py, decoding/test_rows.py and
decoding/test_sampling_distribution.py.
"""

import copy

import pytest
import torch
from conftest import EOS, assert_close, generate, tiny_llama

from self_speculation.drafts.table import make_drafter
from self_speculation.model.decoder import Decoder
from self_speculation.model.lean_layers import fuse, lean_forms
from self_speculation.model.low_bit_products import Int8Product
from self_speculation.model.products import Product
from self_speculation.model.short_head import likely_ids, prefer_ids

PROMPT = [45, 9, 44, 7, 7, 43]
DRAFTS = {"exit_layer": 2, "num_speculations": 3, "max_steps": 40, "eos": []}


def fresh(**kwargs):
    """A model of its own."""
    return copy.deepcopy(tiny_llama(**kwargs))


def with_biases(fused):
    model = fresh()
    model.lm_head.bias = torch.nn.Parameter(torch.randn(50))
    if fused:
        assert fuse(model) == 4
    return model


@pytest.mark.parametrize("weights", ["exact", "int8"])
@pytest.mark.parametrize("fused", [True, False])
def test_logits_are_those_of_the_whole_head_or_nothing(fused, weights):
    """Guards against a row, or its bias, in the place of another one."""
    if weights == "int8" and not fused:
        pytest.skip("copies are made of lean layers")
    model = with_biases(fused)
    prefer_ids(model, {31: 2, 17: 1})
    decoder = Decoder(model, 1, 8)
    with torch.inference_mode():
        drafter = make_drafter(decoder, 4, weights, 5)
        hidden = torch.randn(6, 32)
        expected = make_drafter(decoder, 4, weights).head(hidden)
        logits = drafter.head(hidden)
    assert logits.shape == (6, 50)
    listed = [0, 1, 2, 17, 31]
    assert torch.isfinite(logits).nonzero()[:, 1].tolist() == listed * 6
    assert_close(logits[:, listed], expected[:, listed], torch.bfloat16 if weights == "int8" else None)


def test_what_was_counted_most_comes_first_then_the_first_ids():
    """Guards against ids that the model does not have, and a list that depends on what was answered."""
    model = fresh()
    assert likely_ids(model, 3) == [0, 1, 2]
    prefer_ids(model, {40: 7, 2: 3, 30: 1, 99: 50, -1: 50})
    assert likely_ids(model, 2) == [2, 40]
    assert likely_ids(model, 5) == [0, 1, 2, 30, 40]
    generate(model, PROMPT, max_steps=40, eos=[])
    assert likely_ids(model, 5) == [0, 1, 2, 30, 40]


@pytest.mark.parametrize("fused", [True, False])
def test_rows_are_copied_once(fused, monkeypatch):
    """Guards against copies for each answer."""
    model, copied = fresh(), []
    if fused:
        fuse(model)
    of_rows = Product.of_rows
    monkeypatch.setattr(Product, "of_rows", lambda self, ids: copied.append(ids) or of_rows(self, ids))
    plain = generate(model, PROMPT, max_steps=40, eos=[])
    for _ in range(3):
        result = generate(model, PROMPT, draft_vocabulary=12, **DRAFTS)
        assert result.predicted_tokens == plain.predicted_tokens
    assert len(copied) == 1


def test_of_a_head_in_fewer_bits_only_these_rows_are_made():
    """Guards against a copy of the whole head that nobody reads."""
    model = fresh()
    fuse(model)
    generate(model, PROMPT, draft_vocabulary=12, draft_weights="int8", **DRAFTS)
    head = lean_forms(model)[1].products[0]
    assert not head.has_derived(Int8Product)
    assert [rows.has_derived(Int8Product) for rows in head.all_derived if isinstance(rows, Product)] == [True]


@pytest.mark.parametrize("fused", [True, False])
def test_other_weights_have_rows_of_their_own(fused):
    """Guards against drafts by the head that a model had before."""
    model = fresh(agreement="always", exit_layer=2)
    if fused:
        fuse(model)
    first = generate(model, PROMPT, draft_vocabulary=49, **DRAFTS)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    second = generate(model, PROMPT, draft_vocabulary=49, **DRAFTS)
    assert first.predicted_tokens != second.predicted_tokens
    assert min(first.acceptance_rate, second.acceptance_rate) > 0.8


def test_the_whole_vocabulary_is_the_whole_head():
    decoder = Decoder(tiny_llama(), 1, 8)
    assert make_drafter(decoder, 2, "exact", 50) is make_drafter(decoder, 2, "exact", 10**9) is decoder


def test_a_head_in_parts_is_refused():
    """As those of tensor parallelism, or of a library that quantises."""
    model = fresh()

    class Part(torch.nn.Linear):
        pass

    model.lm_head.__class__ = Part
    with pytest.raises(ValueError, match="draft_vocabulary 8: needs the whole head"):
        generate(model, PROMPT, draft_vocabulary=8, **DRAFTS)


def test_adaptive_drafts_with_it():
    """Guards against exits of adaptive decoding that read the whole head all the same."""
    model = fresh(agreement="always", exit_layer=1)
    prefer_ids(model, dict.fromkeys(generate(model, PROMPT, max_steps=40, eos=[EOS]).predicted_tokens, 1))
    for vocabulary in (None, 20, 50):
        asked = {"max_steps": 40, "eos": [EOS], "draft_vocabulary": vocabulary}
        result = generate(model, PROMPT, "adaptive", **asked)
        assert {*result.drafts_by_source} <= {"none", "lookup", "exit 1"}
        assert result.predicted_tokens == generate(model, PROMPT, max_steps=40, eos=[EOS]).predicted_tokens
