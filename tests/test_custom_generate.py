"""`self_speculative_generate` returns the ids that `generate` of transformers returns."""

import math
from unittest.mock import Mock

import pytest
import torch
import transformers
from conftest import in_batch, tiny_llama
from helpers import watch
from transformers import (
    DynamicCache,
    EosTokenCriteria,
    LogitsProcessor,
    MaxLengthCriteria,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
    pipeline,
)
from transformers import GenerationConfig as TransformersConfig

import self_speculation.self_speculation_generator as self_speculation_generator
from self_speculation import Request, SpeculativeTextStreamer, self_speculative_generate

PROMPT = torch.tensor([[5, 9, 4, 7, 7, 3]])
SPECULATION = {"custom_generate": self_speculative_generate, "exit_layer": 2, "num_speculations": 3}


@pytest.fixture
def rounds(monkeypatch):
    """The draft lengths that were verified; empty if transformers' loop has run."""
    seen = []
    module = self_speculation_generator
    watch(monkeypatch, module, "leading_matches", lambda *given: seen.extend(given[2]))
    return seen


def ends_by_last_id(ids, *_, **__):
    return (ids[:, -1] % 5 == 0) & (ids.shape[1] > 8)


def only_even_ones(_, ids):
    return list(range(0, 50, 2)) if len(ids) % 3 else list(range(50))


ONE = {"do_sample": True, "top_k": 1}  # one token can be drawn
# Fields of the generation config and other arguments of `generate`.
COMPARED = [
    {"max_new_tokens": None, "max_length": 11},
    {"min_length": 14, "eos_token_id": list(range(2, 30))},
    {"min_new_tokens": 9, "eos_token_id": list(range(2, 30))},
    {"eos_token_id": 19},
    {"eos_token_id": [19, 11, 30]},
    {"eos_token_id": [19, 11, 30], "pad_token_id": None},
    {"stopping_criteria": [EosTokenCriteria(11), MaxLengthCriteria(12)], "eos_token_id": 30},
    {"stopping_criteria": [MaxLengthCriteria(0)]},
    {"stopping_criteria": [MaxLengthCriteria(15), MaxLengthCriteria(9)]},
    {"stopping_criteria": [ends_by_last_id], "eos_token_id": None},
    {"stopping_criteria": [lambda ids, scores, **_: ids.shape[1] >= 9]},
    {"max_time": 1000.0},
    {"repetition_penalty": 1.7},
    {"no_repeat_ngram_size": 1},
    {"bad_words_ids": [[7], [0, 5]]},
    {"sequence_bias": [[[11], 3.0], [[0, 5], -9.0]]},
    {"renormalize_logits": True, "remove_invalid_values": True},
    {"forced_bos_token_id": 9, "forced_eos_token_id": 4},
    {"exponential_decay_length_penalty": (3, 1.4)},
    {"suppress_tokens": [4, 8]},
    {"begin_suppress_tokens": list(range(10, 50))},
    {"watermarking_config": WatermarkingConfig(bias=6.0, seeding_scheme="selfhash", context_width=8)},
    {**ONE, "temperature": 0.5},
    {"encoder_repetition_penalty": 1.7},
    {"encoder_no_repeat_ngram_size": 1},
    {"prefix_allowed_tokens_fn": only_even_ones},
    {**ONE, "top_p": 0.9, "min_p": 0.1, "epsilon_cutoff": 1e-3, "eta_cutoff": 1e-3},
    {**ONE, "top_h": 0.4},
    {**ONE, "typical_p": 0.5},
    {"return_dict_in_generate": True},
    {"use_cache": False},
    {"cache_implementation": "static", "max_cache_len": 64, "disable_compile": True},
    {"prefill_chunk_size": 2, "num_beams": 1, "low_memory": True, "output_scores": True},
]  # fmt: skip


@pytest.mark.parametrize("options", COMPARED, ids=lambda options: "-".join(options))
def test_ids_are_those_of_generate(options, rounds):
    """Guards against an argument without effect, or applied twice."""
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, **options}
    theirs, ours = (tiny_llama().generate(PROMPT, **options, **more) for more in ({}, SPECULATION))
    if options.get("return_dict_in_generate"):
        theirs, ours = theirs.sequences, ours.sequences
    assert ours.tolist() == theirs.tolist()
    assert rounds or theirs.shape[1] == PROMPT.shape[1] + 1


