"""A short head: which rows of the head it has, when it copies them, and what a sequence's own ids add.

test_self_speculation_generator.py, decoding/test_batch.py and decoding/test_sampling_distribution.py check
that outputs do not depend on it.
"""

import pytest
import torch
from conftest import LAYERS, assert_close, config_of, generate, ids_of, in_batch, own_llama, tiny_llama
from helpers import watch

from self_speculation import GenerationConfig, Request
from self_speculation.decoding.sequence import Sequence
from self_speculation.drafts.registry import DraftContext, make_drafter
from self_speculation.passes import short_head
from self_speculation.passes.fused_layers import FusedHead, bytes_made, fuse
from self_speculation.passes.model_runner import ModelRunner
from self_speculation.passes.short_head import ShortHead, TextReader, likely_ids, prefer_ids
from self_speculation.weights.linear import Linear

PROMPT = [45, 9, 44, 7, 7, 43]
DRAFTS = {**LAYERS, "max_steps": 40, "eos": []}


def test_likely_ids_are_the_counted_and_then_the_first():
    """Guards against ids beyond the vocabulary."""
    model = own_llama()
    assert likely_ids(model, 3) == [0, 1, 2]
    prefer_ids(model, {40: 7, 2: 3, 30: 1, 99: 50, -1: 50})
    assert likely_ids(model, 2) == [2, 40]
    assert likely_ids(model, 5) == [0, 1, 2, 30, 40]


def test_likely_ids_are_those_of_the_head():
    """Guards against ids that are kept from before others were counted, or the vocabulary was resized."""
    model = own_llama()
    assert 45 not in ShortHead(ModelRunner(model), 20).likely
    prefer_ids(model, {45: 1})
    assert 45 in ShortHead(ModelRunner(model), 20).likely
    for size in (40, 100):
        model.resize_token_embeddings(size)
        likely = ShortHead(ModelRunner(model), 20).likely
        assert likely <= {*range(size)}
        assert len(likely) == 20


@pytest.mark.parametrize("fused", [False, True])
def test_rows_are_copied_once(fused, monkeypatch):
    """Guards against new copies for each answer, and against a copy in four bits of the whole head."""
    model, copied = own_llama(fused=fused), watch(monkeypatch, Linear, "select_rows")
    for weights in ("exact", "int4", "int4"):
        generate(model, PROMPT, draft_vocabulary=12, draft_weights=weights, **{**DRAFTS, "max_steps": 4})
    (((whole, _), rows),) = copied
    assert "int4" in rows.copies
    assert "int4" not in whole.copies


@pytest.mark.parametrize("fused", [False, True])
def test_rows_follow_the_weights(fused):
    """Guards against drafts by rows of an earlier head."""
    model = own_llama(agreement="always", exit_layer=2, fused=fused)
    first = generate(model, PROMPT, draft_vocabulary=49, **DRAFTS)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0))
    second = generate(model, PROMPT, draft_vocabulary=49, **DRAFTS)
    assert first.predicted_tokens != second.predicted_tokens
    assert min(first.acceptance_rate, second.acceptance_rate) > 0.8


def test_the_whole_vocabulary_is_the_whole_head():
    """Guards against a copy of all rows."""
    runner = ModelRunner(tiny_llama())
    for number in (50, 10**9, None):
        assert make_drafter(runner, GenerationConfig(draft_vocabulary=number), 2) is runner


def sequence(*ids):
    return Sequence(Request([*ids]), GenerationConfig(max_steps=9), 99, torch.device("cpu"))


def logits_of(head, seen=None, num_rows=1):
    """[B, V] of equal states in all rows."""
    return head(torch.linspace(-1, 1, 32).repeat(num_rows, 1), seen)


def reading(head):
    """[B] the ids that have a logit, once these sequences are read."""
    reader = TextReader(head)

    def known(*sequences):
        logits = logits_of(head, reader.read(sequences), len(sequences))
        return [row.isfinite().nonzero()[:, 0].tolist() for row in logits]

    return known


