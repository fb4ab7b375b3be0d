"""A new source of drafts: a class, a line of `draft_sources` and a flag are all that it takes."""

import dataclasses

import conftest
import pytest
import torch
from conftest import EOS, PROMPT, WAYS, drained, mixed_drafts, planned, scheduler_of, tiny_llama
from helpers import custom_data, refused

import benchmark
import correctness
import eval
import generate
import sweep
from measures import harness_model
from self_speculation import custom_generate, make_strategy
from self_speculation.backends.runners import make_runner
from self_speculation.config import GenerationConfig
from self_speculation.drafts import registry
from self_speculation.drafts.draft import Draft, DraftCost, DraftSource, LayerDrafts, LookupDrafts, Match
from self_speculation.drafts.ngram import NgramDrafts
from self_speculation.drafts.policy import AdaptivePolicy, Plan
from self_speculation.requests.request import Request

SCRIPTS = {
    generate: [],
    benchmark: ["--num_samples", "2", "--compare", "True"],
    correctness: ["--num_samples", "2"],
    sweep: ["--num_samples", "1", "--mode", "measured", "--exit_layer_last", "1",
            "--num_speculations_first", "2", "--num_speculations_last", "2"],
    eval: ["--include_path", "eval_tasks", "--tasks", "python_functions", "--limit", "2"],
}  # fmt: skip
BUILT_IN = registry.draft_sources
HOW = ["--generation_strategy", "self_speculative", "--num_speculations", "2"]


def test_a_model_of_one_layer_has_no_exits():
    """Guards against all layers as an exit, which would be named and trusted as a copy."""
    context = registry.DraftContext(
        make_runner(tiny_llama(num_layers=1)), GenerationConfig(generation_strategy="adaptive")
    )
    assert context.draft_weights == "exact"
    assert [type(source) for source in BUILT_IN(context)] == [NgramDrafts]


class Always(DraftSource):
    """Guesses one token, over and over."""

    name = "always"
    cost = DraftCost(lambda num_rows: 0.1)
    made = 0

    def __init__(self, context):
        self._token = context.config.always

    def draft(self, batch, cache, limits):  # noqa: ARG002
        Always.made += 1
        for i in range(max(limits)):
            rows = [row for row, limit in enumerate(limits) if i < limit]
            batch.record_draft(torch.full((len(rows),), self._token), i, rows)
        return Draft(["always"] * len(batch), torch.full((sum(limits),), self._token), limits)


@dataclasses.dataclass(frozen=True)
class WithAlways(GenerationConfig):
    always: int | None = dataclasses.field(
        default=None, metadata={"used_by": ("adaptive", "self_speculative"), "is_source": True}
    )
    """Guess this token."""


def asks(config):
    return getattr(config, "always", None) is not None


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """It takes the place of exits, but not in adaptive decoding."""

    def sources(context):
        config = context.config
        if not asks(config):
            return BUILT_IN(context)
        kinds = (DraftSource, LookupDrafts) if config.is_adaptive else LookupDrafts
        return [*(each for each in BUILT_IN(context) if isinstance(each, kinds)), Always(context)]

    monkeypatch.setattr(registry, "draft_sources", sources)
    monkeypatch.setattr(registry, "GenerationConfig", WithAlways)
    monkeypatch.setattr(Always, "made", 0)
    for module in (*SCRIPTS, harness_model):
        monkeypatch.setattr(module, "GenerationConfig", WithAlways)


@pytest.mark.usefixtures("few_files_are_read")
@pytest.mark.parametrize("script", [pytest.param(script, id=script.__name__) for script in SCRIPTS])
def test_every_script_drafts_with_it(script, model_folder, tmp_path):
    """Guards against a list of sources, or of their flags, outside the registry."""
    flags = ["--model", model_folder, "--output_dir", tmp_path / "logs", *HOW, "--max_steps", "8",
             "--sample", "False", "--always", "9", *SCRIPTS[script]]  # fmt: skip
    if script is generate:
        flags += ["--prompt", "Once upon"]
    elif script is not eval:
        flags += ["--dataset", "custom_jsonl", "--data_path", custom_data(tmp_path)]
    assert script.main([str(flag) for flag in flags]) == 0
    assert Always.made


def test_a_sweep_does_not_count_what_it_cannot_replay(model_folder, capsys):
    flags = ["--model", str(model_folder), *HOW, "--always", "9", "--sample", "False"]
    assert "--mode counted: needs drafts of layers" in refused(sweep.main, flags, capsys)


def test_generate_of_transformers_hands_its_flag_on(monkeypatch):
    model = tiny_llama()
    ids = torch.tensor([PROMPT])
    speculate = custom_generate.self_speculative_generate
    monkeypatch.setattr(custom_generate, "GenerationConfig", WithAlways)
    monkeypatch.setattr(speculate, "__signature__", custom_generate._signature())
    shared = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "eos_token_id": EOS}
    drafted = model.generate(ids, custom_generate=speculate, num_speculations=2, always=9, **shared)
    assert Always.made
    assert torch.equal(drafted, model.generate(ids, **shared))


