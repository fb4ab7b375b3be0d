"""Logits to tokens, and the accept rule, as functions of tensors."""

from functools import partial
from types import SimpleNamespace

import hypothesis
import pytest
import torch
from conftest import LAYERS, assert_close, generate, ids_of, tiny_llama
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MinPLogitsWarper

from arguments import parse
from self_speculation import self_speculation_generator
from self_speculation.config import SAMPLING_RULES, GenerationConfig
from self_speculation.decoding import sampling
from self_speculation.decoding.request import FrequencyPenaltyLogitsProcessor, config_processors
from self_speculation.decoding.sampling import (
    Sampler,
    decode_next_token,
    draw,
    top_k_top_p_filtering,
    verify_draft,
)
from self_speculation.drafts.draft import Draft
from serving.protocol import ChatRequest

SAMPLING = Sampler(sample=True)


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


def test_a_bound_that_is_reached_exactly():
    """Guards against one token more or less, where rounding decides nothing."""
    alike = torch.zeros(4)
    assert Sampler(True, top_p=0.5).probabilities(alike).tolist() == [0.5, 0.5, 0.0, 0.0]
    assert Sampler(True, min_p=1.0).probabilities(alike).tolist() == [0.25] * 4


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


def test_order_of_sums_does_not_matter(monkeypatch):
    """Guards against a nucleus that differs from run to run by a token."""
    cumsum = torch.Tensor.cumsum

    def in_any_order(tensor, dim, dtype=None):
        """As on a GPU: the last bits vary."""
        sums = cumsum(tensor, dim, dtype=dtype)
        return sums * (1 + torch.finfo(sums.dtype).eps * torch.randint(-8, 9, sums.shape))

    monkeypatch.setattr(torch.Tensor, "cumsum", in_any_order)
    torch.manual_seed(0)
    probabilities = torch.rand(64, 2**14).softmax(-1)
    one, *others = (sampling.nucleus(probabilities, 0.9, allow_sync=False) > 0 for _ in range(4))
    assert all(one.equal(other) for other in others)


@pytest.mark.parametrize("vocab_size", [7, 300])
@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("top_k", [0, 2, 50])
@pytest.mark.parametrize("min_p", [0.0, 0.3])
@pytest.mark.parametrize("allow_sync", [True, False])
def test_probabilities_are_those_of_transformers(vocab_size, top_p, top_k, min_p, allow_sync, monkeypatch):
    """Guards against a nucleus among too few tokens (flat rows need more than steep ones), and against one
    token more or less. Logits are eighths, so that there are ties. No sum of probabilities is within 2e-5 of
    a threshold, so rounding decides nothing.
    """
    torch.manual_seed(0)
    nucleus = partial(sampling.nucleus, allow_sync=allow_sync)  # False: on a GPU
    monkeypatch.setattr(sampling, "nucleus", nucleus)
    for scale in (0.1, 4.0):
        logits = (torch.randn(3, vocab_size) * scale).mul(8).round().div(8)
        kept = top_k_top_p_filtering(logits / 0.5, top_k, top_p)
        wanted = (MinPLogitsWarper(min_p)(None, kept) if min_p else kept).softmax(-1)
        got = Sampler(True, 0.5, top_k, top_p, min_p).probabilities(logits)
        # Sorted: transformers leaves out other ones of several equal tokens.
        assert torch.equal((got > 0).sum(-1), (wanted > 0).sum(-1))
        assert_close(got.sort(-1).values, wanted.sort(-1).values)


