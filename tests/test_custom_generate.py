"""self_speculative_generate: what `generate` of transformers returns, by drafts and verifications."""

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_llama
from distributions import PROMPT as SAMPLED_PROMPT
from distributions import STEPS, config, expected, p_value
from distributions import model as sampled_model
from transformers import (
    DynamicCache,
    EosTokenCriteria,
    LogitsProcessor,
    MaxLengthCriteria,
    StopStringCriteria,
    SynthIDTextWatermarkingConfig,
    TextStreamer,
    WatermarkingConfig,
    pipeline,
)
from transformers import GenerationConfig as TransformersConfig

import self_speculation.self_speculation_generator as self_speculation_generator
from self_speculation import SpeculativeTextStreamer, self_speculative_generate
from self_speculation.model.model_runner import ModelRunner

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


class AddsByRow(LogitsProcessor):
    """A caller's own: something else in each row of the batch, and told by the padding."""

    def __call__(self, input_ids, scores):
        row = torch.arange(len(scores))
        scores[row, 7 + row] += 9.0 * input_ids.eq(0).any(-1)
        return scores


def ends_rows_apart(ids, scores, **_):
    assert scores is None  # as `generate` has it
    return torch.arange(len(ids)) + ids.shape[1] >= 15


def only_even_ones(row, ids):
    return list(range(row % 2, 50, 2)) if len(ids) % 3 else list(range(50))


# Fields of the generation config, and what else `generate` takes. With top_k 1 a draw is no lottery.
ONE = {"do_sample": True, "top_k": 1}
COMPARED = [
    {"max_new_tokens": None, "max_length": 11},
    {"min_length": 14, "eos_token_id": list(range(2, 30))},
    {"min_new_tokens": 9, "eos_token_id": list(range(2, 30))},
    {"eos_token_id": 19},
    {"eos_token_id": [19, 11, 30]},
    {"eos_token_id": (19, 11, 30)},
    {"eos_token_id": torch.tensor(19)},
    {"eos_token_id": torch.tensor([19, 11, 30])},
    {"eos_token_id": [19, 11, 30], "pad_token_id": None},
    {"eos_token_id": [19, 11, 30], "pad_token_id": torch.tensor(5)},
    {"stopping_criteria": [EosTokenCriteria(11), MaxLengthCriteria(12)], "eos_token_id": 30},
    {"stopping_criteria": [MaxLengthCriteria(3)]},
    {"stopping_criteria": [MaxLengthCriteria(0)]},
    {"stopping_criteria": [MaxLengthCriteria(15), MaxLengthCriteria(9)]},
    {"stopping_criteria": [ends_rows_apart]},
    {"stopping_criteria": [lambda ids, scores, **_: ids.shape[1] >= 9]},
    {"max_time": 1000.0},
    {"repetition_penalty": 1.7},
    {"encoder_repetition_penalty": 1.7},
    {"no_repeat_ngram_size": 1},
    {"encoder_no_repeat_ngram_size": 1},
    {"bad_words_ids": [[7], [0, 5]]},
    {"sequence_bias": [[[11], 3.0], [[0, 5], -9.0]]},
    {"renormalize_logits": True, "remove_invalid_values": True},
    {"forced_bos_token_id": 9, "forced_eos_token_id": 4},
    {"exponential_decay_length_penalty": (3, 1.4)},
    {"suppress_tokens": [4, 8]},
    {"begin_suppress_tokens": list(range(10, 50))},
    {"watermarking_config": WatermarkingConfig(bias=6.0, seeding_scheme="lefthash")},
    {"watermarking_config": WatermarkingConfig(bias=6.0, seeding_scheme="selfhash", context_width=8)},
    {"prefix_allowed_tokens_fn": only_even_ones},
    {"logits_processor": [AddsByRow()]},
    {**ONE, "temperature": 0.5, "num_return_sequences": 3, "prefix_allowed_tokens_fn": only_even_ones},
    {**ONE, "top_p": 0.9, "min_p": 0.1, "epsilon_cutoff": 1e-3, "eta_cutoff": 1e-3},
    {**ONE, "top_h": 0.4},
    {**ONE, "typical_p": 0.5},
    {"return_dict_in_generate": True},
    {"use_cache": False},
    {"cache_implementation": "static", "max_cache_len": 64, "disable_compile": True},
    {"prefill_chunk_size": 2, "num_beams": 1, "low_memory": True, "output_scores": True},
]  # fmt: skip
PADDED = torch.tensor([[0, 0, 5, 9, 4, 7], [8, 3, 11, 7, 7, 3], [0, 0, 0, 0, 5, 4]])