SYNTH_ID = SynthIDTextWatermarkingConfig(ngram_len=3, keys=[1, 2])
REFUSED = [
    ({"num_beams": 2}, "num_beams: beam search"),
    ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha: is another decoding method"),
    ({"dola_layers": "high"}, "dola_layers: is another decoding method"),
    ({"force_words_ids": [[4]], "constraints": [4], "num_beams": 2}, "num_beams: "),
    ({"assistant_ensemble_weight": 0.5}, "assistant_ensemble_weight: is another decoding method"),
    ({"cache_implementation": "quantized"}, "cache_implementation quantized: "),
    ({"guidance_scale": 1.5}, "guidance_scale: its logits processor keeps a state"),
    ({"watermarking_config": SYNTH_ID}, r"watermarking_config \("),
    ({"output_scores": True, "return_dict_in_generate": True}, "output_scores: is not computed"),
    ({"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]])}, "attention_mask: one prompt needs no padding"),
    ({"position_ids": torch.arange(6)[None] + 2}, "position_ids: must be those from 0"),
    ({"do_sample": True, "num_return_sequences": 3}, "takes one prompt, not 3"),
    ({"labels": PROMPT}, "labels: does not reach the model"),
    ({"cache": DynamicCache()}, "cache: is neither read nor filled"),
    ({"exit_layer": 4}, "exit_layer 4: must be between 1 and 3"),
    ({"num_speculations": -1}, "num_speculations: self_speculative needs at least 1"),
    ({"inputs": None, "inputs_embeds": torch.zeros(1, 6, 32)}, "inputs_embeds: prompts must be token ids"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_arguments_that_would_change_the_ids_are_refused(options, message, monkeypatch):
    """Guards against an argument that is ignored without a word."""
    # This class needs a library that is not installed.
    monkeypatch.setattr("transformers.generation.utils.QuantizedCache", lambda *_, **__: None)
    with pytest.raises(ValueError, match=message):
        tiny_llama().generate(**{"inputs": PROMPT, "max_new_tokens": 4, **SPECULATION, **options})


def test_every_field_of_the_config_is_compared_refused_or_irrelevant():
    """Guards against a field of a later transformers that no test covers."""
    tried = {name for options in [*COMPARED, *(options for options, _ in REFUSED)] for name in options}
    tried |= {*SPECULATION, "output_logits", "output_attentions", "output_hidden_states"}
    of_beams = {"early_stopping", "length_penalty", "diversity_penalty", "num_beam_groups"}
    of_drafts = {
        "use_mtp", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
        "assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size",
        "assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "speculation_type",
    }  # fmt: skip
    of_speed = {"cache_config", "compile_config", "continuous_batching_config"}
    of_other_models = {"bos_token_id", "decoder_start_token_id", "transformers_version"}
    # `generate` itself refuses both with a callable.
    for name in (refused := {"stop_strings", "token_healing"}):
        with pytest.raises(ValueError, match="tokenizer"):
            tiny_llama().generate(PROMPT, tokenizer=object(), **{name: "a"}, max_new_tokens=4, **SPECULATION)
    fields = {name for name in vars(TransformersConfig()) if not name.startswith("_")}
    assert fields - tried - of_beams - of_drafts - of_speed - of_other_models - refused == set()


class Listener:
    """A streamer of transformers that keeps the calls."""

    def __init__(self):
        self.calls = []

    def put(self, ids):
        self.calls.append(ids.tolist())

    def end(self):
        self.calls.append("end")


@pytest.mark.parametrize("end_ids", [None, list(range(40))])
def test_a_streamer_gets_the_calls_of_generate(end_ids):
    """Guards against several tokens in one call, and against an end id that the streamer does not get."""
    ours, theirs = Listener(), Listener()
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": end_ids, "pad_token_id": 0}
    tiny_llama().generate(PROMPT, streamer=theirs, **options)
    tiny_llama().generate(PROMPT, streamer=ours, **options, **SPECULATION)
    assert ours.calls == theirs.calls
    assert len(ours.calls) > 2


def test_text_of_a_streamer_of_drafts(byte_tokenizer, text_model, capsys):
    """Guards against a streamer that prints the prompt, drafts, or nothing."""
    ids = byte_tokenizer("Once upon a time", return_tensors="pt").input_ids
    options = {"do_sample": False, "max_new_tokens": 12}
    plain = text_model.generate(ids, **options)
    options |= {"streamer": SpeculativeTextStreamer(byte_tokenizer), **SPECULATION}
    assert text_model.generate(ids, **options).tolist() == plain.tolist()
    assert capsys.readouterr().out == byte_tokenizer.decode(plain[0, ids.shape[1] :]) + "\n"


def test_the_streamer_is_read_from_the_frame_of_generate():
    """If this fails, transformers passes the streamer on, and `_generate_streamer` can go."""
    caught = Mock(return_value=PROMPT)
    tiny_llama().generate(PROMPT, custom_generate=caught, max_new_tokens=4, streamer=Listener())
    assert caught.call_args.kwargs.get("streamer") is None


def test_an_output_ends_with_the_context():
    """Guards against positions that the model does not have, and an end without a word."""
    model = tiny_llama(max_position_embeddings=10)
    options = {"do_sample": False, "eos_token_id": None}
    expected = model.generate(PROMPT, max_new_tokens=4, **options)
    with pytest.warns(UserWarning, match="ends with the model's context"):
        assert (
            model.generate(PROMPT, max_new_tokens=20, **options, **SPECULATION).tolist() == expected.tolist()
        )


@pytest.mark.parametrize("drafts", [SPECULATION, {"generation_strategy": "adaptive"}])
def test_sampled_ids_are_those_of_the_strategies(drafts):
    """Guards against settings that are applied twice or never."""
    rules = {"temperature": 0.7, "top_k": 3}
    options = {"do_sample": True, "max_new_tokens": 12, "top_p": 1.0}
    torch.manual_seed(0)
    request = Request(PROMPT[0].tolist(), seed=int(torch.randint(2**63 - 1, ())), eos_token_ids=[2])
    plain = in_batch(tiny_llama(), [request], 1, sample=True, top_p=1.0, max_steps=12, **rules)[0]
    torch.manual_seed(0)
    drafts = {"custom_generate": self_speculative_generate, **drafts}
    found = tiny_llama().generate(PROMPT, **options, **rules, **drafts)[0, PROMPT.shape[1] :].tolist()
    assert found[: len(plain.predicted_tokens)] == plain.predicted_tokens


RULES = {"temperature": 0.7, "top_k": 20, "top_p": 0.9}


@pytest.mark.parametrize(
    ("options", "num_calls"),
    [
        (RULES, 0),
        ({"top_k": 0, "min_p": 0.05}, 0),
        ({**RULES, "typical_p": 0.9}, 4),  # a rule that the sampler lacks is the last one
        ({**RULES, "repetition_penalty": 1.2}, 1),
        (
            {**RULES, "stopping_criteria": [lambda ids, scores, **_: bool((scores == -math.inf).sum() < 20)]},
            3,
        ),
    ],
    ids=["all", "min_p", "typical_p", "repetition_penalty", "criterion"],
)
def test_the_last_processors_are_rules_of_the_sampler(options, num_calls, monkeypatch):
    """Guards against a sort of the vocabulary for each drafted token, against a rule that is left out or that
    comes in another order, and against a criterion that sees logits without them.
    """
    model = tiny_llama(agreement="often")
    kinds = [
        kind
        for kind in vars(transformers.generation.logits_process).values()
        if isinstance(kind, type) and "__call__" in vars(kind) and issubclass(kind, LogitsProcessor)
    ]
    called = set()
    for kind in kinds:
        watch(monkeypatch, kind, "__call__", lambda processor, *_, **__: called.add(type(processor)))

    def ids():
        torch.manual_seed(5)
        given = {"max_new_tokens": 12, "do_sample": True, "eos_token_id": None, **options}
        return model.generate(PROMPT, pad_token_id=0, **SPECULATION, **given).tolist()

    found = ids()
    assert len(called) == num_calls
    monkeypatch.setattr("self_speculation.custom_generate._RULES", {})
    assert ids() == found


def test_assistant_early_exit_and_num_assistant_tokens(rounds):
    """Guards against transformers' names for exit layer and draft length that are refused, have no effect
    or override ours.
    """
    model = tiny_llama()
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    plain = model.generate(PROMPT, **options).tolist()
    options |= {"custom_generate": self_speculative_generate, "num_assistant_tokens": 3}
    options["assistant_early_exit"] = 9
    with pytest.raises(ValueError, match="exit_layer 9: must be between 1 and 3"):
        model.generate(PROMPT, **options)
    for settings, longest in (
        ({"assistant_early_exit": 1}, 3),
        ({"exit_layer": 2, "num_speculations": 2}, 2),
    ):
        rounds.clear()
        assert model.generate(PROMPT, **{**options, **settings}).tolist() == plain
        assert max(rounds) == longest
    assert model.generate(PROMPT, **options, generation_strategy="adaptive").tolist() == plain


def test_in_a_pipeline(model_folder, rounds):
    """Guards against arguments that a pipeline does not pass on."""
    generate = pipeline("text-generation", str(model_folder))
    options = {"do_sample": False, "max_new_tokens": 10}
    assert generate("def add", **options, **SPECULATION) == generate("def add", **options)
    assert rounds
