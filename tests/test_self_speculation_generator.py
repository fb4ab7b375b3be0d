"""Greedy ids of self-speculative decoding are those of autoregressive decoding and of transformers."""

from unittest.mock import Mock, patch

import pytest
import torch
from conftest import (
    EOS,
    PROMPT,
    ROOT,
    generate,
    ids_of,
    mixed_drafts,
    random_plans,
    tiny_llama,
    transformers_generate,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MinNewTokensLengthLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from self_speculation import GenerationConfig, Request, SelfSpeculativeGenerationStrategy, make_strategy
from self_speculation.decoding.request import FrequencyPenaltyLogitsProcessor
from self_speculation.scheduler import Scheduler


def history_bias(input_ids, scores):
    """A processor that checks its arguments, and whose result depends on every id of the history."""
    assert (len(input_ids), scores.shape) == (1, (1, 50))
    weights = torch.arange(1, input_ids.shape[1] + 1)
    return scores.roll(int((input_ids[0] * weights).sum()) % 7, dims=-1)


PROCESSORS = {
    "none": [],
    "history": [history_bias],
    "transformers": [
        SequenceBiasLogitsProcessor({(7,): 3.0, (5, 9): -4.0}),
        MinNewTokensLengthLogitsProcessor(len(PROMPT), 4, EOS, device="cpu"),
    ],
}


DRAFTS = st.fixed_dictionaries(
    {"exit_layer": st.integers(1, 3), "num_speculations": st.integers(1, 8)},
    optional={
        "draft_weights": st.just("int4"),
        "prompt_lookup": st.integers(1, 3),
    },
)
SHARED = st.fixed_dictionaries(
    {
        "max_steps": st.sampled_from([20, 16, 12, 8, 5, 3, 2, 1]),  # of `integers` every second one is 1
        "eos": st.lists(st.integers(0, 49), max_size=6, unique=True),
        "no_repeat_ngram_size": st.sampled_from([None, 1, 2]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "frequency_penalty": st.sampled_from([0.0, 0.4]),
        "presence_penalty": st.sampled_from([0.0, 0.3]),
    }
)

PLAIN = {
    "max_steps": 20, "eos": [], "no_repeat_ngram_size": None, "repetition_penalty": 1.0,
    "frequency_penalty": 0.0, "presence_penalty": 0.0,
}  # fmt: skip


@mixed_drafts("exit 1", "exit 2", "exit 3", "n-grams")
@settings(max_examples=60)
@given(
    drafts=DRAFTS,
    shared=SHARED,
    agreement=st.sampled_from(["never", "always", "sometimes", "loops"]),
    fused=st.booleans(),
    processors=st.sampled_from(sorted(PROCESSORS)),
    stops_at=st.sampled_from([None, 3, 7]),
    prompt=st.lists(st.integers(3, 49), min_size=1, max_size=7) | st.lists(st.integers(3, 9), min_size=9),
)
@example(  # n-grams that are accepted, and that are rejected
    drafts={"exit_layer": 2, "num_speculations": 4, "prompt_lookup": 1},
    shared=PLAIN,
    agreement="never",
    fused=False,
    processors="none",
    stops_at=None,
    prompt=[5, 9, 4, 5, 9],
)
def test_ids_equal_for_every_setting(drafts, shared, agreement, fused, processors, stops_at, prompt):
    """Guards against errors in length limits, rollback, stops inside a draft, the history of processors and
    stop conditions, and against keys and values that an inexact draft leaves in the cache.
    """
    model, given = tiny_llama(agreement=agreement, fused=fused), PROCESSORS[processors]

    def ends(output):
        return stops_at is not None and sum(output[-2:]) % stops_at == 0

    with patch("self_speculation.passes.kv_cache._FIRST_ALLOCATION", 3):  # so that the cache grows
        plain, speculative = (
            generate(model, prompt, logits_processors=given, stop_checks=ends, **shared, **own)
            for own in ({}, drafts)
        )
    assert speculative.predicted_tokens == plain.predicted_tokens
    assert speculative.stop_reason == plain.stop_reason
    penalties = shared["frequency_penalty"], shared["presence_penalty"]
    criterion = [lambda ids, *_, **__: torch.tensor([ends(ids[0, len(prompt) :].tolist())])]
    assert plain.predicted_tokens == transformers_generate(
        model,
        prompt,
        shared["max_steps"],
        shared["eos"] or -1,
        logits_processor=[FrequencyPenaltyLogitsProcessor(len(prompt), *penalties), *given],
        stopping_criteria=criterion,
        no_repeat_ngram_size=shared["no_repeat_ngram_size"],
        repetition_penalty=shared["repetition_penalty"],
    )
    assert speculative.num_accepted <= speculative.num_drafted
    assert speculative.num_decode_tokens <= speculative.num_verifications * (drafts["num_speculations"] + 1)
    counts = zip(speculative.accepted_by_position, speculative.drafted_by_position, strict=True)
    assert all(0 <= accepted <= drafted for accepted, drafted in counts)


@mixed_drafts("exit 1", "exit 2", "n-grams")
@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**32),
    shared=SHARED,
    agreement=st.sampled_from(["never", "always", "sometimes"]),
    weights=st.sampled_from(["exact", "int4"]),
    fused=st.booleans(),
    processors=st.sampled_from(sorted(PROCESSORS)),
    prompt=st.lists(st.integers(3, 9), min_size=1, max_size=30),
)
def test_ids_equal_for_every_sequence_of_plans(seed, shared, agreement, weights, fused, processors, prompt):
    """Guards against keys, values or ids that one draft source leaves to another. Plans are random: on a tiny
    model, the policy always has the same best plan.
    """
    weights = "exact" if agreement == "never" else weights  # a hooked layer has no copy
    model = tiny_llama(num_layers=8, agreement=agreement, fused=fused)
    shared |= {"max_steps": 2 * shared["max_steps"], "logits_processors": PROCESSORS[processors]}
    plain = generate(model, prompt, **shared)
    drafts = {"draft_weights": weights, "prompt_lookup": 1}
    with random_plans(seed):
        found = generate(model, prompt, "adaptive", **shared, **drafts)
    assert found.predicted_tokens == plain.predicted_tokens
    assert found.stop_reason == plain.stop_reason


