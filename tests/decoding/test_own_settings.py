"""Errors of one request. Batches are in test_same_answers.py."""

from unittest.mock import Mock

import torch
from hypothesis import example, given
from hypothesis import strategies as st
from test_batch import raises_from

from self_speculation import GenerationConfig, Request, Sampler
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


@given(samplers=st.lists(SAMPLERS, min_size=1, max_size=5), width=st.integers(1, 3))
@example(samplers=[Sampler(temperature=0.3), Sampler(), Sampler(top_k=3)], width=1)
def test_each_row_has_its_own_sampler(samplers, width):
    """Guards against settings of another row, and against noise for rows that are all greedy."""
    chance = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(len(samplers), width, 200, generator=chance)
    keys = torch.randint(2**62, (len(samplers), width), generator=chance)
    joint = joint_sampler(samplers, logits.device)
    rows = [sampler(*row) for sampler, *row in zip(samplers, logits, keys, strict=True)]
    assert joint(logits, keys).equal(torch.stack(rows))
    drafts = [sampler.draft(*row) for sampler, *row in zip(samplers, logits, keys, strict=True)]
    assert joint.draft(logits[:, 0], keys[:, 0]).equal(torch.stack(drafts)[:, 0])
    assert joint.greedy == all(sampler.greedy for sampler in samplers)


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
