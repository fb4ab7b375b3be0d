"""Drafts from finished answers: fewer rounds for a question like an earlier one, and the model's own ids."""

import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from conftest import ADAPTIVE, LAYERS, PROMPT, config_of, generate, ids_of, in_batch, mixed_drafts, own_llama
from hypothesis import given
from hypothesis import strategies as st

from measures.timed_runs import run_every_pass
from self_speculation import Request, make_strategy
from self_speculation.drafts.registry import forget_what_was_learnt
from self_speculation.drafts.shared import _LONG, FinishedAnswers


def answer(*ids):
    """A finished sequence without a prompt."""
    return SimpleNamespace(prompt=[], ids_from=lambda position: list(ids))


@given(st.lists(st.integers(1, 15), min_size=1, max_size=20), st.integers(2, 40))
def test_it_keeps_the_last_answers(lengths, num_tokens):
    """Guards against memory that grows with every answer, and against an answer that pushes out itself."""
    kept = FinishedAnswers(num_tokens)
    answers = [list(range(100 * number, 100 * number + n)) for number, n in enumerate(lengths)]
    for ids in answers:
        kept.add(answer(*ids))
        ids = ids[: num_tokens // 2]
        for n in range(3, len(ids)):
            assert kept.find(ids[:n], 1) == (_LONG if n >= _LONG else 3, ids[n : n + 1])
    found = [ids[: num_tokens // 2] for ids in answers if kept.find(ids[:3], 1)[0]]
    assert sum(map(len, found)) <= num_tokens


def test_an_answer_is_found_by_the_end_of_its_prompt():
    """Guards against a repeated question whose first tokens are not drafted."""
    kept, ids = FinishedAnswers(100), [*range(20)]
    kept.add(SimpleNamespace(prompt=ids[:12], ids_from=lambda position: ids[position:]))
    assert kept.find(ids[:12], 2) == (_LONG, [12, 13])


def test_threads_share_it():
    """Guards against a lookup in the middle of an addition."""
    kept, ids = FinishedAnswers(400), [1, 2, 3, 4] * 50
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as pool:
            adding = pool.submit(lambda: [kept.add(answer(*ids)) for _ in range(100)])
            while not adding.done():
                kept.find([1, 2, 3, 4, 1, 2, 3, 4], 4)
            adding.result()
    finally:
        sys.setswitchinterval(interval)


@mixed_drafts()
@pytest.mark.parametrize("how", [ADAPTIVE, LAYERS, {**LAYERS, "prompt_lookup": 2}])
def test_a_repeated_question_needs_fewer_rounds(how):
    """Guards against another output, and against an index that is lost between two schedulers."""
    model = own_llama()
    plain = ids_of(model, max_steps=40)
    settings = {"max_steps": 40, "eos": [], "shared_lookup": 200, **how}
    first, second = (generate(model, PROMPT, **settings) for _ in range(2))
    assert first.predicted_tokens == second.predicted_tokens == plain
    assert second.drafts_by_source["shared"].accepted > 20
    assert second.num_verifications < first.num_verifications / 2
    others = generate(own_llama(), PROMPT, **settings)
    assert others.num_verifications > 2 * second.num_verifications  # no answers of another model


def test_a_warm_up_teaches_nothing():
    """Guards against a measured answer that is drafted from the warm-up's or from a forgotten one."""
    model = own_llama()
    config = {**LAYERS, "shared_lookup": 200}
    run_every_pass(make_strategy("self_speculative"), model, PROMPT, config_of(**config))
    for _ in range(2):
        assert "shared" not in generate(model, PROMPT, max_steps=40, eos=[], **config).drafts_by_source
        forget_what_was_learnt(model)


@mixed_drafts("exit 2")
def test_rows_learn_from_rows_that_have_finished():
    """Guards against answers that are added only after the whole batch."""
    requests = [Request(PROMPT, eos_token_ids=[]) for _ in range(3)]
    settings = {"max_steps": 30, "shared_lookup": 200, **LAYERS}
    made = in_batch(own_llama(), requests, 2, **settings)
    assert made[0].predicted_tokens == made[1].predicted_tokens == made[2].predicted_tokens
    assert "shared" not in made[0].drafts_by_source
    assert made[2].drafts_by_source["shared"].accepted > 15
