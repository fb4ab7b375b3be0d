"""Predicted outputs: an answer that resembles a text drafts most of itself, and stays the model's own."""

import pytest
from conftest import generate, tiny_llama
from hypothesis import given
from hypothesis import strategies as st

import self_speculation
from self_speculation import GenerationConfig, HuggingfaceLlamaGenerator, Request, make_strategy
from self_speculation.drafts.prediction import _Cursor

PROMPT = [5, 9, 4, 7, 7, 3]
STRATEGIES = {
    "adaptive": {"strategy": "adaptive"},
    "before an exit": {"exit_layer": 2, "num_speculations": 6, "prompt_lookup": 2},
}


def test_a_cursor_follows_what_is_replaced_left_out_and_put_in():
    text = list(range(10, 60))
    cursor = _Cursor(text)
    assert cursor.next(3) == [10, 11, 12]  # before the first token
    cursor.follow(text[:20])
    assert (cursor.next(2), cursor.matched) == ([30, 31], 20)
    replaced = [*text[:20], 99]
    cursor.follow(replaced)
    assert (cursor.next(2), cursor.matched) == ([31, 32], 0)
    cursor.follow([*replaced, 31, 32])
    assert cursor.next(2) == [33, 34]
    left_out = [*replaced, 31, 32, 40, 41]
    cursor.follow(left_out)
    assert cursor.next(2) == [42, 43]
    put_in = [*left_out, 99, 98, 97, 42, 43]
    cursor.follow(put_in)
    assert cursor.next(2) == [44, 45]
    cursor.follow([*put_in, *text[34:]])
    assert cursor.next(2) == []


def test_of_several_places_the_next_one_is_taken():
    """Guards against jumping back to the first of many lines that begin alike."""
    line = [1, 2, 3]
    text = [*line, 10, *line, 20, *line, 30]
    cursor = _Cursor(text)
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
    assert at_once.next(5) == in_two.next(5)
    assert at_once.matched == in_two.matched


def answer(model, prediction, **how):
    strategy = how.pop("strategy", "self_speculative")
    config = GenerationConfig(sample=False, max_steps=30, generation_strategy=strategy, **how)
    request = Request(PROMPT, prediction=prediction)
    ((_, result),) = make_strategy(strategy).generate_batch(model, [request], config, batch_size=1)
    return result


@pytest.mark.parametrize("how", STRATEGIES)
def test_the_ids_are_the_models_own(how):
    """Whatever is predicted: the answer itself, a variant of it, or something else."""
    model = tiny_llama()
    plain = generate(model, PROMPT, strategy="autoregressive", max_steps=30, eos=[]).predicted_tokens
    for prediction in (plain, [*plain[:9], 1, *plain[12:]], [49] * 40, []):
        result = answer(model, prediction, **STRATEGIES[how])
        assert result.predicted_tokens == plain
        counts = result.drafts_by_source.get("prediction")
        assert bool(counts and counts.accepted) == (prediction in (plain, [*plain[:9], 1, *plain[12:]]))
    assert answer(model, plain, **STRATEGIES[how]).drafts_by_source["prediction"].accepted > 15


def test_text_is_predicted_as_text():
    model, tokenizer = self_speculation.load_model_and_tokenizer(self_speculation.default_model())
    generator = HuggingfaceLlamaGenerator(tokenizer, model, make_strategy("adaptive"))
    config = GenerationConfig(sample=False, max_steps=24, generation_strategy="adaptive")
    plain = generator.generate("def f(x):", config)
    requests = [Request("def f(x):", prediction=plain.decoded_prediction)]
    ((_, predicted),) = generator.generate_batch(requests, config)
    assert predicted.decoded_prediction == plain.decoded_prediction
    assert predicted.generation_strategy_result.drafts_by_source["prediction"].accepted > 0
