"""Predicted outputs: an answer that resembles a text drafts most of itself, and stays the model's own."""

import pytest
from conftest import ADAPTIVE, LAYERS, PROMPT, generate, ids_of, in_batch, mixed_drafts, tiny_llama
from hypothesis import given
from hypothesis import strategies as st

from self_speculation import Request
from self_speculation.drafts.prediction import _Cursor


def test_a_cursor_follows_what_is_replaced_left_out_and_put_in():
    text, output = list(range(10, 60)), []
    cursor = _Cursor(text)
    assert cursor.next(3) == [10, 11, 12]  # before the first token
    for more, expected, matched in (
        (text[:20], [30, 31], 20),
        ([99], [31, 32], 0),  # replaced
        ([31, 32], [33, 34], 2),
        ([40, 41], [42, 43], 2),  # left out
        ([99, 98, 97, 42, 43], [44, 45], 2),  # put in
        (text[34:], [], 18),
    ):
        output += more
        cursor.follow(output)
        assert (cursor.next(2), cursor.matched) == (expected, matched)


def test_of_several_places_the_next_one_is_taken():
    """Guards against jumping back to the first of many lines that begin alike."""
    line = [1, 2, 3]
    cursor = _Cursor([*line, 10, *line, 20, *line, 30])
    cursor.follow([*line, 10, 99, *line])
    assert cursor.next(1) == [20]


@given(
    prediction=st.lists(st.integers(0, 4), max_size=30),
    output=st.lists(st.integers(0, 4), max_size=30),
    cut=st.integers(0, 30),
)
def test_a_cursor_does_not_depend_on_when_it_is_asked(prediction, output, cut):
    at_once, in_two = _Cursor(prediction), _Cursor(prediction)
    at_once.follow(output)
    in_two.follow(output[:cut])
    in_two.follow(output)
    assert (at_once.next(5), at_once.matched) == (in_two.next(5), in_two.matched)


@mixed_drafts("prediction")
@pytest.mark.parametrize("how", [ADAPTIVE, {**LAYERS, "prompt_lookup": 2}])
def test_the_ids_are_the_models_own(how):
    """Whatever is predicted: the answer itself, a variant of it, or something else."""
    model, shared = tiny_llama(), {"max_steps": 30, "eos": []}
    plain = ids_of(model, **shared)
    for prediction, least in ((plain, 16), ([*plain[:9], 1, *plain[12:]], 1), ([49] * 40, 0), ([], 0)):
        result = generate(model, PROMPT, prediction=prediction, **shared, **how)
        assert result.predicted_tokens == plain
        counts = result.drafts_by_source.get("prediction")
        accepted = counts.accepted if counts else 0
        assert accepted >= least if least else accepted == 0


@pytest.mark.parametrize("how", [ADAPTIVE, {**LAYERS, "prompt_lookup": 2}])
@pytest.mark.parametrize("unknown", [50, -1, 10**6])
def test_ids_that_the_model_lacks(how, unknown):
    """Guards against a prediction that fails the whole batch, and on a GPU ends the process."""
    model, shared = tiny_llama(), {"max_steps": 12}
    plain = ids_of(model, **shared)
    requests = [Request(PROMPT, prediction=[*plain[:5], unknown, *plain[6:]]), Request(PROMPT[:4])]
    found = in_batch(model, requests, 2, **shared, **how)
    assert found[0].predicted_tokens == plain
    assert found[1].predicted_tokens == ids_of(model, PROMPT[:4], **shared)
    assert found[0].drafts_by_source["prediction"].accepted
