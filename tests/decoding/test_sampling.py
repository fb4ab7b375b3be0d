"""Logits to tokens, and the accept rule, as functions of tensors."""

from functools import partial

import pytest
import torch
from conftest import generate, tiny_llama
from scipy.stats import chisquare
from transformers import MinPLogitsWarper

from self_speculation.decoding import sampling
from self_speculation.decoding.sampling import (
    Sampler,
    decode_next_token,
    draw,
    top_k_top_p_filtering,
    verify_draft,
)

GREEDY = Sampler(sample=False)
SAMPLING = Sampler(sample=True)


@pytest.mark.parametrize(
    ("settings", "filtered"),
    [
        ({}, [4, 3, 2, 0]),
        ({"top_k": 9}, [4, 3, 2, 0]),
        ({"top_k": 2}, [4, 3, -9, -9]),
        ({"top_p": 0.6}, [4, -9, -9, -9]),
        ({"top_p": 0.7}, [4, 3, -9, -9]),  # with the token that crosses the threshold
        ({"top_p": 0.0}, [4, -9, -9, -9]),
        ({"top_k": 1, "top_p": 0.5, "min_tokens_to_keep": 3}, [4, 3, 2, -9]),
    ],
)
def test_filters(settings, filtered):
    """Guards against a filter that ignores its threshold, the filter value or leading dimensions."""
    logits = torch.tensor([4.0, 3.0, 2.0, 0.0]).expand(2, 3, -1)
    assert (top_k_top_p_filtering(logits, filter_value=-9.0, **settings) == torch.tensor(filtered)).all()


@pytest.mark.parametrize("vocab_size", [7, 300])
@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("top_k", [0, 2, 50])
@pytest.mark.parametrize("min_p", [0.0, 0.3])
@pytest.mark.parametrize("may_look", [True, False])
def test_probabilities_are_those_of_transformers(vocab_size, top_p, top_k, min_p, may_look, monkeypatch):
    """Guards against a nucleus among too few tokens (flat rows need more than steep ones), and against one
    token more or less. Logits are eighths, so that there are ties, except where a GPU would cut them off. No
    sum of probabilities is within 2e-5 of a threshold, so rounding decides nothing.
    """
    torch.manual_seed(0)
    monkeypatch.setattr(sampling, "nucleus", partial(sampling.nucleus, may_look=may_look))  # False: on a GPU
    for scale in (0.1, 4.0):
        logits = torch.randn(3, vocab_size) * scale
        if may_look or not top_k:
            logits = logits.mul(8).round().div(8)
        kept = top_k_top_p_filtering(logits / 0.5, top_k, top_p)
        wanted = (MinPLogitsWarper(min_p)(None, kept) if min_p else kept).softmax(-1)
        got = Sampler(True, 0.5, top_k, top_p, min_p).probabilities(logits)
        # Sorted: any of several equal tokens may be left out.
        torch.testing.assert_close(got.sort(-1).values, wanted.sort(-1).values, rtol=1e-5, atol=1e-7)


def test_draws_follow_the_weights():
    """Guards against a token of weight zero, at either end too, and against weights that must sum to 1."""
    torch.manual_seed(0)
    drawn = draw(torch.tensor([0.0, 1.0, 0.0, 2.0, 1.0, 0.0]).expand(4000, -1))
    counts = torch.bincount(drawn, minlength=6)
    assert counts[[0, 2, 5]].tolist() == [0, 0, 0]
    assert chisquare(counts[[1, 3, 4]], [1000, 2000, 1000]).pvalue > 1e-4


@pytest.mark.parametrize("sample", [False, True])
def test_decode_next_token_does_not_change_its_input(sample):
    """Guards against filters in place, after which verification would read other logits."""
    logits = torch.randn(1, 4, 9)
    before = logits.clone()
    decode_next_token(logits, token_idx=-1, sample=sample, top_k=2, top_p=0.5)
    decode_next_token(logits, sample=sample)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(("token_idx", "tokens"), [(0, [0]), (-1, [3]), (None, [[0, 1, 2, 3]])])
def test_decode_next_token_at_a_position(token_idx, tokens):
    """Guards against `if token_idx:`, which takes position 0 for None."""
    logits = torch.eye(4)[None]  # the argmax of position i is i
    found, probabilities = decode_next_token(logits, token_idx=token_idx)
    assert (found.tolist(), probabilities) == (tokens, None)


@pytest.mark.parametrize("token_idx", [None, 0, -1])
@pytest.mark.parametrize("num_positions", [1, 3])
def test_decode_next_token_returns_the_distribution(token_idx, num_positions):
    """Guards against probabilities of other positions, and against other shapes than in the paper's code."""
    logits = torch.randn(1, num_positions, 8)
    tokens, probabilities = decode_next_token(logits, token_idx, sample=True, top_k=2)
    n = 1 if token_idx is not None else num_positions
    assert (tokens.shape, probabilities.shape) == ((1, n), (n, 8))
    assert (probabilities > 0).sum(-1).eq(2).all()
    assert probabilities.gather(-1, tokens.T).gt(0).all()


