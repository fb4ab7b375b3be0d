"""Requests of one batch that differ in length, sampling and stop conditions."""

from collections import Counter

import pytest
import torch
from conftest import in_batch, tiny_llama
from distributions import PROMPT, STEPS, config, expected, looking, model, p_value
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_batch import DRAFTED, PROMPTS, Shown, nan_from
from transformers import MinPLogitsWarper, NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

from self_speculation import GenerationConfig, Request, Sampler, make_strategy
from self_speculation.decoding.sampling import SamplerOfRows, joint_sampler

SAMPLES = 400


@given(
    temperatures=st.lists(st.sampled_from([0.0, 1e-30, 0.3, 1.0, 7.0]), min_size=4, max_size=4),
    top_ks=st.lists(st.sampled_from([0, 1, 3, 500]), min_size=4, max_size=4),
    top_ps=st.lists(st.sampled_from([0.0, 0.4, 0.9, 1.0]), min_size=4, max_size=4),
    seed=st.integers(0, 99),
    width=st.sampled_from([None, 3]),
    vocab_size=st.sampled_from([20, 400]),
    may_look=st.booleans(),
    have_ties=st.booleans(),
)
@example([7.0] * 4, [3, 500, 1, 3], [0.9] * 4, 0, None, 400, False, True)
@settings(max_examples=100)
def test_each_row_has_the_distribution_of_its_own_sampler(
    temperatures, top_ks, top_ps, seed, width, vocab_size, may_look, have_ties
):
    """Guards against temperature, top-k or top-p of another row. `may_look` is False on a GPU: there rows
    without a top-k once lost the tokens beyond the largest top-k of other rows.
    """
    torch.manual_seed(seed)
    logits = 3 * torch.randn(*((4, vocab_size) if width is None else (4, width, vocab_size)))
    logits = logits.round() if have_ties else logits
    rows = zip(temperatures, top_ks, top_ps, strict=True)
    samplers = [Sampler(True, temperature, top_k, top_p) for temperature, top_k, top_p in rows]
    with looking(may_look):
        found = SamplerOfRows(samplers, logits.device).probabilities(logits)
        for sampler, of_row, mine in zip(samplers, logits, found, strict=True):
            if sampler.greedy:
                wanted = torch.nn.functional.one_hot(of_row.argmax(-1), vocab_size).float()
            else:
                wanted = sampler.probabilities(of_row)
            if have_ties:  # any of several equal tokens may be left out
                mine, wanted = mine.sort(-1).values, wanted.sort(-1).values
            torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("samplers", "sorts"),
    [
        ([Sampler(temperature=0.5), Sampler(), Sampler(False, top_p=0.9)], []),
        ([Sampler(top_k=3), Sampler(), Sampler(False, top_p=0.9, top_k=9)], [("topk", 3)]),
        ([Sampler(top_k=3), Sampler(top_p=0.9)], [("topk", 3), ("sort", 50)]),
        ([Sampler(top_k=3), Sampler(top_k=2, top_p=0.9)], [("topk", 3), ("topk", 2)]),
    ],
)
def test_no_needless_sorting(samplers, sorts, monkeypatch):
    """Guards against sorting the vocabulary without top-p, and against a search for a greedy row."""
    done, sort, topk = [], torch.Tensor.sort, torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "sort", lambda x, **how: done.append(("sort", 50)) or sort(x, **how))
    monkeypatch.setattr(torch.Tensor, "topk", lambda x, k: done.append(("topk", k)) or topk(x, k))
    with looking(False):
        SamplerOfRows(samplers, torch.device("cpu")).probabilities(torch.randn(len(samplers), 50))
    assert done == sorts


def test_equal_rows_share_a_sampler():
    """Guards against probabilities of rows that are all greedy."""
    greedy = [Sampler(False, 0.3), Sampler(True, 0.0)]
    assert joint_sampler(greedy, torch.device("cpu")).greedy
    assert joint_sampler([Sampler(True, 0.3)] * 3, torch.device("cpu")) == Sampler(True, 0.3)


@pytest.mark.parametrize("drafts", [{}, {**DRAFTED, "prompt_lookup": 2}])
def test_each_row_has_its_own_settings(drafts):
    """Guards against settings, limits, random numbers or stop conditions of another row."""
    settings = [
        {"sample": False},
        {"temperature": 1.3, "top_p": 1.0},
        {"temperature": 0.7, "top_p": 0.8, "max_steps": 9},
        {"top_k": 5, "stop_token_ids": [7, 9, 11]},
        {"sample": False, "no_repeat_ngram_size": 1, "max_steps": 30},
        {"generation_strategy": "autoregressive", "sample": False},
    ]
    name = "self_speculative" if drafts else "autoregressive"
    requests = [
        Request(prompt, seed=seed, config=GenerationConfig(**{"generation_strategy": name, **own}))
        for seed, (prompt, own) in enumerate(zip(PROMPTS, settings, strict=True))
    ]
    beside = in_batch(tiny_llama(), requests, 4, max_steps=20, sample=True, **drafts)
    for index, request in enumerate(requests):
        alone = in_batch(tiny_llama(), [request], 1, max_steps=20, sample=True, **drafts)[0]
        assert beside[index].predicted_tokens == alone.predicted_tokens
        assert beside[index].stop_reason == alone.stop_reason
    assert len(beside[4].predicted_tokens) > 20  # its own limit, beyond the batch's
    assert not beside[5].num_drafted  # it turns drafts off
    if drafts:
        assert beside[0].num_drafted


