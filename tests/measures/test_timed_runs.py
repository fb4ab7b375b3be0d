"""Timings: every pass is warmed up, and every second is in a figure."""

from collections import deque

import pytest
from conftest import LAYERS, card_llama, config_of, generate, generator_of, tiny_llama
from helpers import watch

from measures.metrics import speed
from measures.timed_runs import measure_examples, warm_up
from self_speculation import Request
from self_speculation.backends.runner import ModelRunner
from self_speculation.backends.runners import capture_decoding


def side(tokenizer, model, settings):
    return "", generator_of(tokenizer, model, settings.generation_strategy), settings


@pytest.mark.parametrize(("config", "expected"), [({}, {1: 3}), (LAYERS, {5: 3})])
def test_a_warm_up_runs_every_width_three_times(config, expected, monkeypatch, byte_tokenizer):
    """Guards against a draft length that is not drafted in full, and a warm-up that is longer than needed."""
    calls = watch(monkeypatch, ModelRunner, "run_layers")
    model = tiny_llama(agreement="always")  # all is accepted: the fewest rounds
    settings = config_of(stop_words=["a"], stop_token_ids=list(range(50)), **config)
    warm_up([side(byte_tokenizer, model, settings)], [5, 9, 4, 7] * 100, 1)
    depth = model.config.num_hidden_layers
    longest = config.get("num_speculations", 0)
    seen = [sum(widths) for (*_, widths, _, last), _ in calls if last == depth]
    assert seen[0] == model.config.max_position_embeddings - (3 * (longest + 1) + 1)  # the prompt, cut
    assert {width: seen[1:].count(width) for width in seen[1:]} == expected


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("config", [LAYERS, {"generation_strategy": "adaptive", "prompt_lookup": 2}])
def test_all_the_time_that_an_answer_takes_is_in_its_figure(config, batch_size, byte_tokenizer, monkeypatch):
    """By a clock that passes of the model move. Guards against passes between answers that no figure has."""
    now = [0.0]
    watch(monkeypatch, ModelRunner, "run_layers", lambda *_, **__: now.append(now.pop() + 1.0))
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    model = tiny_llama(vocab_size=len(byte_tokenizer))
    settings = config_of(max_steps=24, **config)
    generator = generator_of(byte_tokenizer, model, settings.generation_strategy)
    requests = deque((index, Request([5, 9, 4, 7, index])) for index in range(3))
    records = [record for _, record in measure_examples([("", generator, settings)], requests, batch_size)]
    assert now[0] > 20
    assert sum(record["wall_time"] for record in records) == now[0]
    assert speed(records)["tokens_per_second"] == sum(record["num_tokens"] for record in records) / now[0]
    if batch_size == 1:
        assert all(r["prefill_time"] + r["decode_time"] == r["wall_time"] for r in records)


@pytest.mark.parametrize("config", [{}, LAYERS], ids=["autoregressive", "self_speculative"])
def test_after_a_warm_up_nothing_is_captured(config, graphs, byte_tokenizer):
    """Guards against a capture inside a timed example, for a shorter draft or a larger cache."""
    model = card_llama(3, max_position_embeddings=4096)
    capture_decoding(model)
    settings = config_of(max_steps=1200, **config)
    warm_up([side(byte_tokenizer, model, settings)], list(range(3, 43)), 1)
    num_captured = len(graphs.captured)
    shared = {"eos": [], "stop_checks": lambda ids: len(ids) > 12, **config}
    for max_steps in (1200, 1, 2, 3, 4, 5, 6, 9):
        generate(model, [5, 9, 4, 7], max_steps=max_steps, **shared)
    assert len(graphs.captured) == num_captured > 0