class Sorts(TorchDispatchMode):
    """Counts rows that are sorted as a whole."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket is torch.ops.aten.sort:
            self.number += args[0].shape[:-1].numel()
        return function(*args, **(kwargs or {}))


def test_drafts_sort_no_vocabulary(monkeypatch):
    """Guards against a GPU that sorts the vocabulary for each drafted token, as verification does."""
    monkeypatch.setattr(sampling, "nucleus", partial(sampling.nucleus, allow_sync=False))
    model, drafts = tiny_llama(vocab_size=300), {"exit_layer": 2, "num_speculations": 3}
    with Sorts() as sorts:
        result = generate(model, [5, 6, 7], eos=[], sample=True, top_p=0.9, temperature=0.5, **drafts)
    assert result.num_drafted
    assert sorts.number == 1 + result.num_drafted + result.num_verifications  # the prompt's, the targets'


@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])
def test_a_draft_keeps_the_likely_tokens(scale):
    """Guards against another q than the target's where that has few tokens, and against one of no tokens or
    with less than all of the probability where it has many.
    """
    torch.manual_seed(0)
    logits, sampler = torch.randn(3, 1000) * scale, Sampler(True, top_p=0.95)
    own, targets = sampler.probabilities(logits, is_draft=True), sampler.probabilities(logits)
    torch.testing.assert_close(own.sum(-1), torch.ones(3))
    assert (own > 0).sum(-1).equal((targets > 0).sum(-1).clamp(max=128))
    assert ((own > 0) <= (targets > 0)).all()
    if scale == 8:
        assert own.equal(targets)


@hypothesis.given(
    st.integers(0, 2**32),
    st.lists(st.floats(0.02, 8.0), min_size=1, max_size=4),
    st.floats(0.0, 0.999),
    st.booleans(),
)
@hypothesis.settings(max_examples=60)
def test_equal_tokens_are_kept_by_lowest_id(seed, scales, top_p, allow_sync):
    """Guards against ties that are cut otherwise beside a row that needs more tokens, or on a GPU."""
    torch.manual_seed(seed)
    # Eighths, steep and flat rows side by side.
    logits = (torch.randn(len(scales), 400) * torch.tensor(scales)[:, None]).mul(8).round().div(8)
    probabilities = logits.softmax(-1)
    kept = sampling.nucleus(probabilities, top_p, allow_sync)
    for row, alone in enumerate(probabilities.split(1)):
        assert kept[row].equal(sampling.nucleus(alone, top_p, allow_sync)[0])
        assert (kept[row] > 0).equal(sampling.nucleus(alone, top_p, not allow_sync)[0] > 0)
        for value in alone[0].unique():
            is_kept = kept[row][alone[0] == value] > 0  # in order of ids
            assert is_kept.equal(is_kept.sort(descending=True).values)


def test_draws_follow_the_weights():
    """Guards against a token of weight zero, at either end too, against weights that must sum to 1, and
    against sums that leave out unlikely tokens.
    """
    edges = torch.tensor([0.0, 1.0 - 1e-9], dtype=torch.float64)
    assert draw(torch.tensor([[0.0, 1.0, 0.0], [1.0, 2e-9, 0.0]]), edges).tolist() == [1, 1]
    torch.manual_seed(0)
    drawn = draw(torch.tensor([0.0, 1.0, 0.0, 2.0, 1.0, 0.0]).expand(4000, -1))
    counts = torch.bincount(drawn, minlength=6)
    assert counts[[0, 2, 5]].tolist() == [0, 0, 0]
    assert chisquare(counts[[1, 3, 4]], [1000, 2000, 1000]).pvalue > 1e-4


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
    probabilities = Sampler(temperature=temperature).probabilities(torch.tensor([-9e4, 8e4, -torch.inf]))
    assert probabilities.tolist() == [0, 1, 0]


def test_each_number_of_a_round_is_used_once(monkeypatch):
    """Guards against a next token that depends on an acceptance. A short draft leaves some numbers unused."""
    given, batch = [], SimpleNamespace(sampler=SAMPLING)
    monkeypatch.setattr(self_speculation_generator, "verify_draft", lambda *args: given.append(args[-1]))
    draft = Draft(["x"], torch.zeros(1, 2, dtype=torch.long), None, [2])
    self_speculation_generator.verify(batch, draft, torch.zeros(1, 3, 4), torch.tensor([[1, 2, 3, 4]]))
    assert given[0].tolist() == [[1, 2, 4]]


@pytest.mark.parametrize("q", [[0.4, 0.3, 0.2, 0.1], [1, 0, 0, 0], [0, 0.5, 0.5, 0]])
@pytest.mark.parametrize("p", [[0.125, 0.1875, 0.25, 0.4375], [0, 0.2, 0.3, 0.5]])
def test_accept_rule_gives_the_targets_distribution(p, q):
    """Guards against a rule that accepts everything or resamples from the target. False alarms: 1e-4 for each
    case, fixed seed.
    """
    torch.manual_seed(1)
    p, q = torch.tensor(p), torch.tensor(q).float()
    x = torch.multinomial(q, 2000, replacement=True)[:, None]
    found = verify_draft(x, q.expand(2000, 1, 4), p.log().expand(2000, 2, 4), SAMPLING)
    counts = torch.bincount(torch.where(found.num_accepted > 0, x[:, 0], found.next_token), minlength=4)
    assert counts[p == 0].sum() == 0
    wanted = p[p > 0].double()
    assert chisquare(counts[p > 0], 2000 * wanted / wanted.sum()).pvalue > 1e-4
    own = torch.multinomial(p, 3, replacement=True)
    assert int(verify_draft(own, p.expand(3, 4), p.log().expand(4, 4), SAMPLING).num_accepted) == 3


def leaves(value, first, other=-torch.inf):
    """A processor: from a history of `first` ids on, one logit is `value` and the others are `other`."""

    def process(ids, logits):
        if ids.shape[1] < first:
            return logits
        return torch.full_like(logits, other).index_fill_(1, torch.tensor([7]), value)

    return process


@pytest.mark.parametrize("drafts", [{}, LAYERS])
@pytest.mark.parametrize(("value", "other"), [(-torch.inf, -torch.inf), (torch.inf, 0.0)])
@pytest.mark.parametrize("first", [2, 5])
def test_logits_without_a_distribution(drafts, value, other, first):
    """Guards against the last token of the vocabulary, sampled from NaN. Like `generate` of transformers, we
    raise an error if we sample, and take the first of the largest logits if not.
    """
    shared = {"logits_processors": [leaves(value, first, other)], "max_steps": 8, **drafts}
    with pytest.raises(FloatingPointError, match=r"cannot sample: .* do logits processors forbid"):
        ids_of(tiny_llama(), [5, 6], sample=True, **shared)
    tokens = ids_of(tiny_llama(), [5, 6], **shared)
    assert set(tokens[first - 2 :]) == {7 if value > 0 else 0}


def test_no_confidence_without_a_distribution():
    """Guards against NaN in statistics of drafts, where all ids are forbidden."""
    nothing = torch.full((1, 5), -torch.inf)
    sampler = Sampler(sample=False)
    assert sampler.confidence(sampler(nothing), nothing).tolist() == [0.0]


def test_the_penalties_of_openai():
    """Guards against another formula than logit - count * frequency - (count > 0) * presence, and against
    counts of the prompt.
    """
    processor = FrequencyPenaltyLogitsProcessor(2, frequency=0.5, presence=0.25)
    scores = processor(torch.tensor([[3, 3, 1, 0, 1]]), torch.zeros(1, 5))
    assert scores.tolist() == [[-0.75, -1.25, 0.0, 0.0, 0.0]]
    assert config_processors(GenerationConfig(), 3) == []
