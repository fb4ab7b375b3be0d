"""The program for cards that nobody has tried."""

import json

import pytest
from conftest import card_llama

from benchmarks import first_gpu
from benchmarks.first_gpu import FirstGPUArguments, Tried, try_all


@pytest.mark.usefixtures("graphs")
def test_every_step_works(byte_tokenizer, monkeypatch, capsys):
    """Guards against a step that fails for want of a card to try it on."""
    monkeypatch.setattr(first_gpu, "_REPEATS", 1)
    model = card_llama(vocab_size=len(byte_tokenizer), max_position_embeddings=1024)
    tried = Tried(model, byte_tokenizer, FirstGPUArguments(exit_layer=1, num_speculations=2, max_steps=4))
    try_all(tried, found := {})
    assert [name for name, result in found.items() if "error" in result] == []
    assert not [name for name, result in found.items() if result.get("difference") or result.get("rows")]
    assert found["guided"]["conforms"]
    assert found["capture"]["captures"] > 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line.split(": ", 1)[1]) for line in lines] == [*found.values()]


def test_a_step_that_fails_does_not_end_it(byte_tokenizer, capsys):
    """Guards against an hour on a card that ends at the first fault."""
    tried = Tried(card_llama(vocab_size=len(byte_tokenizer)), byte_tokenizer, FirstGPUArguments())
    tried.steps = lambda: {"first": lambda: 1 / 0, "second": lambda: {"speed": 5}}
    try_all(tried, found := {})
    assert found == {"first": {"error": "ZeroDivisionError: division by zero"}, "second": {"speed": 5}}
    assert capsys.readouterr().out.count("\n") == 2
