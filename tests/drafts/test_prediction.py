"""Predicted outputs: an answer that resembles a text drafts most of itself, and stays the model's own."""

import pytest
from conftest import ADAPTIVE, LAYERS, PROMPT, generate, ids_of, in_batch, mixed_drafts, tiny_llama

from self_speculation import Request


@mixed_drafts("prediction")
@pytest.mark.parametrize("how", [ADAPTIVE, {**LAYERS, "prompt_lookup": 2}])
def test_the_ids_are_the_models_own(how):
    """Whatever is predicted: the answer itself, a variant of it, or something else."""
    model, shared = tiny_llama(), {"max_steps": 30, "eos": []}
    plain = ids_of(model, **shared)
    for prediction, least in ((plain, 16), ([*plain[:9], 1, *plain[12:]], 1), ([49] * 40, 0), ([], 0)):
        result = generate(model, PROMPT, prediction=prediction, **shared, **how)
        assert result.predicted_tokens == plain
        counts = result.drafts_by_source.get("prediction")
        accepted = counts.accepted if counts else 0
        assert accepted >= least if least else accepted == 0


@pytest.mark.parametrize("how", [ADAPTIVE, {**LAYERS, "prompt_lookup": 2}])
@pytest.mark.parametrize("unknown", [50, -1, 10**6])
def test_ids_that_the_model_lacks(how, unknown):
    """Guards against a prediction that fails the whole batch, and on a GPU ends the process."""
    model, shared = tiny_llama(), {"max_steps": 12}
    plain = ids_of(model, **shared)
    requests = [Request(PROMPT, prediction=[*plain[:5], unknown, *plain[6:]]), Request(PROMPT[:4])]
    found = in_batch(model, requests, 2, **shared, **how)
    assert found[0].predicted_tokens == plain
    assert found[1].predicted_tokens == ids_of(model, PROMPT[:4], **shared)
    assert found[0].drafts_by_source["prediction"].accepted
