"""Reads from the device: each waits for all queued work of a GPU, so tests count and order them."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from conftest import ADAPTIVE, LAYERS, Recorder, generate, needs_operators, random_plans, tiny_llama
from helpers import watch
from transformers import MaxLengthCriteria

from self_speculation.backends.runner import ModelRunner
from self_speculation.engine import batch
from self_speculation.machine.transfers import AsyncRead
from self_speculation.text.grammar import Grammar, GrammarProcessor

PROMPT = [5, 9, 4, 7, 7, 3, 9, 4]


@pytest.fixture
def reads(monkeypatch):
    """Reads from now on. `test_fake_cuda.Waits` fails at any other."""
    return watch(monkeypatch, AsyncRead, "__init__")


def drafted_by_layers(result):
    drafts = result.draft_stats.by_source.items() if result.draft_stats else ()
    return sum(counts.drafted for name, counts in drafts if name.startswith("exit"))


SHOWN = {**LAYERS, "streamer": Mock()}


@pytest.mark.parametrize(
    ("config", "reads_drafts"),
    [
        ({}, False),
        (LAYERS, False),
        pytest.param({**LAYERS, "draft_weights": "int4"}, False, marks=needs_operators),
        ({**LAYERS, "prompt_lookup": 3}, False),
        (SHOWN, True),
        ({**SHOWN, "prompt_lookup": 3}, True),  # but not what the host has drafted
        (ADAPTIVE, False),
    ],
)
def test_one_read_a_round_and_at_most_one_for_a_drafted_token(config, reads_drafts, reads):
    """Guards against a second read of a verification or a token, and reads for plans or n-grams. Random plans
    give every kind of round.
    """
    with random_plans(0):
        result = generate(tiny_llama(num_layers=8, fused=True), PROMPT, max_steps=60, eos=[], **config)
    rounds = result.draft_stats.num_verifications if result.draft_stats else 59
    assert len(reads) == 1 + rounds + reads_drafts * drafted_by_layers(result)
    if config is ADAPTIVE:
        assert {*result.draft_stats.by_source} == {"none", "exit 1", "exit 2", "exit 3", "n-grams"}


@pytest.mark.parametrize("more", [None, {}, {"streamer": Mock()}, {"prompt_lookup": 3}])
def test_a_grammar_reads_each_drafted_token_once(bundled, more, reads):
    """Guards against a read of the whole output for each mask, in drafts and again in verification."""
    model, tokenizer = bundled
    ids = tokenizer.encode("values = ")
    processor = GrammarProcessor(Grammar.regex("[0-9, ]+"), tokenizer, model.config.vocab_size, [0])
    drafts = {} if more is None else {"exit_layer": 3, "num_speculations": 4, **more}
    result = generate(model, ids, max_steps=30, eos=[], logits_processors=[processor], **drafts)
    rounds = result.draft_stats.num_verifications if drafts else 29
    assert len(reads) == 1 + rounds + drafted_by_layers(result)


WITHOUT_WAITING = ["read", "pass", "pass", "read", "pass", "read", "pass", "read", "pass", "read", "read"]
IN_TURN = ["read", *["pass", "read"] * 5]


@pytest.mark.parametrize(
    ("late", "request_", "expected"),
    [
        (False, {}, IN_TURN),
        (True, {}, WITHOUT_WAITING),
        (True, {"streamer": SimpleNamespace(put=list, end=list)}, WITHOUT_WAITING),
        (True, {"eos": [14]}, [*WITHOUT_WAITING[:6], "read"]),  # the third token
        (False, {"eos": [14]}, IN_TURN[:5]),
        (True, {"logits_processors": [lambda ids, logits: logits]}, IN_TURN),
        (True, {"stopping_criteria": [MaxLengthCriteria(90)]}, WITHOUT_WAITING),
    ],
)
def test_the_next_pass_is_queued_before_a_read(late, request_, expected, monkeypatch):
    """Guards against a GPU that waits for the host after each token, against passes beyond the last token,
    and against one that is queued although a processor needs the token first.
    """
    order = []
    monkeypatch.setattr(batch, "queues_passes", lambda device: late)
    watch(monkeypatch, ModelRunner, "run", lambda *_, **__: order.append("pass"))
    watch(monkeypatch, AsyncRead, "wait", lambda *_: order.append("read"))
    generate(tiny_llama(), PROMPT[:3], max_steps=6, **{"eos": [], **request_})
    assert order == expected


@pytest.mark.parametrize(
    ("late", "expected"),
    [
        (False, ["pass", "show", "pass", "show", "pass", "show", "pass", "pass", "read"]),
        (True, ["pass", "pass", "pass", "pass", "pass", "show", "read"]),
    ],
)
def test_drafts_are_shown_while_a_gpu_verifies(late, expected, monkeypatch):
    """Guards against a GPU that waits until each drafted token is printed, and against a CPU that shows a
    draft only when it is complete.
    """
    order = []
    recorder = Recorder()
    monkeypatch.setattr(batch, "queues_passes", lambda device: late)
    watch(monkeypatch, ModelRunner, "run_layers", lambda *_, **__: order.append("pass"))
    watch(monkeypatch, batch.Batch, "check", lambda *_: order.append("read"))
    watch(
        monkeypatch, recorder, "put", lambda *_, is_draft=False: order.append("show" if is_draft else "put")
    )
    drafts = {"exit_layer": 2, "num_speculations": 3, "streamer": recorder}
    result = generate(tiny_llama(), PROMPT, max_steps=8, eos=[], **drafts)
    first_round = order[order.index("put") + 1 :]
    assert first_round[: len(expected)] == expected
    assert (recorder.decided, recorder.drafts) == (result.predicted_tokens, [])
