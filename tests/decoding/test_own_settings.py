"""Requests of one batch with lengths, sampling and ends of their own."""

import pytest
import torch
from conftest import tiny_llama
from distributions import PROMPT, STEPS, config, expected, looking, model, p_value
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_batch import PROMPTS, in_batch
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
    """Guards against one row's temperature, top-k or top-p in another's, on a CPU and as a GPU does it: with
    the largest top-k of all, rows that have none lost most of their tokens.
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
            if have_ties:  # it does not matter which of several tokens that tie is left out
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
def test_what_rows_that_differ_have_sorted(samplers, sorts, monkeypatch):
    """Guards against a vocabulary that is sorted although no row has top-p, or searched for a greedy row."""
    done, sort, topk = [], torch.Tensor.sort, torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "sort", lambda x, **how: done.append(("sort", 50)) or sort(x, **how))
    monkeypatch.setattr(torch.Tensor, "topk", lambda x, k: done.append(("topk", k)) or topk(x, k))
    with looking(False):
        SamplerOfRows(samplers, torch.device("cpu")).probabilities(torch.randn(len(samplers), 50))
    assert done == sorts


def test_rows_that_agree_share_a_sampler():
    """Guards against probabilities that nobody needs: rows that all are greedy compute none."""
    greedy = [Sampler(False, 0.3), Sampler(True, 0.0)]
    assert joint_sampler(greedy, torch.device("cpu")).greedy
    assert joint_sampler([Sampler(True, 0.3)] * 3, torch.device("cpu")) == Sampler(True, 0.3)


@pytest.mark.parametrize(
    "drafts",
    [
        {},
        pytest.param({"exit_layer": 2, "num_speculations": 3}, marks=pytest.mark.slow),
        {"exit_layer": 2, "num_speculations": 3, "prompt_lookup": 2},
    ],
)
def test_one_seed_one_answer_whoever_the_neighbours_are(drafts):
    """Guards against settings, limits, random numbers or ends that come from a neighbour."""
    settings = [
        {"sample": False},
        {"temperature": 1.3, "top_p": 1.0},
        {"temperature": 0.7, "top_p": 0.8, "max_steps": 9},
        {"top_k": 5, "stop_token_ids": [7, 9, 11]},
        {"sample": False, "no_repeat_ngram_size": 1, "max_steps": 30},
        {"generation_strategy": "autoregressive", "sample": False},
    ]
    name = "self_speculative" if drafts else "autoregressive"
    decoded = tiny_llama()
    requests = [
        Request(prompt, seed=seed, config=GenerationConfig(**{"generation_strategy": name, **own}))
        for seed, (prompt, own) in enumerate(zip(PROMPTS, settings, strict=True))
    ]
    beside = in_batch(decoded, requests, 4, max_steps=20, sample=True, **drafts)
    for index, request in enumerate(requests):
        alone = in_batch(decoded, [request], 1, max_steps=20, sample=True, **drafts)[0]
        assert beside[index].predicted_tokens == alone.predicted_tokens
        assert beside[index].stop_reason == alone.stop_reason
    assert len(beside[4].predicted_tokens) > 20  # its own limit, beyond the batch's
    assert not beside[5].num_drafted  # it wants no drafts
    if drafts:
        assert beside[0].num_drafted


def plainly(decoded, request, ends):
    """What transformers and a request's processors give, token by token: the tokens, and the error if any."""
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
    """A processor that raises, leaves NaN, or one token, after some histories."""

    def process(ids, logits):
        chance = int(ids.sum())
        if chance % 11 != part:
            return logits
        if how == "raises":
            raise KeyError(how)
        if how == "NaN":
            return logits * torch.nan
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
@settings(max_examples=25)
def test_mixed_rows_end_where_plain_decoding_does(rows, batch_size, ends, length, lookup, agreement):
    """Guards against a guess that ends or alters an answer, by what processors do there, in its own row or
    in another one. Sampled rows with top-k 1 draw no lots.
    """
    decoded = tiny_llama(agreement=agreement)
    requests = [
        Request(
            row["prompt"],
            row["processors"],
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
            if error is not None:
                assert type(got[index]) is type(error)
            else:
                assert got[index].predicted_tokens == tokens


@pytest.mark.parametrize("may_look", [True, False])
def test_mixed_rows_draw_from_their_own_distributions(may_look):
    """Guards against a rule that accepts by another row's temperature, and against another row's top-k on a
    GPU. False-alarm rate 1e-4 for each row; the seeds are fixed.
    """
    base = config()
    settings = [{"temperature": 0.5}, {"temperature": 2.0, "top_p": 0.9}, {"top_k": 2}, {"sample": False}]
    configs = [config(**own) for own in settings]
    counts: list[dict] = [{} for _ in configs]
    requests = [
        Request(PROMPT, seed=seed, config=configs[seed % 4], ends_text=lambda tokens: len(tokens) >= STEPS)
        for seed in range(4 * SAMPLES)
    ]
    with looking(may_look):
        results = dict(make_strategy("self_speculative").generate_batch(model(), requests, base, 4))
    for index, result in results.items():
        tokens = tuple(result.predicted_tokens[:STEPS])
        counts[index % 4][tokens] = counts[index % 4].get(tokens, 0) + 1
    for own, found in zip(configs[:3], counts, strict=False):
        assert p_value(found, expected(own, [])) > 1e-4
    assert len(counts[3]) == 1
