"""Drafts that read a few rows of the head: which ones, when they are copied, and what comes of the others.

That the output does not depend on it is in test_equality.py, test_batches.py and
test_sampling_distribution.py.
"""

import copy

import pytest
import torch
from conftest import EOS, assert_close, generate, tiny_llama

from self_speculation.drafts.table import make_drafter
from self_speculation.model.decoder import Decoder
from self_speculation.model.lean_layers import Product, fuse
from self_speculation.model.prepared import prepared
from self_speculation.model.short_head import ShortHead
from self_speculation.model.vocabulary import _FEW, _HALVED_AT, Vocabulary

PROMPT = [45, 9, 44, 7, 7, 43]
DRAFTS = {"exit_layer": 2, "num_speculations": 3, "max_steps": 40, "eos": []}


def fresh(**kwargs):
    """A model that has written nothing yet."""
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
    """Guards against a row, or its bias, in the place of another one, and ids of another row of the batch."""
    if weights == "int8" and not fused:
        pytest.skip("copies are made of lean layers")
    decoder = Decoder(with_biases(fused), 1, 8)
    prepared_counts = decoder.prepared.vocabulary
    prepared_counts.count([31, 31, 17])
    drafter = make_drafter(decoder, 4, weights, 5)
    hidden = torch.randn(6, 32)  # three positions of two rows
    expected = make_drafter(decoder, 4, weights).head(hidden)
    with torch.inference_mode():
        for own in ([[], []], [[2, 40], []], [[49, 99], list(range(45))]):
            drafter.head.follow(own)
            logits = drafter.head(hidden)
            assert logits.shape == (6, 50)
            for row, ids in enumerate(own):
                listed = sorted({31, 17, 0, 1, 2, *ids} - {99})
                mine = slice(3 * row, 3 * row + 3)
                assert torch.isfinite(logits[mine]).nonzero()[:, 1].tolist() == listed * 3
                computed_in = torch.bfloat16 if weights == "int8" else None
                assert_close(logits[mine][:, listed], expected[mine][:, listed], computed_in)


def test_what_was_written_most_comes_first_then_the_first_ids():
    vocabulary = Vocabulary()
    assert vocabulary.likely(3, 50).ids == [0, 1, 2]
    vocabulary.add({40: 7, 2: 3, 30: 1})
    assert vocabulary.likely(2, 50).ids == [2, 40]
    assert vocabulary.likely(5, 50).ids == [0, 1, 2, 30, 40]


def test_a_list_is_kept_until_enough_has_changed():
    """Guards against rows that are copied for every answer, and against a list that is never renewed."""
    vocabulary = Vocabulary()
    first = vocabulary.likely(10, 50)
    vocabulary.count([40] * (_FEW - 1))
    assert vocabulary.likely(10, 50) is first  # too little to judge by
    vocabulary.count([3])
    second = vocabulary.likely(10, 50)
    assert 40 in second.known
    vocabulary.count([3, 5] * _FEW + [41] * (_FEW // 10))
    assert vocabulary.likely(10, 50) is second  # all but a few are in it
    vocabulary.count([41] * _FEW)
    assert 41 in vocabulary.likely(10, 50).known


def test_counts_are_bounded():
    """Guards against a process that answers for weeks and hears no more of what is written today."""
    vocabulary = Vocabulary()
    vocabulary.count([1] * _HALVED_AT)
    vocabulary.count([2, 2, 2, 3])
    assert vocabulary.counts == {1: _HALVED_AT // 2, 2: 1}


def test_what_is_decoded_is_counted_and_rows_are_copied_once(monkeypatch):
    """By any strategy. Guards against copies for each answer, and against one that is never made anew."""
    model, copied = fresh(), []
    of_rows = Product.of_rows
    monkeypatch.setattr(Product, "of_rows", lambda self, ids: copied.append(ids) or of_rows(self, ids))
    plain = generate(model, PROMPT, max_steps=40, eos=[])
    assert prepared(model).vocabulary.counts.total() == 40
    for _ in range(5):
        result = generate(model, PROMPT, draft_vocabulary=12, **DRAFTS)
        assert result.predicted_tokens == plain.predicted_tokens
    assert len(copied) == 1
    assert set(result.drafts_by_source) == {"exit 2, 12 ids"}
    prepared(model).vocabulary.count([49] * _FEW)
    generate(model, PROMPT, draft_vocabulary=12, **DRAFTS)
    assert len(copied) == 2
    assert 49 in copied[1]


def test_other_weights_have_rows_of_their_own():
    """Guards against drafts by the head that a model had before."""
    model = tiny_llama(agreement="always", exit_layer=2)
    model = copy.deepcopy(model)
    first = generate(model, PROMPT, draft_vocabulary=49, **DRAFTS)
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.flip(0))
    second = generate(model, PROMPT, draft_vocabulary=49, **DRAFTS)
    assert first.predicted_tokens != second.predicted_tokens
    assert min(first.acceptance_rate, second.acceptance_rate) > 0.9


def test_ids_of_the_prompt_and_end_ids_are_always_drafted(monkeypatch):
    """By a model that hardly says anything else, in drafts of one likely id."""
    model, followed, follow = fresh(agreement="always"), [], ShortHead.follow
    monkeypatch.setattr(ShortHead, "follow", lambda head, own: followed.append(own) or follow(head, own))
    with torch.no_grad():
        model.lm_head.weight[[i for i in range(50) if i not in PROMPT]] *= 1e-3
    result = generate(model, PROMPT, draft_vocabulary=1, stop_token_ids=[33], **{**DRAFTS, "eos": [12]})
    assert len({*result.predicted_tokens} & {*PROMPT}) > 1
    assert result.acceptance_rate == 1.0
    assert followed[0] == [{*PROMPT, *result.predicted_tokens, 12, 33}]


def test_what_was_written_can_be_drafted_again():
    """A processor has one token written over and over; what the draft knows of it comes from the output."""

    class Always:
        def __call__(self, _, logits):
            return logits.index_add(1, torch.tensor([49]), torch.full((1, 1), 1e4))

    result = generate(tiny_llama(), PROMPT, draft_vocabulary=1, logits_processors=[Always()], **DRAFTS)
    assert result.predicted_tokens == [49] * 40
    assert result.acceptance_rate == 1.0


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
    """Guards against arms of one name, one for a list of all there are, and costs of another vocabulary."""
    model, asked = fresh(agreement="always", exit_layer=1), {"max_steps": 40, "eos": [EOS]}
    for vocabulary in (None, 20, 50):
        result = generate(model, PROMPT, "adaptive", draft_vocabulary=vocabulary, **asked)
        assert {*result.drafts_by_source} <= {"none", "lookup", "exit 1", "exit 1, 20 ids"}
        arms = {name for name, _ in [*prepared(model).learnt.values()][-1]._of_answers}
        assert ("exit 1, 20 ids" in arms) == (vocabulary == 20)
        assert "exit 1" in arms
    assert len(prepared(model).costs) == 3
