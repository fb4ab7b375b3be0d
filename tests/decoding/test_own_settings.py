"""Requests of one batch that differ in length, sampling and stop conditions, or fail."""

from unittest.mock import Mock

import pytest
import torch
from conftest import ADAPTIVE, LAYERS, Recorder, in_batch, mixed_drafts, tiny_llama
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_batch import raises_from
from transformers import RepetitionPenaltyLogitsProcessor

from self_speculation import GenerationConfig, Request, Sampler
from self_speculation.decoding import batch
from self_speculation.decoding.sampling import joint_sampler
from self_speculation.decoding.sequence import Sequence

SAMPLERS = st.builds(
    Sampler,
    sample=st.booleans(),
    temperature=st.sampled_from([0.0, 1e-30, 0.3, 1.0]),
    top_k=st.sampled_from([0, 1, 3, 500]),
    top_p=st.sampled_from([0.0, 0.4, 1.0]),
    min_p=st.sampled_from([0.0, 0.2]),
)


@given(samplers=st.lists(SAMPLERS, min_size=1, max_size=5), width=st.sampled_from([(), (3,)]))
@example(samplers=[Sampler(temperature=0.3), Sampler(), Sampler(top_k=3)], width=())
def test_each_row_has_the_distribution_of_its_own_sampler(samplers, width):
    """Guards against settings of another row, and against probabilities of rows that are all greedy."""
    logits = 3 * torch.randn(len(samplers), *width, 200, generator=torch.Generator().manual_seed(0))
    joint = joint_sampler(samplers, logits.device)
    rows = [sampler.probabilities(row) for sampler, row in zip(samplers, logits, strict=True)]
    torch.testing.assert_close(joint.probabilities(logits), torch.stack(rows))
    assert joint.greedy == all(sampler.greedy for sampler in samplers)


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
            if logits.isnan().any() or (request.config.sample and logits.max().isinf()):
                return tokens, FloatingPointError()
            if (token := int(logits.argmax())) in ends:
                break
            tokens.append(token)
            for criterion in request.stopping_criteria:
                criterion(torch.tensor([[*request.prompt, *tokens]]), logits)
        except KeyError as error:
            return tokens, error
    return tokens, None


def test_the_first_error_of_a_round_counts():
    """Guards against a NaN behind it, which adds tokens that nothing has judged, against an error of the
    streamer that takes its place, and against NaN in the slot that later rounds make forget.
    """
    streamer = Mock(spec=["put", "end"], end=Mock(side_effect=ValueError))
    request = Request([5, 6], raises_from(3), streamer=streamer)
    sequence = Sequence(request, GenerationConfig(max_steps=9), 99, torch.device("cpu"))
    logits = sequence.process(torch.zeros(3, 50), 0, 3)
    sequence.check([0.0, 0.0, torch.nan])
    sequence.commit([7, 8, 9], logits)
    assert (sequence.tokens, type(sequence.result())) == ([7], KeyError)
    sequence.check([0.0])
    assert sequence.is_damaged


def test_an_error_of_a_draft_alone_does_not_count():
    """Guards against an error for logits of an early exit, in a round whose verification has none."""

    def process(_, logits):
        if logits.any():
            raise KeyError
        return logits

    sequence = Sequence(Request([5, 6], process), GenerationConfig(max_steps=9), 99, torch.device("cpu"))
    sequence.process(torch.ones(1, 50), 0, 1)
    sequence.commit([7, 8], sequence.process(torch.zeros(2, 50), 0, 2), num_drafted=1)
    assert (sequence.tokens, sequence.error) == ([7, 8], None)


def fails_from(length):
    """A stopping criterion that raises where a history has so many ids, and is never met before."""
    process = raises_from(length)
    return lambda ids, logits: process(ids, logits) is None


def meddles(how, part):
    """A processor that, after some histories, raises, returns NaN or leaves one token."""

    def process(ids, logits):
        chance = int(ids.sum())
        if chance % 7 != part:
            return logits
        if how == "raises":
            raise KeyError(how)
        if how == "NaN":
            return logits * torch.nan
        return torch.full_like(logits, -torch.inf).index_fill_(1, torch.tensor([chance % 50]), 1.0)

    return process


MEDDLES = st.builds(meddles, st.sampled_from(["raises", "NaN", "one"]), st.integers(0, 6))
PENALTY = st.builds(RepetitionPenaltyLogitsProcessor, st.sampled_from([0.7, 1.5]))
ROW = st.fixed_dictionaries(
    {
        "prompt": st.lists(st.integers(3, 40), min_size=1, max_size=9),
        "processors": st.lists(MEDDLES | PENALTY, max_size=2),
        "criteria": st.lists(st.builds(fails_from, st.integers(2, 16)), max_size=1),
        "streamer": st.builds(Recorder, st.sampled_from([99, 99, 0, 1, 5])),
        "own": st.fixed_dictionaries(
            {
                "max_steps": st.sampled_from([16, 8, 3, 1]),
                "sample": st.booleans(),
                "top_k": st.sampled_from([0, 1, 5]),
                "top_p": st.sampled_from([0.5, 1.0]),
            }
        ),
    }
)


@mixed_drafts("exit 2", "n-grams")
@given(
    rows=st.lists(ROW, min_size=1, max_size=6),
    batch_size=st.integers(1, 4),
    ends=st.lists(st.integers(2, 49), max_size=2),
    drafts=st.one_of(
        st.sampled_from([{}, ADAPTIVE]),
        st.builds(
            lambda length, lookup: {**LAYERS, "num_speculations": length, "prompt_lookup": lookup},
            st.integers(1, 7),
            st.sampled_from([0, 2]),
        ),
    ),
    agreement=st.sampled_from(["always", "sometimes", "never"]),
    late=st.booleans(),
)
@settings(max_examples=80)
def test_mixed_rows_end_where_plain_decoding_does(rows, batch_size, ends, drafts, agreement, late):
    """Guards against a drafted token that ends or changes an output of any row because processors raise or
    change logits there, against an output that goes on where draft and target are both NaN, against an error
    that reaches another row, that of a streamer too, and against a streamer that does not show all tokens
    before an error. With top-k 1, sampling is deterministic.
    """
    decoded = tiny_llama(agreement=agreement)
    requests = [
        Request(
            row["prompt"],
            row["processors"],
            row["criteria"],
            streamer=row["streamer"],
            seed=0,
            eos_token_ids=ends,
            config=GenerationConfig(**row["own"]),
        )
        for row in rows
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch, "reads_late", lambda device: late)
        got = in_batch(decoded, requests, batch_size, **drafts)
    for index, request in enumerate(requests):
        if request.streamer.has_raised:
            assert isinstance(got[index], KeyError)
        elif not request.config.sample or request.config.top_k == 1:
            tokens, error = plainly(decoded, request, ends)
            assert (request.streamer.decided, request.streamer.drafts) == (tokens, [])
            assert type(got[index]) is type(error) if error else got[index].predicted_tokens == tokens