@pytest.mark.parametrize(("fused", "weights"), [(True, "exact"), (True, "int4"), (False, "exact")])
def test_likely_and_seen_ids_have_the_logits_of_the_whole_head(fused, weights):
    """Guards against swapped rows or biases, against ids that the sequence has not seen, and against new ids
    that are not read.
    """
    torch.manual_seed(0)
    model = own_llama()
    model.lm_head.bias = torch.nn.Parameter(torch.randn(50))
    if fused:
        fuse(model)
    prefer_ids(model, {31: 2, 17: 1})
    runner, seen = ModelRunner(model), sequence(40, 8, 31, 40)
    with torch.inference_mode():
        head = make_drafter(runner, GenerationConfig(draft_weights=weights, draft_vocabulary=5), 4).head
        known = reading(head)
        assert known(sequence(0)) == [[0, 1, 2, 17, 31]]
        assert known(seen) == [[0, 1, 2, 8, 17, 31, 40]]
        seen.tokens += [44, 2, 8]
        listed = [0, 1, 2, 8, 17, 31, 40, 44]
        assert known(seen) == [listed]
        whole, logits = logits_of(runner.head), logits_of(head, [frozenset(seen.ids)])
        assert whole.shape == logits.shape == (1, 50)
        assert_close(logits[:, listed], whole[:, listed])


def test_the_best_ids_in_four_bits_have_the_logits_of_the_whole_head():
    """Guards against drafts of the second best id, which four bits confuse with the best in 6 of 100 cases,
    against biases of other ids, and against rows of a batch that get each other's.
    """
    torch.manual_seed(0)
    model = own_llama()
    model.lm_head.bias = torch.nn.Parameter(torch.randn(50))
    fuse(model)
    prefer_ids(model, {49: 2, 48: 1})
    runner, hidden = ModelRunner(model), torch.randn(3, 32)
    with torch.inference_mode():
        head = make_drafter(runner, GenerationConfig(draft_weights="int4", draft_vocabulary=40), 4).head
        whole = runner.head(hidden)[:, [*range(38), 48, 49]]
        logits = head(hidden, [frozenset()] * 3)[:, [*range(38), 48, 49]]
    best = whole.topk(4).indices
    assert_close(logits.gather(1, best), whole.gather(1, best))
    assert logits.topk(4).indices.equal(best)
    assert (logits - whole).norm() < 0.2 * whole.norm()  # the others have four bits


def test_a_row_knows_its_own_ids_alone():
    """Guards against drafts that depend on other rows, also after rows move, leave or join."""
    known = reading(ShortHead(ModelRunner(own_llama()), 3))
    likely, first, second, third = [0, 1, 2], sequence(7, 9), sequence(9, 30), sequence(41)
    with torch.inference_mode():
        assert known(first, second) == [[*likely, 7, 9], [*likely, 9, 30]]
        first.tokens += [30]
        second.tokens += [7]
        assert known(first, second) == [[*likely, 7, 9, 30]] * 2
        assert known(third, second, sequence(1)) == [[*likely, 41], [*likely, 7, 9, 30], likely]
        assert known(second, third) == [[*likely, 7, 9, 30], [*likely, 41]]
        assert known(first, third) == [[*likely, 7, 9, 30], [*likely, 41]]
        assert known(first, sequence(9)) == [[*likely, 7, 9, 30], [*likely, 9]]


@pytest.mark.parametrize("weights", ["exact", "int4"])
def test_answers_to_texts_with_many_new_ids_have_all_rows(weights, monkeypatch):
    """Guards against a head that changes within an answer, against one that stays whole after other texts,
    against one that never has all rows again, and against ids in four bits of which another one is the best.
    """
    runner = ModelRunner(own_llama(fused=True))
    config = GenerationConfig(generation_strategy="adaptive", draft_weights=weights)
    head = DraftContext(runner, config).drafter.head
    assert isinstance(head, FusedHead)  # by default a small vocabulary is whole
    monkeypatch.setattr(DraftContext, "draft_vocabulary", 3)
    monkeypatch.setattr(short_head, "_LAST", 8)
    head = DraftContext(runner, config).drafter.head
    text, known = sequence(0, 1, 2, 2, 1, 9), reading(head)
    with torch.inference_mode():
        whole = logits_of(runner.head)
        assert known(text) == [[0, 1, 2, 9]]
        text.tokens += range(30, 38)
        assert known(text) == [[0, 1, 2, 9, *range(30, 38)]]
        assert known(text, sequence(0)) == [[*range(50)]] * 2
        best = whole.topk(4).indices
        assert_close(logits_of(head).gather(1, best), whole.gather(1, best))
        text.tokens += [0, 1, 2, 30, 31] * 3
        assert known(text) == [[*range(50)]]
        assert known(sequence(0, 5)) == [[0, 1, 2, 5]]
        assert known(sequence(*range(20, 28))) == [[*range(50)]]


