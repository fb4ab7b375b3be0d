"""Log-probabilities of tokens that are parts of characters, without a server."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from self_speculation.text.texts import continuation
from serving.streaming import LogprobCollector

PROMPT = "Once upon"


@pytest.mark.parametrize("name", ["byte_tokenizer", "sentencepiece_tokenizer"])
@settings(max_examples=30)
@given(text=st.text(st.sampled_from(" aef.éß日🙂🙃ア"), min_size=1, max_size=12))
def test_bytes_and_offsets_of_parts_of_characters(request, name, text):
    """The bytes of all tokens are those of the text, and each offset is a character's. Guards against tokens
    after an emoji that a stop word cuts off, since each byte counted as a character.
    """
    tokenizer = request.getfixturevalue(name)
    prompt = tokenizer.encode(PROMPT)
    ids = tokenizer.encode(PROMPT + text)
    ids = ids[len(prompt) :] if ids[: len(prompt)] == prompt else tokenizer.encode(text)
    collector = LogprobCollector(tokenizer, 2)
    logits = torch.linspace(0, 9, len(tokenizer))[None]
    for i in range(len(ids)):
        history = torch.tensor([[*prompt, *ids[: i + 1]]])
        assert not collector(history, logits)
    answer = continuation(tokenizer, prompt, ids)
    tokens = collector.take(len(answer))
    assert [token.chosen["logprob"] for token in tokens] == logits.log_softmax(-1)[0, ids].tolist()
    found = [bytes(token.chosen["bytes"]) for token in tokens]
    assert b"".join(found) == answer.encode()
    for i, token in enumerate(tokens):
        assert token.offset == len(b"".join(found[:i]).decode(errors="ignore"))