def test_two_sources_that_compute_need_a_policy(text_model, monkeypatch):
    """Guards against the last one, which silently took the place of exits."""
    monkeypatch.setattr(registry, "draft_sources", lambda context: [*BUILT_IN(context), Always(context)])
    config = WithAlways(generation_strategy="self_speculative", exit_layer=1, num_speculations=2, always=9)
    with pytest.raises(ValueError, match="one source computes drafts, not exit 1, always; adaptive picks"):
        make_strategy("self_speculative").prepare(text_model, config)
    make_strategy("adaptive").prepare(text_model, dataclasses.replace(config, generation_strategy="adaptive"))


def test_adaptive_decoding_chooses_among_it(monkeypatch):
    """The plans are given: whether it pays is the policy's to learn."""

    def plan(sources, matches, limits):  # noqa: ARG001
        assert {"always", "exit 1"} <= {*sources}
        return Plan(["always"] * len(limits), [min(2, limit) for limit in limits])

    monkeypatch.setattr(AdaptivePolicy, "plan", planned(plan))
    monkeypatch.setattr(conftest, "GenerationConfig", WithAlways)
    result = conftest.generate(tiny_llama(), PROMPT, "adaptive", max_steps=9, eos=[], always=9)
    assert "always" in result.draft_stats.by_source


class Echo(LookupDrafts):
    """Guesses the last token again, and claims that a hundred tokens matched."""

    costs = {"echo": DraftCost(priors=(0.1, 0.99))}  # noqa: RUF012

    def find(self, sequence, k):
        return Match("echo", 100, sequence.all_ids_from(sequence.length - 1) * k)


@pytest.mark.parametrize("strategy", ["adaptive", "self_speculative"])
def test_a_source_that_matches_more_than_its_priors(strategy, monkeypatch):
    """Guards against an IndexError in the middle of an answer, and a source that never drafts."""
    monkeypatch.setattr(registry, "draft_sources", lambda context: [*BUILT_IN(context), Echo()])
    exits = {} if strategy == "adaptive" else {"exit_layer": 1, "num_speculations": 2}
    result = conftest.generate(tiny_llama(), PROMPT, strategy, max_steps=9, eos=[], **exits)
    assert "echo" in result.draft_stats.by_source


def test_a_source_that_looks_up_drafts_without_layers(monkeypatch):
    """Guards against an IndexError where no source computes."""
    monkeypatch.setattr(registry, "draft_sources", lambda context: [Echo()])
    shared = {"max_steps": 9, "eos": []}
    result = conftest.generate(tiny_llama(), PROMPT, exit_layer=1, num_speculations=2, **shared)
    assert "echo" in result.draft_stats.by_source
    assert result.predicted_tokens == conftest.generate(tiny_llama(), PROMPT, **shared).predicted_tokens


def test_n_grams_draft_alone():
    """Guards against drafts of layers that nobody asked for, and an exit layer that has to be made up."""
    model = tiny_llama()
    prompt = [*PROMPT, *PROMPT]
    with mixed_drafts("n-grams"):
        result = conftest.generate(model, prompt, prompt_lookup=2, num_speculations=3, max_steps=60, eos=[])
    assert {*result.draft_stats.by_source} == {"n-grams", "none"}
    plain = conftest.generate(model, prompt, max_steps=60, eos=[])
    assert result.predicted_tokens == plain.predicted_tokens


@pytest.mark.parametrize("way", ["layers", "n-grams"])
def test_a_source_learns_from_every_verification(way, monkeypatch):
    """Guards against outcomes that do not arrive, and against states of rejected or of other tokens."""
    model = tiny_llama(fused=True)
    followed = {0: [], 1: []}

    def learn(source, draft, accepted, hidden):  # noqa: ARG001
        assert [*map(len, hidden)] == draft.query_lengths
        for row, count in enumerate(accepted) if len(accepted) == 2 else ():  # rows are in order
            logits = model.lm_head(model.model.norm(hidden[row][: count + 1]))
            followed[row] += logits.argmax(-1).tolist()

    monkeypatch.setattr(LayerDrafts, "learn", learn)
    scheduler = scheduler_of(model, 2, **WAYS[way], max_steps=16)
    for key, prompt in enumerate((PROMPT, [*PROMPT, 8, 8])):
        scheduler.add_request(key, Request(prompt))
    with mixed_drafts("exit 2"):
        results = drained(scheduler)
    for row, tokens in followed.items():
        output = results[row].predicted_tokens[1:]  # the prompt gives the first one
        assert len(tokens) > 4
        assert tokens[: len(output)] == output[: len(tokens)]