@pytest.mark.parametrize("options", COMPARED, ids=lambda options: "-".join(options))
@pytest.mark.parametrize("batch", [PROMPT, PADDED], ids=["one", "padded"])
def test_ids_are_those_of_generate(batch, options, rounds):
    """Guards against an argument that is not honoured, padding that is taken for text by the model, or kept
    from processors and criteria, and rows that end at different lengths.
    """
    options = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, **options}
    model = tiny_llama()
    options["attention_mask"] = batch.ne(0).long()
    theirs, ours = model.generate(batch, **options), model.generate(batch, **options, **SPECULATION)
    if options.get("return_dict_in_generate"):
        theirs, ours = theirs.sequences, ours.sequences
    assert ours.tolist() == theirs.tolist()
    assert rounds or theirs.shape[1] == batch.shape[1] + 1


def names(*allowed):
    """`prefix_allowed_tokens_fn` by which a row may say one of the names that are allowed in it, and raises
    behind each.
    """

    def following(row, ids):
        said = ids.tolist()[6:]
        of_row = [name for name in allowed[row % len(allowed)] if name[: len(said)] == said]
        return [name[len(said)] for name in of_row]  # behind a name: IndexError; where there is none: []

    return following


@pytest.mark.parametrize("batch", [PROMPT, PADDED], ids=["one", "padded"])
@pytest.mark.parametrize("sampling", [{}, ONE], ids=["greedy", "sampled"])
def test_what_may_follow_a_name_is_asked_only_where_the_text_gets(sampling, batch, rounds):
    """Guards against an answer that fails because of a guess behind its end id, or because of what a row may
    say at the index of another row.
    """
    allowed = [[11, 12, 2], [13, 14, 15, 2]], [[21, 2, 7]], [[31, 32, 33, 34]]
    options = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0, **sampling}
    options["attention_mask"] = batch.ne(0).long()
    theirs = [  # one by one: in a batch it asks what may follow the padding after an end, too
        tiny_llama()
        .generate(
            prompt[None],
            **{**options, "attention_mask": mask[None]},
            prefix_allowed_tokens_fn=names(allowed[row]),
        )[0]
        .tolist()
        for row, (prompt, mask) in enumerate(zip(batch, options["attention_mask"], strict=True))
    ]
    ours = tiny_llama().generate(batch, **options, prefix_allowed_tokens_fn=names(*allowed), **SPECULATION)
    assert [row[: len(their)] for row, their in zip(ours.tolist(), theirs, strict=True)] == theirs
    assert rounds
    with pytest.raises((IndexError, ValueError)):  # no end id, so that the text gets behind the names
        tiny_llama().generate(
            batch, **{**options, "eos_token_id": 40, "max_new_tokens": 6},
            prefix_allowed_tokens_fn=names(*allowed), **SPECULATION,
        )  # fmt: skip


