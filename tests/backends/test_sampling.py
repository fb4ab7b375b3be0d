"""Logits and noise to tokens, as functions of tensors; and one text for each seed."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import hypothesis
import numpy
import pytest
import torch
from conftest import LAYERS, PROMPT, assert_close, generate, ids_of, in_batch, tiny_llama
from hypothesis import strategies as st
from scipy.stats import chi2_contingency, chisquare
from transformers import MinPLogitsWarper

from arguments import parse
from self_speculation import Request
from self_speculation.backends.sampling import (
    Sampler,
    _sample_likely,
    amax,
    argmax,
    gumbel_noise,
    keep,
    noise_key,
    sample_by_rules,
)
from self_speculation.config import SAMPLING_RULES, GenerationConfig
from self_speculation.llama_model_utils import decode_next_token, top_k_top_p_filtering
from self_speculation.requests.request import FrequencyPenaltyLogitsProcessor, config_processors
from serving.protocol import ChatRequest

FILTERS = [
    {"temperature": 0.6, "top_p": 0.9}, {"temperature": 1.0}, {"temperature": 1.5, "top_k": 20, "top_p": 0.8},
    {"temperature": 1.3, "min_p": 0.05},
]  # fmt: skip


def keys_of(n):
    return torch.tensor([noise_key(seed, 7) for seed in range(n)])


def rules_of(samplers):
    return torch.tensor([each.numbers for each in samplers], dtype=torch.float64)


def kept_by(sampler, likely):
    rows = likely.view(-1, likely.shape[-1])
    return keep(rows, rules_of([sampler] * len(rows)), sampler.active).view(likely.shape)


def by_definition(logits, keys, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The ids with the largest logit + noise, of those that the filters of transformers keep."""
    kept = top_k_top_p_filtering(logits / temperature, top_k, top_p)
    kept = MinPLogitsWarper(min_p)(None, kept) if min_p else kept
    return (kept + gumbel_noise(keys, torch.arange(logits.shape[-1])[None])).argmax(-1)


