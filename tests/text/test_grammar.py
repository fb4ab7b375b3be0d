"""Guided decoding: the output belongs to the language, whatever drafts."""

import copy
import json
import random

import jsonschema
import pytest
import torch
from conftest import ADAPTIVE, WITHOUT_OPERATORS, generate, mixed_drafts

from self_speculation.text.grammar import Grammar, GrammarError, GrammarProcessor

DRAFTS = {
    "exit": {"exit_layer": 3, "num_speculations": 4},
    "n-grams": {"exit_layer": 3, "num_speculations": 4, "prompt_lookup": 3},
    "four bits": {"exit_layer": 24, "num_speculations": 4, "draft_weights": "int4"},
    "adaptive": ADAPTIVE,
}
if WITHOUT_OPERATORS:
    del DRAFTS["four bits"]


def answer(bundled, grammar, prompt="values = ", max_steps=120, **config):
    model, tokenizer = bundled
    ids = tokenizer.encode(prompt)
    eos = [tokenizer.eos_token_id]
    processor = GrammarProcessor(grammar, tokenizer, model.config.vocab_size, eos)
    result = generate(model, ids, max_steps=max_steps, eos=eos, logits_processors=[processor], **config)
    return result, tokenizer.decode(result.predicted_tokens)


def random_schema(draws, depth=0):
    """A schema of a finite language, so that every answer ends."""
    kinds = ["boolean", "null", "integer", "enum", "string", *(["object", "array"] if depth < 2 else [])]
    kind = draws.choice(kinds)
    if kind == "enum":
        return {"enum": draws.sample(["a", "bc", 1, 2.5, None, True, "x y"], 3)}
    if kind == "integer":
        low = draws.randint(-50, 50)
        return {"type": "integer", "minimum": low, "maximum": low + draws.randint(0, 500)}
    if kind == "string":
        return {"type": "string", "maxLength": draws.randint(0, 6)}
    if kind == "array":
        return {"type": "array", "items": random_schema(draws, depth + 1), "maxItems": draws.randint(0, 3)}
    if kind == "object":
        names = draws.sample(["id", "name", "size", "left", "right"], draws.randint(1, 3))
        return {
            "type": "object",
            "properties": {name: random_schema(draws, depth + 1) for name in names},
            "required": names,
            "additionalProperties": False,
        }
    return {"type": kind}


@mixed_drafts("exit 3")
@pytest.mark.parametrize(
    "number", [pytest.param(8, id="few"), pytest.param(200, marks=pytest.mark.slow, id="many")]
)
def test_outputs_conform_to_random_schemas(bundled, number):
    """Guards against a grammar that does not roll back with rejected drafts, of every kind."""
    draws = random.Random(number)
    for turn in range(number):
        schema = random_schema(draws)
        grammar = Grammar.json_schema(schema)
        plain, text = answer(bundled, grammar, max_steps=400)
        jsonschema.validate(json.loads(text), schema)
        kinds = DRAFTS if number > 8 else [list(DRAFTS)[turn % len(DRAFTS)]]
        for kind in kinds:
            drafted, _ = answer(bundled, grammar, max_steps=400, **DRAFTS[kind])
            assert drafted.predicted_tokens == plain.predicted_tokens, (schema, kind)
            assert drafted.stop_reason == plain.stop_reason == "eos"
        sampled = set()
        for drafts in ({}, DRAFTS["exit"]):
            torch.manual_seed(turn)
            _, text = answer(bundled, grammar, sample=True, temperature=1.5, max_steps=400, **drafts)
            sampled.add(text)
        assert len(sampled) == 1
        jsonschema.validate(json.loads(text), schema)


def test_json_has_little_white_space(bundled):
    """Guards against an answer that is mostly line breaks, and against forms of JSON that models write."""
    model, tokenizer = bundled
    end = tokenizer.eos_token_id
    processor = GrammarProcessor(
        Grammar.json_schema({"type": "object"}), tokenizer, model.config.vocab_size, [end]
    )

    def is_allowed(text):
        ids = [*tokenizer.encode(text, add_special_tokens=False), end]
        return processor.count_allowed([], ids) == len(ids)

    value = {"a": [1, {"b": "c"}], "d": {}}
    for options in ({}, {"separators": (",", ":")}, {"indent": 1}, {"indent": 4}, {"indent": "\t"}):
        assert is_allowed(json.dumps(value, **options))
    for text in ('{\n\n"a": 1}', '{"a":  1}', '{"a": 1\n\n}', '{"a": \n1}', "{}\n\n"):
        assert not is_allowed(text), text


def test_a_schema_is_an_object():
    """Guards against a traceback. test_guided.py has schemas that are invalid."""
    with pytest.raises(GrammarError, match="must be an object"):
        Grammar.json_schema("[1]")


@pytest.mark.parametrize("drafts", DRAFTS)
@pytest.mark.parametrize("text", ["start: x\nx: x", 'start: "ab" x\nx: x'], ids=["at once", "after a text"])
def test_a_grammar_that_matches_nothing(bundled, text, drafts):
    """Guards against an output that ends there as if it were valid."""
    with pytest.raises(GrammarError, match="matches nothing"):
        answer(bundled, Grammar.lark(text), **DRAFTS[drafts])


@pytest.mark.parametrize("drafts", DRAFTS)
def test_an_output_that_the_grammar_forbids_is_an_error(bundled, monkeypatch, drafts):
    """Guards against free text after a token that the mask allows and the matcher does not take."""
    every = bytes([255] * (bundled[0].config.vocab_size // 8 + 8))
    monkeypatch.setattr("self_speculation.text.grammar._bitmask", lambda matcher: every)
    with pytest.raises(GrammarError, match="a token that the grammar forbids"):
        answer(bundled, Grammar.regex("[0-9]+ apples"), max_steps=20, **DRAFTS[drafts])


def test_a_grammar_has_tokens_that_were_added_after_the_first_one(bundled):
    """Guards against a grammar that is read with the tokens that there were, so that a new one is unknown."""
    tokenizer = copy.deepcopy(bundled[1])
    size = len(tokenizer) + 8
    eos = [tokenizer.eos_token_id]
    with pytest.raises(GrammarError):
        GrammarProcessor(Grammar.lark("start: <|tool|>"), tokenizer, size, eos)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    processor = GrammarProcessor(Grammar.lark("start: <|tool|>"), tokenizer, size, eos)
    allowed = processor.masked([], torch.zeros(1, size)).isfinite().nonzero()[:, 1].tolist()
    assert allowed == [tokenizer.convert_tokens_to_ids("<|tool|>")]


def test_a_processor_counts_the_allowed_tokens_of_a_draft(bundled):
    """Guards against verifying what the grammar rejects, and against a matcher that a draft led nowhere."""
    model, tokenizer = bundled
    grammar = Grammar.lark('start: "ab" x | "left" | "right"\nx: x')
    processor = GrammarProcessor(grammar, tokenizer, model.config.vocab_size, [tokenizer.eos_token_id])
    dead, right, wrong = (
        tokenizer.encode(text, add_special_tokens=False) for text in ("ab", "right", " = 1")
    )
    with pytest.raises(GrammarError, match="matches nothing"):
        processor.masked(dead, torch.zeros(1, model.config.vocab_size))
    for output, draft, allowed in (
        (dead, right, 0),
        ([], right, len(right)),
        ([], wrong, 0),
        ([], [*right[:1], *wrong], 1),
        (wrong, right, 0),  # no output of this grammar
        ([], right, len(right)),
    ):
        assert processor.count_allowed(output, draft) == allowed
