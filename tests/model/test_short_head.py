"""Drafts that read a few rows of the head: which ones, when they are copied, and what comes of the others.
Ids that a sequence has seen are among them, for this sequence alone.

That the output does not depend on it is in test_self_speculation_generator.py, decoding/test_rows.py and
decoding/test_sampling_distribution.py.
"""

import copy

import pytest
import torch
from conftest import EOS, assert_close, generate, tiny_llama

from self_speculation import GenerationConfig, Request, make_strategy
from self_speculation.decoding.sequence import Sequence
from self_speculation.drafts.registry import DraftContext, make_drafter, make_short_head
from self_speculation.model import short_head
from self_speculation.model.fused_layers import fuse, fused_model
from self_speculation.model.int4_linear import Int4Linear
from self_speculation.model.linear import Linear
from self_speculation.model.model_runner import ModelRunner
from self_speculation.model.short_head import likely_ids, prefer_ids

PROMPT = [45, 9, 44, 7, 7, 43]
DRAFTS = {"exit_layer": 2, "num_speculations": 3, "max_steps": 40, "eos": []}


def fresh(**kwargs):
    """A model of its own."""
    return copy.deepcopy(tiny_llama(**kwargs))


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
    of_rows = Linear.of_rows
    monkeypatch.setattr(Linear, "of_rows", lambda self, ids: copied.append(ids) or of_rows(self, ids))
    plain = generate(model, PROMPT, max_steps=40, eos=[])
    for _ in range(3):
        result = generate(model, PROMPT, draft_vocabulary=12, **DRAFTS)
        assert result.predicted_tokens == plain.predicted_tokens
    assert len(copied) == 1


def test_of_a_head_in_fewer_bits_only_these_rows_are_made():
    """Guards against a copy of the whole head that nobody reads."""
    model = fresh()
    fuse(model)
    generate(model, PROMPT, draft_vocabulary=12, draft_weights="int4", **DRAFTS)
    head = fused_model(model)[1].linears[0]
    assert Int4Linear not in head.derived
    assert [Int4Linear in rows.derived for rows in head.derived.values() if isinstance(rows, Linear)] == [
        True
    ]


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
    runner = ModelRunner(tiny_llama(), 1, 8)
    assert [make_short_head(runner, number) for number in (50, 10**9, None)] == [None] * 3
    assert make_drafter(runner, 2, "exact", None) is runner


def test_adaptive_drafts_with_it():
    """Guards against exits of adaptive decoding that read the whole head all the same."""
    model = fresh(agreement="always", exit_layer=1)
    prefer_ids(model, dict.fromkeys(generate(model, PROMPT, max_steps=40, eos=[EOS]).predicted_tokens, 1))
    for vocabulary in (None, 20, 50):
        asked = {"max_steps": 40, "eos": [EOS], "draft_vocabulary": vocabulary}
        result = generate(model, PROMPT, "adaptive", **asked)
        assert {*result.drafts_by_source} <= {"none", "lookup", "exit 1"}
        assert result.predicted_tokens == generate(model, PROMPT, max_steps=40, eos=[EOS]).predicted_tokens


def output(*ids):
    return Sequence(Request([*ids]), GenerationConfig(max_steps=9), 99, torch.device("cpu"))


def logits_of(head, num_rows=1):
    """[B, V] of states that are alike in every row."""
    return head(torch.linspace(-1, 1, 32).repeat(num_rows, 1))


def known(head, num_rows=1):
    """[B] the ids that have a logit."""
    return [row.isfinite().nonzero()[:, 0].tolist() for row in logits_of(head, num_rows)]