def split_mix(state, number):
    """The number of SplitMix64 in Python's integers."""
    x = (state + number * 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def test_noise_is_that_of_split_mix():
    """Guards against numbers that another machine does not have: then a seed gives another text there."""
    keys = keys_of(20)
    ids = torch.tensor([[0, 1, 5, 151_935]])
    numbers = [[split_mix(key % 2**64, id_) / 2**64 for id_ in ids[0].tolist()] for key in keys.tolist()]
    assert_close(gumbel_noise(keys, ids), -torch.tensor(numbers).double().neg().log1p().neg().log().float())
    assert noise_key(42, 0) == 705804573497997020
    assert len({noise_key(seed, at) for seed in (-1, 0, 1, 2**70) for at in range(9)}) == 36


@pytest.mark.parametrize("last", [0, 2**64 - 1])
def test_noise_is_finite(last):
    """Guards against a forbidden id that is drawn, or NaN: infinite noise."""

    def unshift(x, by):
        return x ^ (x >> by) ^ (x >> 2 * by)

    key = unshift(last, 31) * pow(0x94D049BB133111EB, -1, 2**64) % 2**64
    key = unshift(unshift(key, 27) * pow(0xBF58476D1CE4E5B9, -1, 2**64) % 2**64, 30)
    assert split_mix(key, 0) == last
    noise = gumbel_noise(torch.tensor([key - 2**64 if key >= 2**63 else key]), torch.tensor([[0]]))
    assert_close(noise, torch.tensor([[-math.log(24 * math.log(2)) if last else 32 * math.log(2)]]))


def test_noise_does_not_depend_on_what_is_beside_it():
    """Guards against bits that differ by the number of ids, rows or threads: the text would, too."""
    keys = keys_of(5)
    ids = torch.randperm(40_009)[None]
    all_noise = gumbel_noise(keys, ids)
    torch.set_num_threads(3)
    try:
        assert torch.equal(gumbel_noise(keys, ids), all_noise)
    finally:
        torch.set_num_threads(1)
    for row in range(5):
        for part in (slice(0, 40_009), slice(3, 131), slice(17, 20), slice(40_008, 40_009)):
            assert torch.equal(gumbel_noise(keys[row, None], ids[:, part])[0], all_noise[row, part])


def test_samples_have_the_distribution():
    """Guards against noise of another law, and against positions or seeds whose noise is related. A million
    draws; false alarms: 1e-4 for each of three chi-square tests, fixed seeds.
    """
    logits = 1.5 * torch.randn(12, generator=torch.Generator().manual_seed(3))
    keys = torch.tensor([noise_key(seed, position) for seed in range(1000) for position in range(1000)])
    sampler = Sampler(temperature=0.8, top_p=0.95)
    tokens = torch.cat([sampler(logits.expand(len(part), -1), part) for part in keys.split(100_000)])
    filtered = top_k_top_p_filtering(logits / sampler.temperature, top_p=sampler.top_p)
    wanted = filtered.double().softmax(-1)
    tokens = tokens.view(1000, 1000).numpy()
    counts = numpy.bincount(tokens.ravel(), minlength=12)
    assert chisquare(counts[counts > 0], 1e6 * wanted[wanted > 0].numpy()).pvalue > 1e-4
    for one, other in ((tokens[:, 1:], tokens[:, :-1]), (tokens[1:], tokens[:-1])):
        table = numpy.zeros((12, 12))
        numpy.add.at(table, (one.ravel(), other.ravel()), 1)
        table = table[counts > 0][:, counts > 0]
        assert chi2_contingency(table).pvalue > 1e-4


@pytest.mark.parametrize("vocab_size", [7, 300])
@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("top_k", [0, 2, 50, 200])
@pytest.mark.parametrize("min_p", [0.0, 0.3])
def test_tokens_have_the_largest_logit_and_noise(vocab_size, top_p, top_k, min_p):
    """Guards against a nucleus among too few tokens (flat rows need more than steep ones), and against one
    token more or less than transformers keeps.
    """
    torch.manual_seed(0)
    keys = keys_of(100)
    rules = {"temperature": 0.5, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    for scale in (0.1, 4.0):
        logits = scale * torch.randn(100, vocab_size)
        assert Sampler(**rules)(logits, keys).equal(by_definition(logits, keys, **rules))


def test_a_bound_that_is_reached_exactly():
    """Guards against one token more or less, where rounding decides nothing."""
    alike = torch.full((4,), 0.25)
    assert kept_by(Sampler(top_p=0.5), alike).tolist() == [0.25, 0.25, 0, 0]
    assert kept_by(Sampler(min_p=1.0), alike).equal(alike)
    assert kept_by(Sampler(top_k=1), torch.tensor([0.4, 0.4, 0.2])).tolist() == pytest.approx([0.4, 0.4, 0])


def test_order_of_sums_does_not_matter(monkeypatch):
    """Guards against a nucleus that differs from run to run by a token."""
    cumsum = torch.Tensor.cumsum

    def in_any_order(tensor, dim, dtype=None):
        """As on a GPU: the last bits vary."""
        sums = cumsum(tensor, dim, dtype=dtype)
        return sums * (1 + torch.finfo(sums.dtype).eps * torch.randint(-8, 9, sums.shape))

    monkeypatch.setattr(torch.Tensor, "cumsum", in_any_order)
    torch.manual_seed(0)
    likely = torch.rand(64, 2**14).softmax(-1).sort(descending=True).values
    first, *again = (kept_by(Sampler(top_p=0.9), likely) for _ in range(4))
    assert all(first.equal(kept) for kept in again)


@hypothesis.given(
    st.integers(0, 2**32), st.lists(st.floats(0.02, 8.0), min_size=1, max_size=4), st.floats(0.0, 0.999)
)
@hypothesis.settings(max_examples=60)
def test_a_row_is_decided_by_itself(seed, scales, top_p):
    """Guards against ties that are cut otherwise beside a row that needs more tokens, or on a GPU."""
    torch.manual_seed(seed)
    # Eighths, steep and flat rows side by side.
    logits = (torch.randn(len(scales), 400) * torch.tensor(scales)[:, None]).mul(8).round().div(8)
    sampler = Sampler(top_p=top_p)
    keys = torch.randint(2**62, (len(scales),))
    tokens = sampler(logits, keys)
    for row, alone in enumerate(logits.split(1)):
        assert tokens[row] == sampler(alone, keys[row, None])
    rules = rules_of([sampler] * len(scales))
    assert tokens.equal(_sample_likely(logits.softmax(-1), keys, rules, sampler.active, is_partial=False))


@pytest.mark.parametrize("is_draft", [False, True])
def test_a_greedy_row_beside_a_filtered_one_has_the_largest_logit(is_draft):
    """Guards against the first of two ids whose logits differ and whose probabilities are rounded to one."""
    logits = torch.tensor([[0.0, 1e-8, -20.0]] * 2)
    first, second, _ = logits.softmax(-1)[0].tolist()
    assert first == second
    filtered = Sampler(top_p=0.9)
    rules = rules_of([Sampler(temperature=0.0), filtered])
    tokens = sample_by_rules(logits, keys_of(2), rules, filtered.active, is_draft)
    assert tokens[0] == 1


def test_drafts_of_likely_ids_are_accepted():
    """Guards against drafts with other noise than the target's: a copy of a model would be accepted less."""
    model = tiny_llama(vocab_size=300, agreement="always")
    drafts = {"exit_layer": 2, "num_speculations": 4}
    for rules in FILTERS:
        result = generate(model, PROMPT, max_steps=60, eos=[], sample=True, seed=1, **rules, **drafts)
        assert result.acceptance_rate > 0.5


def test_torchs_generator_gives_the_seed_of_a_request_without_one():
    """Guards against sampled texts that `torch.manual_seed` does not reproduce."""
    model = tiny_llama()
    texts = []
    for seed, drafts in ((0, {}), (0, LAYERS), (1, {})):
        torch.manual_seed(seed)
        requests = [Request(PROMPT)] * 3
        found = in_batch(model, requests, 2, sample=True, temperature=1.0, max_steps=20, **drafts)
        texts.append([found[index].predicted_tokens for index in range(3)])
    assert texts[0] == texts[1] != texts[2]
    assert len({*map(tuple, texts[0])}) == 3


@pytest.mark.parametrize("rule", SAMPLING_RULES)
def test_a_rule_reaches_scripts_server_and_harness(rule):
    """Guards against a rule that one of them, or the sampler, does not have."""
    from measures.harness_model import request_config

    [by_flag] = parse("test", GenerationConfig, args=[f"--{rule}", "1"])
    asked = ChatRequest(messages=[{"role": "user", "content": "x"}], **{rule: 1})
    task = {"until": [], "do_sample": True}
    configs = [
        by_flag,
        asked.generation_config(GenerationConfig()),
        request_config({**task, rule: 1}, GenerationConfig(), None),
        request_config(task, GenerationConfig(), SimpleNamespace(**{rule: 1})),
    ]
    assert [getattr(Sampler.of(config), rule) for config in configs] == [1] * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_largest_of_rows_is_torchs(dtype):
    """Guards against another id among equal scores, and against a NaN that is not seen."""
    scores = torch.randn(3, 4, 7000).to(dtype)  # bfloat16 has many equal numbers
    scores[0, 1, 5] = math.nan
    scores[1, 0] = -math.inf
    scores[2, 3, 9] = math.inf
    with torch.inference_mode():
        assert argmax(scores).equal(scores.argmax(-1))
        assert amax(scores).allclose(scores.amax(-1), rtol=0.0, equal_nan=True)


def test_filters():
    """Guards against filters in place, or of one row only. Others are tested with the sampler."""
    logits = torch.tensor([4.0, 3.0, 2.0, 0.0]).expand(2, 3, -1)
    assert (top_k_top_p_filtering(logits) == logits).all()
    for settings, kept in (
        ({"top_k": 2}, [4, 3, -9, -9]),
        ({"top_p": 0.7}, [4, 3, -9, -9]),  # with the token that crosses the threshold
        ({"top_k": 1, "top_p": 0.5, "min_tokens_to_keep": 3}, [4, 3, 2, -9]),
    ):
        assert (top_k_top_p_filtering(logits, filter_value=-9, **settings) == torch.tensor(kept)).all()


@pytest.mark.parametrize(("token_idx", "tokens"), [(0, [0]), (-1, [3]), (None, [[0, 1, 2, 3]])])
def test_decode_next_token(token_idx, tokens):
    """Guards against `if token_idx:`, which takes position 0 for None, against filters in place, and against
    other shapes than in the paper's code.
    """
    logits = torch.eye(4)[None]  # the argmax of position i is i
    found, probabilities = decode_next_token(logits, token_idx)
    assert (found.tolist(), probabilities) == (tokens, None)
    sampled, probabilities = decode_next_token(logits, token_idx, sample=True, top_k=1, top_p=0.5)
    assert sampled.flatten().tolist() == found.flatten().tolist()
    assert (sampled.shape, probabilities.shape) == ((1, found.numel()), (found.numel(), 4))
    assert torch.equal(logits, torch.eye(4)[None])


@pytest.mark.parametrize("temperature", [0, 1e-35, 1e-5, 1000])
def test_extreme_temperatures(temperature):
    """Guards against NaN by a division by zero or beyond fp32."""
    logits = torch.tensor([[-9e4, 8e4, -torch.inf]])
    for rules in ({}, {"top_p": 0.9}):
        assert Sampler(temperature=temperature, **rules)(logits, keys_of(1)).tolist() == [1]
    assert decode_next_token(logits[None], 0, True, temperature, 0, 0.9)[0].flatten().tolist() == [1]


def leaves(value, first, other=-torch.inf):
    """A processor: from a history of `first` ids on, one logit is `value` and all besides are `other`."""

    def process(ids, logits):
        if ids.shape[1] < first:
            return logits
        return torch.full_like(logits, other).index_fill_(1, torch.tensor([7]), value)

    return process


@pytest.mark.parametrize("drafts", [{}, LAYERS])
@pytest.mark.parametrize(("value", "other"), [(-torch.inf, -torch.inf), (torch.inf, 0.0)])
@pytest.mark.parametrize("first", [2, 5])
def test_logits_without_a_distribution(drafts, value, other, first):
    """Guards against the last token of the vocabulary, sampled from NaN, and against a token 0 that greedy
    decoding takes although all are forbidden.
    """
    shared = {"logits_processors": [leaves(value, first, other)], "max_steps": 8, **drafts}
    refused = pytest.raises(FloatingPointError, match=r"no token can be picked: .* processors forbid")
    with refused:
        ids_of(tiny_llama(), [5, 6], sample=True, **shared)
    with refused if value < 0 else nullcontext():
        assert set(ids_of(tiny_llama(), [5, 6], **shared)[first - 2 :]) == {7}


def test_the_penalties_of_openai():
    """Guards against another formula than logit - count * frequency - (count > 0) * presence, and against
    counts of the prompt.
    """
    processor = FrequencyPenaltyLogitsProcessor(2, frequency=0.5, presence=0.25)
    scores = processor(torch.tensor([[3, 3, 1, 0, 1]]), torch.zeros(1, 5))
    assert scores.tolist() == [[-0.75, -1.25, 0.0, 0.0, 0.0]]
    assert config_processors(GenerationConfig(), 3) == []