def test_texts_of_other_ids_are_drafted(monkeypatch):
    """Guards against drafts that are never right in a language whose tokens are not among the first, and
    against an answer that waits for a copy of the head before it is worth it.
    """
    monkeypatch.setattr(short_head, "_LEAST_ROWS", 8)
    monkeypatch.setattr(short_head, "_CLEARLY_CHEAPER", 0.0)
    model = own_llama(agreement="always", exit_layer=0)
    with torch.no_grad():  # the token after i is i + 1
        model.lm_head.weight.copy_(torch.nn.functional.normalize(model.model.embed_tokens.weight).roll(1, 0))
    fuse(model)

    def num_accepted(**config):
        drafts = {"exit_layer": 4, "num_speculations": 3, "draft_weights": "int4", **config}
        results = in_batch(model, [Request([*range(16, 24)]), Request([0, 1])], 2, max_steps=24, **drafts)
        assert [results[row].predicted_tokens for row in (0, 1)] == [[*range(24, 48)], [*range(2, 26)]]
        return [results[row].num_accepted for row in (0, 1)]

    # The second text has likely ids up to 15.
    short, first, grown = num_accepted(draft_vocabulary=16), num_accepted(), num_accepted()
    assert short[0] == 0 < short[1] < 12
    assert max(first) < 12
    assert min(grown) > 12
    assert bytes_made(model) > 0  # of all that is kept with the head


def test_rows_of_seen_ids_are_limited(monkeypatch):
    """Guards against a head that grows to its full size by a long text, and against a server that stops
    learning ids because rows of ended sequences stay.
    """
    monkeypatch.setattr(short_head, "_MOST_SEEN", 4)
    known = reading(ShortHead(ModelRunner(own_llama()), 3))
    first, second = sequence(10, 11, 22), sequence(12, 20, 21, 22)
    with torch.inference_mode():
        assert known(first, second) == [[0, 1, 2, 10, 11], [0, 1, 2, 12, 20]]
        assert known(second) == [[0, 1, 2, 12, 20, 21, 22]]


def test_ids_of_the_prompt_can_be_drafted():
    """Guards against a short head that never drafts a name of the prompt."""
    model = own_llama(agreement="always", exit_layer=2)
    plain = ids_of(model, PROMPT, max_steps=40)
    result = generate(model, [*plain, *PROMPT], draft_vocabulary=1, **DRAFTS)
    assert result.num_accepted > 10


def test_a_head_is_short_by_default_where_that_saves_time(monkeypatch):
    """Guards against drafts that read 150,000 rows per token, and against a short head that saves nothing:
    beside many layers, in a small vocabulary, or for the model's own exits.
    """
    model = own_llama(fused=True)

    def vocabulary(**config):
        asked = config_of(**{"exit_layer": 4, "num_speculations": 3, **config})
        return DraftContext(ModelRunner(model), asked).draft_vocabulary

    assert vocabulary(draft_weights="int4") is None
    monkeypatch.setattr("self_speculation.passes.quantized_layers.has_kernel", lambda *_: True)
    monkeypatch.setattr(short_head, "_LEAST_ROWS", 8)
    monkeypatch.setattr(short_head, "_CLEARLY_CHEAPER", 0.1)
    adaptive = {"generation_strategy": "adaptive", "exit_layer": -1, "num_speculations": -1}
    assert vocabulary(draft_weights="int4", exit_layer=1) == vocabulary(**adaptive) == 16
    assert vocabulary(exit_layer=1) is None
    monkeypatch.setattr(short_head, "_CLEARLY_CHEAPER", 0.4)
    assert vocabulary(draft_weights="int4") is None
    assert vocabulary(draft_weights="int4", draft_vocabulary=30) == 30
    monkeypatch.setattr(short_head, "_CLEARLY_CHEAPER", 0.03)
    assert vocabulary(draft_weights="int4") == 16


def test_a_head_of_another_class_stays_whole(monkeypatch):
    """Such are heads of tensor parallelism and of quantising libraries. Guards against adaptive decoding that
    is refused because of a default.
    """
    monkeypatch.setattr(short_head, "_LEAST_ROWS", 8)
    monkeypatch.setattr(short_head, "_CLEARLY_CHEAPER", 0.0)
    model = own_llama()
    model.lm_head.__class__ = type("Part", (torch.nn.Linear,), {})
    with pytest.raises(ValueError, match="draft_vocabulary 8: needs the whole head"):
        generate(model, PROMPT, draft_vocabulary=8, **DRAFTS)
    assert ids_of(model, generation_strategy="adaptive") == ids_of(tiny_llama())