@pytest.mark.parametrize(("fused", "weights"), [(True, "exact"), (True, "int4"), (False, "exact")])
def test_likely_and_seen_ids_have_the_logits_of_the_whole_head(fused, weights):
    """Guards against a row, or its bias, instead of another one; against ids that a sequence has not seen;
    and against an output that is read once.
    """
    torch.manual_seed(0)
    model = fresh()
    model.lm_head.bias = torch.nn.Parameter(torch.randn(50))
    if fused:
        fuse(model)
    prefer_ids(model, {31: 2, 17: 1})
    runner, seen = ModelRunner(model, 1, 8), output(40, 8, 31, 40)
    with torch.inference_mode():
        head = make_drafter(runner, 4, weights, make_short_head(runner, 5)).head
        assert known(head) == [[0, 1, 2, 17, 31]]
        head.see([seen])
        assert known(head) == [[0, 1, 2, 8, 17, 31, 40]]
        seen.tokens += [44, 2, 8]
        head.see([seen])
        listed = [0, 1, 2, 8, 17, 31, 40, 44]
        assert known(head) == [listed]
        whole = logits_of(make_drafter(runner, 4, weights).head)
        assert whole.shape == logits_of(head).shape == (1, 50)
        # Four bits of rows, beside a whole head in 16.
        error = (logits_of(head) - whole)[:, listed].norm() / whole[:, listed].norm()
        assert error < (0.2 if weights == "int4" else 1e-5)


def test_a_row_knows_its_own_ids_alone():
    """Guards against a sequence whose drafts depend on its neighbours; and against rows that move, leave
    or come with another one's ids.
    """
    runner = ModelRunner(fresh(), 1, 8)
    head = make_short_head(runner, 3)
    first, second, third = output(7, 9), output(9, 30), output(41)
    likely = [0, 1, 2]
    with torch.inference_mode():
        head.see([first, second])
        assert known(head, 2) == [[*likely, 7, 9], [*likely, 9, 30]]
        first.tokens += [30]
        second.tokens += [7]
        head.see([first, second])  # now both know all
        assert known(head, 2) == [[*likely, 7, 9, 30]] * 2
        head.see([second])
        head.see([third, second, output(1)])
        assert known(head, 3) == [[*likely, 41], [*likely, 7, 9, 30], likely]
        head.see([second, third])
        assert known(head, 2) == [[*likely, 7, 9, 30], [*likely, 41]]
        head.see([first, third])
        assert known(head, 2)[0] == [*likely, 7, 9, 30]


@pytest.mark.parametrize("drafts", [{}, {"prompt_lookup": 2}], ids=str)
@pytest.mark.parametrize("sample", [False, True])
def test_draws_do_not_depend_on_neighbours(sample, drafts):
    """Guards against a row of a batch that drafts otherwise than alone, because of ids that another one has
    seen.
    """
    model, strategy = fresh(), make_strategy("self_speculative")
    config = GenerationConfig(
        generation_strategy="self_speculative", exit_layer=2, num_speculations=3, draft_vocabulary=6,
        max_steps=25, sample=sample, temperature=1.0, **drafts,
    )  # fmt: skip

    def answers(prompts, batch_size):
        requests = [Request(prompt, seed=len(prompt), eos_token_ids=[]) for prompt in prompts]
        made = dict(strategy.generate_batch(model, requests, config, batch_size))
        return [(made[i].predicted_tokens, made[i].num_accepted) for i in range(len(prompts))]

    prompts = [PROMPT, [20, 21, 22], [13, 14, 15, 16, 13], [40, 41]]
    together = answers(prompts, 3)
    assert together == [answers([prompt], 1)[0] for prompt in prompts]
    assert sum(accepted for _, accepted in together) > 0


def test_a_text_is_known_position_by_position():
    """Guards against a replay whose drafts know what is still to come."""
    head = make_short_head(ModelRunner(fresh(), 1, 8), 3)
    with torch.inference_mode():
        head.see_text([9, 7, 1, 30, 9], 3)
        assert known(head, 3) == [[0, 1, 2, 7, 9], [0, 1, 2, 7, 9, 30], [0, 1, 2, 7, 9, 30]]
        head.see_text([9], 1)
        assert known(head) == [[0, 1, 2, 9]]
        seen = output(7, 8)
        head.see([seen])  # a sequence after a text
        assert known(head) == [[0, 1, 2, 7, 8]]