@pytest.mark.parametrize(
    ("agreement", "rounds", "drafted", "accepted"),
    [("never", 15, (14, 13, 12, 11), (0, 0, 0, 0)), ("always", 3, (3, 3, 3, 3), (3, 3, 3, 3))],
)
def test_counts_of_drafts(agreement, rounds, drafted, accepted):
    """Guards against miscounted drafts, and against drafts beyond the length limit: of 16 tokens one comes
    from the prompt and the others from rounds of 1 or 5.
    """
    drafts = {"exit_layer": 2, "num_speculations": 4, "max_steps": 16}
    result = generate(tiny_llama(agreement=agreement), PROMPT, eos=[], **drafts)
    assert (result.num_verifications, result.mean_accepted_length) == (rounds, 15 / rounds)
    assert (result.drafted_by_position, result.accepted_by_position) == (drafted, accepted)
    assert (result.num_drafted, result.num_accepted) == (sum(drafted), sum(accepted))
    assert result.acceptance_rate == sum(accepted) / sum(drafted)


def test_autoregressive_results():
    """Guards against zeros that read as rejected drafts, and against a rate that counts the first token."""
    result = generate(tiny_llama(), PROMPT, max_steps=30, eos=[])
    assert result.acceptance_rate is result.num_drafted is result.num_accepted is None
    assert result.num_verifications is result.mean_accepted_length is result.drafted_by_position is None
    assert result.prefill_time > 0
    assert result.num_decode_tokens == 29
    assert result.decode_tokens_per_second == pytest.approx(29 / result.decode_time)


def test_a_huge_draft_length():
    """Guards against memory for drafts that the length limit rules out."""
    drafts = {"exit_layer": 1, "num_speculations": 10**9}
    with mixed_drafts():
        assert ids_of(tiny_llama(), **drafts) == transformers_generate(tiny_llama(), eos=-1)


def test_tokens_after_an_end_id_inside_an_accepted_draft_do_not_count():
    """Guards against counts that include accepted tokens after the end of the output."""
    model = tiny_llama(agreement="always", initializer_range=0.5)
    ids = ids_of(model, max_steps=5)
    end = next(i for i in range(2, 5) if ids[i] not in ids[:i])
    result = generate(model, PROMPT, max_steps=9, eos=[ids[end]], exit_layer=2, num_speculations=8)
    assert result.predicted_tokens == ids[:end]
    assert (result.num_verifications, result.num_accepted) == (1, end)
    assert result.num_decode_tokens == end


def counting_model():
    """Its first layer counts on: the best token after n is n + 1. The whole model says 0 after 5."""
    sizes = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)).eval()
    for parameter in model.model.layers.parameters():
        parameter.data *= parameter.ndim == 1  # norms
    model.model.embed_tokens.weight.data = torch.eye(16)
    model.lm_head.weight.data = torch.eye(16).roll(1, 0)
    mlp = model.model.layers[1].mlp
    mlp.gate_proj.weight.data[0, 5] = mlp.up_proj.weight.data[0, 5] = 1  # finds a 5
    mlp.down_proj.weight.data[15, 0] = 1  # and makes it a 15
    return model