def plainly(decoded, request, ends):
    """Tokens by transformers and a request's processors, and the error that ends them."""
    tokens: list[int] = []
    while len(tokens) < request.config.max_steps:
        ids = torch.tensor([[*request.prompt, *tokens]])
        with torch.inference_mode():
            logits = decoded(ids).logits[:, -1]
        try:
            for processor in request.logits_processors:
                logits = processor(ids, logits)
        except KeyError as error:
            return tokens, error
        if logits.isnan().any() or (request.config.sample and logits.max().isinf()):
            return tokens, FloatingPointError()
        if (token := int(logits.argmax())) in ends:
            break
        tokens.append(token)
    return tokens, None


def meddles(how, part):
    """A processor that, after some histories, raises, returns NaN or leaves one token."""

    def process(ids, logits):
        chance = int(ids.sum())
        if chance % 11 != part:
            return logits
        if how == "raises":
            raise KeyError(how)
        if how == "NaN":
            return nan_from(0)(ids, logits)
        return torch.full_like(logits, -torch.inf).index_fill_(1, torch.tensor([chance % 50]), 1.0)

    return process


ROW = st.fixed_dictionaries(
    {
        "prompt": st.lists(st.integers(3, 40), min_size=1, max_size=9),
        "processors": st.lists(
            st.one_of(
                st.builds(meddles, st.sampled_from(["raises", "NaN", "one"]), st.integers(0, 10)),
                st.builds(MinPLogitsWarper, st.sampled_from([0.05, 0.5])),
                st.builds(RepetitionPenaltyLogitsProcessor, st.sampled_from([0.7, 1.5])),
                st.builds(NoRepeatNGramLogitsProcessor, st.integers(1, 3)),
            ),
            max_size=3,
        ),
        "own": st.fixed_dictionaries(
            {
                "max_steps": st.integers(1, 16),
                "sample": st.booleans(),
                "top_k": st.sampled_from([0, 1, 5]),
                "top_p": st.sampled_from([0.5, 1.0]),
            }
        ),
    }
)


@given(
    rows=st.lists(ROW, min_size=1, max_size=6),
    batch_size=st.integers(1, 4),
    ends=st.lists(st.integers(2, 49), max_size=4),
    length=st.integers(1, 7),
    lookup=st.sampled_from([0, 2]),
    agreement=st.sampled_from(["sometimes", "always", "never"]),
)
@settings(max_examples=40)
def test_mixed_rows_end_where_plain_decoding_does(rows, batch_size, ends, length, lookup, agreement):
    """Guards against a drafted token that ends or changes an output of any row because processors raise or
    change logits there, against an output that goes on where draft and target are both NaN, and against a
    streamer that does not show all tokens before an error. With top-k 1, sampling is deterministic.
    """
    decoded = tiny_llama(agreement=agreement)
    requests = [
        Request(
            row["prompt"],
            row["processors"],
            streamer=Shown(),
            seed=0,
            eos_token_ids=ends,
            config=GenerationConfig(generation_strategy="self_speculative", **row["own"]),
        )
        for row in rows
    ]
    drafts = {"exit_layer": 2, "num_speculations": length, "prompt_lookup": lookup}
    got = in_batch(decoded, requests, batch_size, **drafts)
    for index, request in enumerate(requests):
        if not request.config.sample or request.config.top_k == 1:
            tokens, error = plainly(decoded, request, ends)
            assert request.streamer == tokens
            if error is not None:
                assert type(got[index]) is type(error)
            else:
                assert got[index].predicted_tokens == tokens


@pytest.mark.parametrize("may_look", [True, False])
def test_mixed_rows_draw_from_their_own_distributions(may_look):
    """Guards against an accept rule with another row's temperature, and against another row's top-k on a GPU.
    False alarms: 1e-4 for each row, fixed seeds.
    """
    base = config()
    settings = [{"temperature": 0.5}, {"temperature": 2.0, "top_p": 0.9}, {"top_k": 2}, {"sample": False}]
    configs = [config(**own) for own in settings]
    counts = [Counter() for _ in configs]
    requests = [
        Request(PROMPT, seed=seed, config=configs[seed % 4], ends_text=lambda tokens: len(tokens) >= STEPS)
        for seed in range(4 * SAMPLES)
    ]
    with looking(may_look):
        results = dict(make_strategy("self_speculative").generate_batch(model(), requests, base, 4))
    for index, result in results.items():
        counts[index % 4][tuple(result.predicted_tokens[:STEPS])] += 1
    for own, found in zip(configs[:3], counts, strict=False):
        assert p_value(found, expected(own, [])) > 1e-4
    assert len(counts[3]) == 1