def test_temperature_zero_is_greedy_and_a_tiny_one_does_not_overflow():
    """Guards against NaN by a division by zero or beyond fp32."""
    logits = torch.tensor([[-90000.0, 80000.0, 79999.0]])
    assert Sampler(sample=True, temperature=0)(logits).tokens.tolist() == [1]
    assert Sampler(temperature=1e-30).probabilities(logits).tolist() == [[0, 1, 0]]


def rows(*tokens, vocab=5):
    """Logits whose argmax at each row is the given token."""
    return torch.nn.functional.one_hot(torch.tensor(tokens), vocab).float()


@pytest.mark.parametrize(
    ("draft", "target", "accepted", "following"),
    [
        ([1, 2, 3], [1, 2, 3, 4], 3, 4),  # all accepted: one more token from the last row
        ([1, 2, 3], [0, 2, 3, 4], 0, 0),  # none, although later ones agree
        ([1, 2, 3], [1, 0, 3, 4], 1, 0),  # up to the first difference only
        ([], [3], 0, 3),  # an empty draft is a plain step
    ],
)
def test_greedy_verification(draft, target, accepted, following):
    """Guards against a wrong prefix, and against a next token from another row."""
    found = verify_draft(torch.tensor(draft, dtype=torch.long), None, rows(*target), GREEDY)
    assert (int(found.num_accepted), int(found.next_token)) == (accepted, following)


def draws(p, q, n):
    """Counts of the first token of n drafts and verifications."""
    counts = torch.zeros(len(p), dtype=torch.long)
    target = torch.stack([p, p]).log()
    for _ in range(n):
        x = torch.multinomial(q, 1)
        found = verify_draft(x, q[None], target, SAMPLING)
        counts[int(x if found.num_accepted else found.next_token)] += 1
    return counts


P = torch.tensor([0.125, 0.1875, 0.25, 0.4375])


@pytest.mark.parametrize("q", [[0.4, 0.3, 0.2, 0.1], [1.0, 0, 0, 0], [0.1, 0.2, 0.3, 0.4], [0, 0.5, 0.5, 0]])
def test_accept_rule_gives_the_targets_distribution(q):
    """False alarms: 1e-4 for each q, fixed seed. With 2000 draws, a rule that accepts everything is found
    with a probability above 0.95 for each q, and one that resamples from the target with one above 0.999,
    except for the third q: it is so close to P that hardly any token is rejected.
    """
    torch.manual_seed(1)
    counts = draws(P, torch.tensor(q), 2000)
    assert chisquare(counts.numpy(), P.double().numpy() * 2000).pvalue > 1e-4


def test_a_rejected_token_of_probability_zero_is_never_output():
    """Guards against `u * q <= p`, which accepts it when u is 0, and against a residual of 0 as divisor."""
    torch.manual_seed(1)
    p, q = torch.tensor([0.0, 0.5, 0.5]), torch.tensor([0.5, 0.25, 0.25])
    assert draws(p, q, 500)[0] == 0


def test_tokens_of_the_target_itself_are_always_accepted():
    """Guards against rejections by rounding."""
    torch.manual_seed(1)
    for _ in range(200):
        x = torch.multinomial(P, 3, replacement=True)
        assert int(verify_draft(x, P.expand(3, 4), P.expand(4, 4).log(), SAMPLING).num_accepted) == 3


DRAFTS = [{}, {"exit_layer": 2, "num_speculations": 2}]


def leaves(value, first, other=-torch.inf):
    """A processor: from a history of `first` ids on, one logit is `value` and the others are `other`."""

    def process(ids, logits):
        if ids.shape[1] < first:
            return logits
        return torch.full_like(logits, other).index_fill_(1, torch.tensor([7]), value)

    return process


@pytest.mark.parametrize("drafts", DRAFTS)
@pytest.mark.parametrize(("value", "other"), [(-torch.inf, -torch.inf), (torch.inf, 0.0)])
@pytest.mark.parametrize("first", [2, 5])
def test_logits_without_a_distribution(drafts, value, other, first):
    """Guards against the last token of the vocabulary, sampled from NaN. Like `generate` of transformers, we
    raise an error if we sample, and take the first of the largest logits if not.
    """
    shared = {"logits_processors": [leaves(value, first, other)], "max_steps": 8, "eos": [], **drafts}
    with pytest.raises(FloatingPointError, match=r"no token can be drawn: .* logits processors leave"):
        generate(tiny_llama(), [5, 6], sample=True, **shared)
    tokens = generate(tiny_llama(), [5, 6], **shared).predicted_tokens
    assert set(tokens[first - 2 :]) == {7 if value > 0 else 0}


@pytest.mark.parametrize("drafts", DRAFTS)
def test_logits_after_the_end_need_no_distribution(drafts):
    """Guards against an error at a drafted token after the end of the output."""
    processors = [leaves(0.0, 4), leaves(-torch.inf, 5)]
    for sample in (True, False):
        result = generate(
            tiny_llama(), [5, 6], sample=sample, logits_processors=processors, max_steps=9, eos=[7], **drafts
        )
        assert (len(result.predicted_tokens), result.stop_reason) == (2, "eos")
