"""Drafts and batches change nothing: ids are those of a row alone without drafts; greedy, of transformers."""

import copy
from contextlib import nullcontext
from functools import cache, partial
from unittest.mock import Mock, patch

import pytest
import torch
from conftest import (
    EOS,
    PROMPT,
    ROOT,
    generate,
    ids_of,
    in_batch,
    mixed_drafts,
    needs_operators,
    own_llama,
    random_plans,
    tiny_llama,
    transformers_generate,
)
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from test_llama_model_utils import family, mixture, windowed
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MinNewTokensLengthLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from self_speculation import GenerationConfig, Request, SelfSpeculativeGenerationStrategy, fuse, make_strategy
from self_speculation.decoding.request import FrequencyPenaltyLogitsProcessor
from self_speculation.passes.quantized_layers import quantize
from self_speculation.scheduler import Scheduler


def history_bias(input_ids, scores):
    """A processor that checks its arguments, and whose result depends on every id of the history."""
    assert (len(input_ids), len(scores)) == (1, 1)
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


def rounded(bits):
    model = own_llama(hidden_size=40, intermediate_size=72)
    quantize(model, bits)
    return model


def narrow(kind):
    return windowed(kind).float()


NEED_OPERATORS = ("bfloat16", "four bits", "eight bits")
MODELS = {
    "never": lambda: own_llama(agreement="never"),
    "always": lambda: own_llama(agreement="always"),
    "sometimes": own_llama,
    "loops": lambda: own_llama(agreement="loops"),
    "eight layers": lambda: own_llama(num_layers=8),
    "bfloat16": lambda: own_llama().bfloat16(),
    "four bits": lambda: rounded(4),
    "eight bits": lambda: rounded(8),
    "olmo2": lambda: family("olmo2").float(),
    "experts in some layers": lambda: mixture("qwen3_moe", mlp_only_layers=[1]),
    # In all layers, in some, in layers of transformers. test_llama_model_utils.py has passes of each family.
    **{f"{kind} with windows": partial(narrow, kind) for kind in ("mistral", "gemma3_text", "olmo3")},
    "mixtral": partial(mixture, "mixtral"),
}
OF_EXPERTS = ("experts in some layers", "mixtral")
HAVE_NO_COPIES = ("never", "four bits", "eight bits", *OF_EXPERTS)


@cache
def model_of(name, fused):
    model = MODELS[name]()
    if fused:
        fuse(model)
    return model


# Of `integers` every second one is the least.
DRAFTS = st.fixed_dictionaries(
    {"exit_layer": st.integers(1, 3), "num_speculations": st.sampled_from([*range(1, 9), 10**9])},
    optional={"draft_weights": st.just("int4"), "prompt_lookup": st.integers(1, 3)},
)
ANY_PLAN = st.fixed_dictionaries(
    {"generation_strategy": st.just("adaptive"), "prompt_lookup": st.just(1)},
    optional={"draft_weights": st.just("int4")},
)
SHARED = st.fixed_dictionaries(
    {
        "max_steps": st.sampled_from([20, 16, 12, 8, 5, 3, 2, 1]),
        "no_repeat_ngram_size": st.sampled_from([None, 1, 2]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "frequency_penalty": st.sampled_from([0.0, 0.4]),
        "presence_penalty": st.sampled_from([0.0, 0.3]),
        "sample": st.booleans(),
        "temperature": st.sampled_from([0.6, 1.2]),
        "top_k": st.sampled_from([0, 20]),
        "top_p": st.sampled_from([0.9, 1.0]),
        "min_p": st.sampled_from([0.0, 0.05]),
    }
)
ROW = st.fixed_dictionaries(
    {
        "prompt": st.lists(st.integers(3, 49), min_size=1, max_size=7)
        | st.lists(st.integers(3, 9), min_size=9, max_size=40),
        "processors": st.sampled_from(sorted(PROCESSORS)),
        "stops_at": st.sampled_from([None, 3, 7]),
        "ends": st.lists(st.integers(0, 49), max_size=6, unique=True),
        "seed": st.integers(0, 2**40),
    }
)


def request_of(row):
    """It ends where its last two ids have such a sum."""

    def ends(output):
        return row["stops_at"] is not None and sum(output[-2:]) % row["stops_at"] == 0

    processors = copy.deepcopy(PROCESSORS[row["processors"]])  # one prepares itself for a vocabulary
    return Request(row["prompt"], processors, seed=row["seed"], stop_checks=ends, eos_token_ids=row["ends"])


def by_transformers(model, request, shared):
    prompt, stops = request.ids, request.stop_checks
    penalties = FrequencyPenaltyLogitsProcessor(
        len(prompt), shared["frequency_penalty"], shared["presence_penalty"]
    )
    return transformers_generate(
        model,
        prompt,
        shared["max_steps"],
        request.eos_token_ids or -1,
        logits_processor=[penalties, *request.logits_processors],
        stopping_criteria=[lambda ids, *_, **__: torch.tensor([stops(ids[0, len(prompt) :].tolist())])],
        no_repeat_ngram_size=shared["no_repeat_ngram_size"],
        repetition_penalty=shared["repetition_penalty"],
    )


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_operators if name in NEED_OPERATORS else ()) for name in MODELS]
)
def test_drafts_and_batches_change_nothing(name):
    """Guards against errors in length limits, rollback, stops inside a draft, windows, experts, rounding in
    wider passes, the history of processors and stop conditions, memory for drafts that the limit rules out,
    against keys, values or ids that an inexact draft, another source or another row leaves, against positions
    of other rows, and noise that depends on drafts, rows or their order. Plans of adaptive decoding are
    random: on a tiny model, the policy always has the same best plan.
    """

    @seed(name)
    @settings(max_examples=12)
    @given(
        fused=st.booleans(),
        drafts=DRAFTS | ANY_PLAN,
        plans=st.integers(0, 2**32),
        shared=SHARED,
        rows=st.lists(ROW, min_size=1, max_size=4),
        batch_size=st.integers(1, 3),
    )
    def hold(fused, drafts, plans, shared, rows, batch_size):
        model = model_of(name, fused or name == "bfloat16")
        if name in HAVE_NO_COPIES:
            drafts = {**drafts, "draft_weights": "exact"}
        elif "draft_weights" in drafts and "exit_layer" in drafts:  # whole copies are often right
            drafts = {**drafts, "exit_layer": len(model.model.layers)}
        with patch("self_speculation.passes.kv_cache._FIRST_ALLOCATION", 3), random_plans(plans):
            found = in_batch(model, map(request_of, rows), batch_size, **shared, **drafts)
        for index, row in enumerate(rows):
            plain = in_batch(model, [request_of(row)], 1, **shared)[0]
            drafted = found[index]
            assert drafted.predicted_tokens == plain.predicted_tokens
            assert drafted.stop_reason == plain.stop_reason
            assert drafted.num_accepted <= drafted.num_drafted
            counts = zip(drafted.accepted_by_position, drafted.drafted_by_position, strict=True)
            assert all(0 <= accepted <= proposed for accepted, proposed in counts)
            if not index and "bits" not in name and not shared["sample"]:
                exact = copy.deepcopy(model).float() if name == "bfloat16" else model
                assert plain.predicted_tokens == by_transformers(exact, request_of(row), shared)

    # Exits of random layers are hardly ever right.
    with nullcontext() if name in ("never", *OF_EXPERTS) else mixed_drafts():
        hold()


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

    def decode_round(self, decoding):
        self.ids, self.cached = [], []
        for do in (lambda _: None, super().decode_round):
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
