"""What rejection sampling would have accepted in the rounds of an answer."""

import pytest
import torch
from conftest import PROMPT, config_of, tiny_llama

from measures import rejection
from self_speculation import Request, Sampler


def test_expected_acceptance_is_that_of_rejection_sampling():
    """Guards against distributions of other positions or without the temperature, and against a product of
    sums of minima, which is no expectation: the second token's chances depend on the first one.
    """
    model = tiny_llama(vocab_size=16)
    config = config_of(exit_layer=2, num_speculations=2, sample=True, temperature=1.5, top_p=1.0)
    first = 7
    answers = [[first, second, 5] for second in range(16)]
    ids = torch.tensor([[*PROMPT, *answer] for answer in answers])
    with torch.inference_mode():
        found = model(ids, output_hidden_states=True)
        early = model.lm_head(model.model.norm(found.hidden_states[2]))
    p, q = ((logits[:, len(PROMPT) :] / 1.5).softmax(-1) for logits in (found.logits, early))
    minima = torch.minimum(p, q)  # [answer, position, V]
    expected = minima[0, 0].sum() + (minima[0, 0] * minima[:, 1].sum(-1)).sum()
    mean = 0.0
    for second, answer in enumerate(answers):
        counts = rejection.replay(model, config, Request(PROMPT, seed=1), answer, max_tokens=4)
        again = counts["num_drafted"] == 3  # the first round has rejected, and a second one follows
        of_first_round = counts["accepted_by_rejection"] - again * float(minima[second, 1].sum())
        mean += float(p[0, 0, second]) * of_first_round
    assert mean == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("rules", [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.2}, {"temperature": 0.1}])
def test_probabilities_are_those_that_the_sampler_draws_by(rules):
    """Guards against a rule that is left out, and probabilities whose sum is not 1."""
    sampler = Sampler(**rules)
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0))
    found = rejection.probabilities(sampler, logits)[0]
    drawn = sampler(logits.expand(4000, -1), torch.arange(4000)).bincount(minlength=12) / 4000
    assert float(found.sum()) == pytest.approx(1)
    assert torch.equal(found > 0, drawn > 0) or "temperature" in rules
    assert float((found - drawn).abs().max()) < 0.04
