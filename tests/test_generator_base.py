"""Text in, text out: which prompts are refused before they are tokenized."""

import random

import pytest

from self_speculation import HuggingfaceLlamaGenerator, make_strategy

TEXTS = [
    "the quick brown fox ",
    "def f(x):\n    return x\n",
    "===",
    "   ",
    "café ",
    "中文字符",
    "🙂",
    "e\u0301",
    "Ġ▁",
]


@pytest.mark.parametrize("kind", ["byte_tokenizer", "sentencepiece_tokenizer"])
def test_only_what_certainly_does_not_fit_is_refused_untokenized(kind, text_model, request, monkeypatch):
    """Guards against a text that fits and is refused: one of the longest tokens, of spaces, of characters
    that are spelled otherwise in a vocabulary. The context is as long as the text, one token shorter, ...
    """
    tokenizer = request.getfixturevalue(kind)
    generator = HuggingfaceLlamaGenerator(tokenizer, text_model, make_strategy("autoregressive"))
    ids = sorted(range(len(tokenizer)), key=lambda i: len(tokenizer.decode([i])))
    texts = [tokenizer.decode(ids[-n:] * 3) for n in (1, 5, 300)] + [text * 200 for text in TEXTS]
    order = random.Random(5)
    texts += ["".join(order.choices(TEXTS, k=100)) for _ in range(20)]
    refused = 0
    for text in texts:
        tokens = len(tokenizer.encode(text, add_special_tokens=False))
        for room in {tokens, tokens - 1, tokens // 2, tokens // 8, tokens // 30} - {0}:
            monkeypatch.setattr("self_speculation.generator_base.context_length", lambda _, room=room: room)
            is_refused = generator.is_far_too_long(text)
            assert not (is_refused and tokens <= room), text
            refused += is_refused
    assert refused > len(texts)


def test_a_text_that_cannot_fit_is_not_tokenized(text_model, byte_tokenizer, monkeypatch):
    """Guards against a second for each 300,000 characters, before the same answer."""
    generator = HuggingfaceLlamaGenerator(byte_tokenizer, text_model, make_strategy("autoregressive"))
    monkeypatch.setattr(
        "transformers.PreTrainedTokenizerFast._encode_plus", lambda *_, **__: pytest.fail("it was tokenized")
    )
    for text in ("all work and no play ", " ", "中文", "🙂"):
        with pytest.raises(ValueError, match="leaves no room in the model's context of 256 tokens"):
            generator.encode((text * 999_000)[:999_000])
