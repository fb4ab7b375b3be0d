"""Plain decoding: when tokens are read. What they are is tested with self-speculation, and in batches."""

from types import SimpleNamespace

import pytest
from conftest import generate, tiny_llama
from transformers import MaxLengthCriteria

from self_speculation import autoregressive_generator as generator
from self_speculation.decoding import batch
from self_speculation.transfers import Reading

PROMPT = [5, 9, 4]
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
        (True, {"stopping_criteria": [MaxLengthCriteria(90)]}, IN_TURN),
    ],
)
def test_the_next_pass_is_queued_before_a_read(late, request_, expected, monkeypatch):
    """Guards against a GPU that waits for the host after each token, against passes beyond the last token,
    and against one that is queued although a processor or criterion needs the token first.
    """
    order = []

    def noted(name, function):
        return lambda *args, **kwargs: order.append(name) or function(*args, **kwargs)

    monkeypatch.setattr(batch, "reads_late", lambda device: late)
    monkeypatch.setattr(generator, "forward_early", noted("pass", generator.forward_early))
    monkeypatch.setattr(Reading, "wait", noted("read", Reading.wait))
    generate(tiny_llama(), PROMPT, max_steps=6, **{"eos": [], **request_})
    assert order == expected