class WatchedRound(SelfSpeculativeGenerationStrategy):
    """Keeps the ids and the number of cached positions of each row, before and after a round."""

    def step(self, decoding):
        self.ids, self.cached = [], []
        for do in (lambda _: None, super().step):
            do(decoding)
            self.ids.append([sequence.ids for sequence in decoding.batch.sequences])
            self.cached.append([[length] for length in decoding.cache.lengths(1)])


def test_the_worked_round_of_the_page():
    """Guards against a page that shows another round than the code does."""
    page = (ROOT / "docs" / "how-it-works.md").read_text()
    lines = [line.strip("| ").split("|") for line in page.splitlines() if line.startswith("| ")]
    table = {name.strip(): [[int(id_) for id_ in row.split()] for row in rows] for name, *rows in lines[1:]}
    model, strategy, streamers = counting_model(), WatchedRound(), [Mock(), Mock()]
    config = GenerationConfig(max_steps=9, sample=False, exit_layer=1, num_speculations=3)
    scheduler = Scheduler(strategy, model, config, batch_size=2)
    for row, (ids, streamer) in enumerate(zip(table["ids"], streamers, strict=True)):
        scheduler.add_request(row, Request(ids[:-1], streamer=streamer))
    scheduler.step()
    (before, after), (cached, cached_after) = strategy.ids, strategy.cached
    drafts = [[int(put.args[0]) for put in each.put.mock_calls if put.kwargs] for each in streamers]
    texts = torch.tensor([[*ids, *draft][-4:] for ids, draft in zip(before, drafts, strict=True)])
    assert table == {
        "ids": before,
        "cached positions": cached,
        "draft": drafts,
        "the whole model after each token": model(texts).logits.argmax(-1).tolist(),
        "accepted": [[len(new) - len(old) - 1] for old, new in zip(before, after, strict=True)],
        "cached positions after the round": cached_after,
        "ids after the round": after,
    }


def test_a_processor_runs_once_per_row_of_logits():
    """Guards against processors that run again for tokens that they have seen."""
    processor, model = Mock(spec=[], side_effect=history_bias), tiny_llama(agreement="always")
    drafts = {"exit_layer": 2, "num_speculations": 3, "max_steps": 9, "eos": []}
    result = generate(model, PROMPT, logits_processors=[processor], **drafts)
    assert processor.call_count == 1 + 2 * result.num_drafted + result.num_verifications


def test_criteria_see_every_token():
    """Guards against accepted tokens that are not in the history yet."""
    seen = []
    result = generate(
        tiny_llama(agreement="always"), PROMPT, max_steps=9, eos=[], exit_layer=2, num_speculations=3,
        stopping_criteria=[lambda ids, _: seen.append(ids[0].tolist()) is not None],
    )  # fmt: skip
    tokens = result.predicted_tokens
    assert seen == [[*PROMPT, *tokens[:n]] for n in range(1, 10)]


def test_early_exit_is_the_truncated_model():
    """Guards against an early exit that runs other layers or skips the norm."""
    model, truncated = tiny_llama(), tiny_llama(num_layers=3)
    state = {name: value for name, value in model.state_dict().items() if ".layers.3." not in name}
    truncated.load_state_dict(state)
    assert ids_of(model, exit_layer=3) == transformers_generate(truncated, eos=-1)


@pytest.mark.parametrize(
    ("strategy", "settings", "message"),
    [
        ("self_speculative", (4, 2), "exit_layer 4: must be between 1 and 3, the model has 4 layers"),
        ("self_speculative", (5, 2, "int4"), "exit_layer 5: must be between 1 and 4"),
        ("autoregressive", (4, -1), r"exit_layer 4: .*-1 is full depth"),
        ("self_speculative", (-1, -1), "exit_layer: self_speculative needs one between 1 and the last but"),
        ("self_speculative", (2, -1), "num_speculations: self_speculative needs at least 1"),
    ],
)
def test_invalid_exit_layers_and_draft_lengths(strategy, settings, message):
    """Guards against settings that run another number of layers without a word. The strategy object overrides
    the name in the config.
    """
    names = ("exit_layer", "num_speculations", "draft_weights")
    config = GenerationConfig(**dict(zip(names, settings, strict=False)))
    with pytest.raises(ValueError, match=message):
        make_strategy(strategy).generate_token_ids(tiny_llama(), PROMPT, [], config)