def test_seen_ids_take_no_more_room_than_there_is(monkeypatch):
    """Guards against a head that grows to its full size by a long text."""
    monkeypatch.setattr(short_head, "_MOST_SEEN", 4)
    head = make_short_head(ModelRunner(fresh(), 1, 8), 3)
    first, second = output(10, 11, 12), output(12, 20, 21, 22)
    with torch.inference_mode():
        head.see([first, second])
        (of_first, of_second) = known(head, 2)
        assert of_first == [0, 1, 2, 10, 11, 12]
        assert of_second == [0, 1, 2, 12, 20]
        second.tokens += [23, 10]
        head.see([first, second])
        assert known(head, 2) == [of_first, [0, 1, 2, 10, 12, 20]]
        assert len(head._seen._rows) == 4
        # Guards against a server that is never idle and sees no more ids after a while.
        expected = head(torch.ones(2, 32))[0, :3]
        del first
        third = output(30, 31)
        head.see([third, second])
        assert known(head, 2) == [[0, 1, 2, 30], [0, 1, 2, 10, 12, 20]]
        assert_close(head(torch.ones(2, 32))[0, :3], expected)
    assert len(head._seen._rows) == 4


def test_what_a_sequence_has_said_can_be_drafted():
    """Guards against a short head that never guesses a name, which stands in the prompt and nowhere in the
    list.
    """
    model = fresh(agreement="always", exit_layer=2)
    plain = generate(model, PROMPT, max_steps=40, eos=[]).predicted_tokens
    result = generate(model, [*plain, *PROMPT], draft_vocabulary=1, **DRAFTS)
    assert (
        result.predicted_tokens == generate(model, [*plain, *PROMPT], max_steps=40, eos=[]).predicted_tokens
    )
    assert result.num_accepted > 10


def test_a_large_head_is_short_unless_told_otherwise(monkeypatch):
    """Guards against copies that read 150,000 rows for each token, and against a short head where it saves
    nothing: next to a copy of many layers, or where the vocabulary is small or the model's own exits draft.
    """
    model = fresh()
    fuse(model)

    def vocabulary(**config):
        asked = {"exit_layer": 4, "num_speculations": 3, "generation_strategy": "self_speculative", **config}
        return DraftContext(ModelRunner(model, 1, 8), GenerationConfig(**asked)).draft_vocabulary

    assert vocabulary(draft_weights="int4") is None
    monkeypatch.setattr("self_speculation.model.quantized_layers.works", lambda *_: True)
    monkeypatch.setattr(short_head, "_LEAST_ROWS", 8)
    monkeypatch.setattr(short_head, "_CLEARLY_CHEAPER", 0.1)
    adaptive = {"generation_strategy": "adaptive", "exit_layer": -1, "num_speculations": -1}
    assert vocabulary(draft_weights="int4", exit_layer=1) == vocabulary(**adaptive) == 16
    assert vocabulary(draft_weights="int4") is vocabulary(exit_layer=1) is None
    assert vocabulary(draft_weights="int4", draft_vocabulary=30) == 30
    monkeypatch.setattr(short_head, "_CLEARLY_CHEAPER", 0.03)
    assert vocabulary(draft_weights="int4") == 16


def test_a_head_in_parts_is_refused_or_whole_by_default(monkeypatch):
    """As heads of tensor parallelism or of a quantising library. Guards against adaptive decoding that is
    refused for a flag that nobody gave.
    """
    monkeypatch.setattr(short_head, "_LEAST_ROWS", 8)
    monkeypatch.setattr(short_head, "_CLEARLY_CHEAPER", 0.0)
    model = fresh()
    model.lm_head.__class__ = type("Part", (torch.nn.Linear,), {})
    with pytest.raises(ValueError, match="draft_vocabulary 8: needs the whole head"):
        generate(model, PROMPT, draft_vocabulary=8, **DRAFTS)
    result = generate(model, PROMPT, "adaptive", max_steps=20, eos=[])
    assert result.predicted_tokens == generate(fresh(), PROMPT, max_steps=20, eos=[]).predicted_tokens
