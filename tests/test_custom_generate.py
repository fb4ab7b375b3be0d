"""self_speculative_generate: what `generate` of transformers returns, by drafts and verifications."""

import itertools

import pytest
import torch
from conftest import EOS, tiny_llama
from distributions import PROMPT as SAMPLED_PROMPT
from distributions import STEPS, config, expected, p_value
from distributions import model as sampled_model
from transformers import DynamicCache, TextStreamer, pipeline

import self_speculation.self_speculation_generator as self_speculation_generator
from self_speculation import self_speculative_generate

PROMPT = torch.tensor([[5, 9, 4, 7, 7, 3]])
SPECULATION = {"custom_generate": self_speculative_generate, "exit_layer": 2, "num_speculations": 3}


@pytest.fixture
def rounds(monkeypatch):
    """Draft lengths that were verified: proof that it was not transformers' own loop."""
    seen = []
    verify = self_speculation_generator.verify_draft
    monkeypatch.setattr(
        self_speculation_generator,
        "verify_draft",
        lambda draft, *rest: seen.append(draft.shape[1]) or verify(draft, *rest),
    )
    return seen


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_length": 11},
        {"repetition_penalty": 1.7, "min_new_tokens": 9},
        {"no_repeat_ngram_size": 1, "eos_token_id": [EOS, 11, 30]},
        {"bad_words_ids": [[7]], "suppress_tokens": [4, 8]},
        {"return_dict_in_generate": True},
    ],
)
def test_greedy_ids_are_those_of_generate(options, rounds):
    """Guards against a config, a processor or an end id that is not honoured."""
    options = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0, **options}
    if "max_length" in options:
        del options["max_new_tokens"]
    model = tiny_llama()
    theirs, ours = model.generate(PROMPT, **options), model.generate(PROMPT, **options, **SPECULATION)
    if options.get("return_dict_in_generate"):
        theirs, ours = theirs.sequences, ours.sequences
    assert ours.tolist() == theirs.tolist()
    assert rounds


def test_a_padded_batch_is_its_rows():
    """Guards against padding that is taken for text, and rows that end at different lengths."""
    model = tiny_llama()
    batch = torch.tensor([[0, 0, 5, 9, 4, 7], [8, 3, 11, 7, 7, 3]])
    options = {"attention_mask": batch.ne(0).long(), "do_sample": False, "max_new_tokens": 12}
    single = model.generate(batch[:1, 2:], do_sample=False, max_new_tokens=12, eos_token_id=None)[
        0, 4:
    ].tolist()
    ends = {"eos_token_id": single[2], "pad_token_id": 0}
    expected = model.generate(batch, **options, **ends)
    assert model.generate(batch, **options, **ends, **SPECULATION).tolist() == expected.tolist()


def test_stop_strings_and_a_streamer(byte_tokenizer, text_model, capsys):
    """Guards against a streamer that only sees the prompt, which is all that transformers hands on."""
    ids = byte_tokenizer("Once upon a time", return_tensors="pt").input_ids
    plain = text_model.generate(ids, do_sample=False, max_new_tokens=12)
    streamer = TextStreamer(byte_tokenizer, skip_prompt=True)
    options = {"do_sample": False, "max_new_tokens": 12, "streamer": streamer, **SPECULATION}
    assert text_model.generate(ids, **options).tolist() == plain.tolist()
    assert capsys.readouterr().out == byte_tokenizer.decode(plain[0, ids.shape[1] :]) + "\n"


def test_stopping_criteria_are_asked():
    stop_after = [lambda ids, scores, **_: torch.tensor([ids.shape[1] >= 10])]
    new = tiny_llama().generate(
        PROMPT,
        do_sample=False,
        max_new_tokens=20,
        eos_token_id=None,
        stopping_criteria=stop_after,
        **SPECULATION,
    )
    assert new.shape[1] == 10


def test_sampling_is_from_the_distribution_that_generate_prepared():
    """Guards against a temperature or a top-k applied twice or never. False alarms: 1e-4, fixed seed; that
    500 samples are enough is shown by the last line, which tells a temperature of 0.7 from one of 1.
    """
    settings = {"temperature": 0.7, "top_k": 3}
    torch.manual_seed(0)
    counts = {}
    speculation = {"custom_generate": self_speculative_generate, "exit_layer": 1, "num_speculations": 2}
    prompts = torch.tensor([SAMPLED_PROMPT]).expand(500, -1)
    outputs = sampled_model().generate(
        prompts, do_sample=True, max_new_tokens=STEPS, **settings, **speculation
    )
    for row in outputs[:, len(SAMPLED_PROMPT) :].tolist():
        counts[tuple(row)] = counts.get(tuple(row), 0) + 1
    assert p_value(counts, expected(config(**settings), [])) > 1e-4
    hotter = expected(config(temperature=1.0, top_k=3), [])
    assert (
        p_value(
            {key: counts.get(key, 0) for key in itertools.product(range(5), repeat=3) if hotter[key]}, hotter
        )
        < 1e-4
    )


def test_every_strategy_and_source_of_drafts():
    model = tiny_llama(fused=True)
    plain = model.generate(PROMPT, do_sample=False, max_new_tokens=20).tolist()
    chosen = {"generation_strategy": "adaptive", "exit_layer": -1, "num_speculations": -1}
    lookup = {"draft_weights": "int8", "draft_confidence": "auto", "prompt_lookup": 2}
    for options in (chosen, lookup):
        assert (
            model.generate(PROMPT, do_sample=False, max_new_tokens=20, **{**SPECULATION, **options}).tolist()
            == plain
        )


def test_in_a_pipeline(model_folder, rounds):
    generate = pipeline("text-generation", str(model_folder))
    options = {"do_sample": False, "max_new_tokens": 10}
    assert generate("def add", **options, **SPECULATION) == generate("def add", **options)
    assert rounds


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "num_beams: beam search"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores: is not kept"),
        ({"exit_layer": 4}, "exit_layer 4: must be between 1 and 3"),
        ({"num_speculations": -1}, "num_speculations -1: self_speculative needs at least 1"),
    ],
)
def test_what_cannot_be_done_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_llama().generate(PROMPT, **{"max_new_tokens": 4, **SPECULATION, **options})


def test_a_cache_that_holds_something_is_refused():
    model, cache = tiny_llama(), DynamicCache()
    model(PROMPT, cache=cache)
    longer = torch.cat([PROMPT, PROMPT], 1)
    with pytest.raises(ValueError, match="cache: must be empty"):
        model.generate(longer, cache=cache, max_new_tokens=4, **SPECULATION)