SYNTH_ID = SynthIDTextWatermarkingConfig(ngram_len=3, keys=[1, 2])
REFUSED = [
    ({"num_beams": 2}, "num_beams: beam search"),
    ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha: is another decoding method"),
    ({"dola_layers": "high"}, "dola_layers: is another decoding method"),
    ({"force_words_ids": [[4]], "num_beams": 2}, "num_beams: "),
    ({"constraints": [4], "num_beams": 2}, "num_beams: "),
    ({"assistant_ensemble_weight": 0.5}, "assistant_ensemble_weight: is another decoding method"),
    ({"cache_implementation": "quantized"}, "cache_implementation quantized: "),
    ({"guidance_scale": 1.5}, "guidance_scale: its logits processor keeps a state"),
    ({"watermarking_config": SYNTH_ID}, r"watermarking_config \("),
    ({"output_scores": True, "return_dict_in_generate": True}, "output_scores: is not computed"),
    ({"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]])}, "attention_mask: padding must be on the left"),
    ({"position_ids": torch.arange(6)[None] + 2}, "position_ids: must be those that follow"),
    ({"labels": PROMPT}, "labels: does not reach the model"),
    ({"exit_layer": 4}, "exit_layer 4: must be between 1 and 3"),
    ({"num_speculations": -1}, "num_speculations: self_speculative needs at least 1"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_cannot_be_equal_is_refused(options, message, monkeypatch):
    """Guards against an argument that is silently ignored."""
    monkeypatch.setattr(
        "transformers.generation.utils.QuantizedCache", lambda *_, **__: None
    )  # not installed
    with pytest.raises(ValueError, match=message):
        tiny_llama().generate(PROMPT, **{"max_new_tokens": 4, **SPECULATION, **options})


def test_embeddings_and_batches_for_a_streamer_or_with_joint_ends_are_refused():
    model = tiny_llama()
    criteria = [lambda ids, scores: ids.shape[1] > 8]
    with pytest.raises(ValueError, match="stopping_criteria: in a batch without eos_token_id"):
        model.generate(
            PROMPT.repeat(2, 1),
            max_new_tokens=4,
            eos_token_id=None,
            stopping_criteria=criteria,
            **SPECULATION,
        )
    embeddings = model.get_input_embeddings()(PROMPT)
    with pytest.raises(ValueError, match="inputs_embeds: prompts must be token ids"):
        model.generate(inputs_embeds=embeddings, max_new_tokens=4, **SPECULATION)
    streamer = SimpleNamespace(put=lambda ids: None, end=lambda: None)
    with pytest.raises(ValueError, match="streamer: takes one row, not 2"):
        model.generate(PROMPT.repeat(2, 1), max_new_tokens=4, streamer=streamer, **SPECULATION)


def test_every_field_of_the_config_is_compared_refused_or_about_something_else():
    """Guards against a field of a later transformers that nobody has looked at."""
    tried = {name for options in COMPARED for name in options} | {n for o, _ in REFUSED for n in o}
    tried |= {*SPECULATION, "output_logits", "output_attentions", "output_hidden_states"}
    only_for_beams = {"early_stopping", "length_penalty", "diversity_penalty", "num_beam_groups"}
    only_how_to_draft = {
        "use_mtp", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
        "assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size",
        "assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "speculation_type",
    }  # fmt: skip
    only_how_to_run = {"cache_config", "compile_config", "continuous_batching_config"}
    # `generate` itself refuses these two, since it keeps the tokenizer from a callable.
    for name in (stopped_by_generate := {"stop_strings", "token_healing"}):
        with pytest.raises(ValueError, match="tokenizer"):
            tiny_llama().generate(PROMPT, tokenizer=object(), **{name: "a"}, max_new_tokens=4, **SPECULATION)
    not_about_decoders = {"bos_token_id", "decoder_start_token_id", "transformers_version"}
    known = tried | only_for_beams | only_how_to_draft | only_how_to_run | stopped_by_generate
    fields = {name for name in vars(TransformersConfig()) if not name.startswith("_")}
    assert fields - known - not_about_decoders == set()


class Listener:
    """A streamer of transformers that keeps what it is told."""

    def __init__(self):
        self.told = []

    def put(self, ids):
        self.told.append(ids.tolist())

    def end(self):
        self.told.append("end")


@pytest.mark.parametrize("end_ids", [None, list(range(40))])
def test_a_streamer_is_told_what_generate_tells_it(end_ids):
    """Guards against several tokens at once, and an end id that is kept from it."""
    told = []
    for how in ({}, SPECULATION):
        listener = Listener()
        options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": end_ids, "pad_token_id": 0}
        tiny_llama().generate(PROMPT, streamer=listener, **options, **how)
        told.append(listener.told)
    assert told[0] == told[1]
    assert len(told[0]) > 2


def test_text_on_a_streamer(byte_tokenizer, text_model, capsys):
    ids = byte_tokenizer("Once upon a time", return_tensors="pt").input_ids
    plain = text_model.generate(ids, do_sample=False, max_new_tokens=12)
    text = byte_tokenizer.decode(plain[0, ids.shape[1] :])
    for streamer in (TextStreamer(byte_tokenizer, skip_prompt=True), SpeculativeTextStreamer(byte_tokenizer)):
        options = {"do_sample": False, "max_new_tokens": 12, "streamer": streamer, **SPECULATION}
        assert text_model.generate(ids, **options).tolist() == plain.tolist()
        assert capsys.readouterr().out == text + "\n"


def test_stop_strings_by_a_criterion_end_each_row_for_itself(byte_tokenizer, text_model):
    """Guards against a row that ends where another one does, and one that ends in its prompt."""
    tokenizer = copy.deepcopy(byte_tokenizer)
    tokenizer.pad_token, tokenizer.padding_side = "<unk>", "left"
    inputs = tokenizer(["Once upon a time", "def add(", "a"], return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    options = {"do_sample": False, "max_new_tokens": 16, "pad_token_id": 0}
    plain = text_model.generate(**inputs, **options)
    new = plain[:, inputs.input_ids.shape[1] :]
    strings = [tokenizer.decode(new[0, 3:5]), tokenizer.decode(new[1, 6:8])]
    options["stopping_criteria"] = [StopStringCriteria(tokenizer, strings)]
    theirs = text_model.generate(**inputs, **options)
    assert theirs.tolist() != plain.tolist()
    assert text_model.generate(**inputs, **options, **SPECULATION).tolist() == theirs.tolist()


def test_the_streamer_of_another_function_is_none_of_ours():
    """Guards against a variable that is called `streamer`, where nobody has passed one."""
    model, streamer = tiny_llama(), Listener()
    caught = {}

    def keep(model, input_ids, **kwargs):
        caught.update(kwargs, model=model, input_ids=input_ids)
        return input_ids

    model.generate(PROMPT, custom_generate=keep, max_new_tokens=4, do_sample=False)
    self_speculative_generate(**caught, exit_layer=2, num_speculations=3)
    assert streamer.told == []


def test_transformers_does_not_hand_on_the_streamer():
    """If this fails, `_streamer_of_generate` can go: it reads the argument from the frame of `generate`."""
    handed_on = {}

    def callable(_model, input_ids, streamer=None, **_):
        handed_on.update(streamer=streamer)
        return input_ids

    tiny_llama().generate(PROMPT, custom_generate=callable, streamer=Listener(), max_new_tokens=4)
    assert handed_on["streamer"] is None


def test_rows_of_a_batch_end_with_the_context_each_for_itself():
    """Guards against a batch that ends with its longest row."""
    model, options = tiny_llama(), {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    batch = {"inputs": PADDED, "attention_mask": PADDED.ne(0).long()}
    expected = model.generate(**batch, max_new_tokens=8, **options)
    expected[1, 10:], expected[0, 12:] = 0, 0
    small = tiny_llama(max_position_embeddings=10)
    with pytest.warns(UserWarning, match="row [012] ends with the model's context"):
        new = small.generate(**batch, max_new_tokens=20, **options, **SPECULATION)
    assert new.tolist() == expected.tolist()


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
    lookup = {"draft_weights": "int4", "draft_confidence": "auto", "prompt_lookup": 2}
    for options in (chosen, lookup):
        assert (
            model.generate(PROMPT, do_sample=False, max_new_tokens=20, **{**SPECULATION, **options}).tolist()
            == plain
        )


@pytest.mark.parametrize("batch", [PROMPT, PADDED], ids=["one", "padded"])
def test_the_names_that_transformers_has_for_early_exits(batch, monkeypatch, rounds):
    """Guards against a call for drafts of transformers that, with one argument more, is refused or drafts by
    another exit, and against its default length in place of one that is given.
    """
    exits, run = [], ModelRunner.run

    def watch(self, inputs, first, last, num_logits):
        exits.append(last)
        return run(self, inputs, first, last, num_logits)

    monkeypatch.setattr(ModelRunner, "run", watch)
    model, options = tiny_llama(), {"attention_mask": batch.ne(0).long(), "pad_token_id": 0}
    options |= {"do_sample": False, "max_new_tokens": 12}
    plain = model.generate(batch, **options).tolist()
    theirs = {"assistant_early_exit": 1, "num_assistant_tokens": 3}
    ours = {"custom_generate": self_speculative_generate}
    for own, exit_layer, longest in (({}, 1, 3), ({"exit_layer": 2, "num_speculations": 2}, 2, 2)):
        rounds.clear(), exits.clear()
        assert model.generate(batch, **options, **theirs, **ours, **own).tolist() == plain
        assert (set(exits), max(rounds)) == ({exit_layer, 4}, longest)
    adaptive = {"generation_strategy": "adaptive"}
    assert model.generate(batch, **options, **theirs, **ours, **adaptive).tolist() == plain
    with pytest.raises(ValueError, match="exit_layer 9: must be between 1 and 3"):
        model.generate(batch, **{**options, **theirs, **ours, "assistant_early_exit": 9})


def test_in_a_pipeline(model_folder, rounds):
    generate = pipeline("text-generation", str(model_folder))
    options = {"do_sample": False, "max_new_tokens": 10}
    assert generate("def add", **options, **SPECULATION) == generate("def add", **options)
    assert rounds


@pytest.mark.parametrize("tokens_in_it", [0, 6])
def test_a_cache_of_the_caller_is_refused(tokens_in_it):
    """Guards against one whose content is ignored, and one that the caller expects to be filled."""
    model, cache = tiny_llama(), DynamicCache()
    if tokens_in_it:
        model(PROMPT, cache=cache)
    longer = torch.cat([PROMPT, PROMPT], 1)
    with pytest.raises(ValueError, match="cache: is neither read nor filled"):
        model.generate(longer, cache=cache, max_new_tokens=4, **SPECULATION)
