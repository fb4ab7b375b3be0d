"""Compiled passes: the ids of eager ones, and one compilation for all prompts."""

import copy
from functools import partial

import pytest
import torch
from conftest import generate, tiny_llama

from self_speculation.model.compiled_runner import CompiledRunner, compile_decoding, make_runner
from self_speculation.model.fused_layers import fuse

PROMPTS = [[5, 9, 4, 7, 7, 3], [8, 3, 11], list(range(3, 40))]
SHORT = {"exit_layer": 2, "num_speculations": 3, "draft_vocabulary": 20}
STRATEGIES = [{}, {"exit_layer": 2, "num_speculations": 3}, SHORT]


@pytest.mark.parametrize("fused", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_same_ids_and_no_compilation_for_another_prompt(fused, backend, monkeypatch):
    """Guards against a position, a length or a stride that is traced as a constant: the outputs would differ,
    or every prompt would compile anew. What is traced is the same whichever backend compiles it.
    """
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    model = copy.deepcopy(tiny_llama())
    if fused:
        fuse(model)
    settings = [{"max_steps": steps, "eos": [], **strategy} for strategy in STRATEGIES for steps in (5, 16)]
    expected = [[generate(model, p, **s).predicted_tokens for s in settings] for p in PROMPTS]
    compile_decoding(model)
    assert isinstance(make_runner(model, 1, 10), CompiledRunner)
    assert [generate(model, PROMPTS[0], **s).predicted_tokens for s in settings] == expected[0]
    with torch._dynamo.config.patch(error_on_recompile=True):
        answers = [[generate(model, p, **s).predicted_tokens for s in settings] for p in PROMPTS]
    assert answers == expected


@pytest.mark.parametrize("num_speculations", [57, 63])
def test_drafts_at_the_end_of_the_context(num_speculations, monkeypatch):
    """Guards against a static cache that is told to be larger than it is, when an answer can come to the end
    of the context: with 57 to 63 drafts it took itself for the larger one that this answer needs.
    """
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr("self_speculation.model.compiled_runner._SMALLEST_CAPACITY", 128)
    model = copy.deepcopy(tiny_llama(agreement="always", exit_layer=1))
    prompt, how = list(range(3, 43)) * 5, {"max_steps": 100, "eos": []}
    expected = generate(model, prompt, **how)
    assert expected.stop_reason == "context"
    compile_decoding(model)
    drafts = {"exit_layer": 1, "num_speculations": num_speculations}
    assert generate(model, prompt, **how, **drafts).predicted_tokens == expected.predicted_tokens


def hooked(model):
    model.model.layers[1].register_forward_hook(lambda module, inputs, output: -output)


def adapted(model):
    """As peft wraps a projection."""

    class Adapter(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) * 2

    model.model.layers[1].mlp.down_proj = Adapter(model.model.layers[1].mlp.down_proj)


def taken_from_a_vector(model):
    vector = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    torch.nn.utils.vector_to_parameters(vector * torch.rand_like(vector), model.parameters())


CHANGES = {
    "from a vector": taken_from_a_vector,
    "assigned": lambda model: model.load_state_dict(tiny_llama(agreement="never").state_dict(), assign=True),
    "pointed elsewhere": lambda model: setattr(
        model.model.layers[1].mlp.down_proj.weight, "data", torch.ones(32, 48)
    ),
    "fused again": fuse,
    "hooked": hooked,
    "adapted": adapted,
    "dtype": lambda model: model.to(torch.float64),
    "turned": lambda model: model.model.rotary_emb.inv_freq.mul_(2),
    "scaled": lambda model: setattr(model.model.layers[1].self_attn, "scaling", 0.1),
}
QUICK = ("assigned", "pointed elsewhere", "fused again", "hooked", "turned")


@pytest.mark.parametrize(
    ("change", "fused"),
    [
        *((change, True) for change in QUICK),
        *(pytest.param(change, True, marks=pytest.mark.slow) for change in CHANGES if change not in QUICK),
        *(pytest.param(change, False, marks=pytest.mark.slow) for change in CHANGES),
    ],
)
def test_a_changed_model_is_compiled_anew(change, fused, monkeypatch):
    """Guards against kept passes that decode with the weights, or without the hooks, of before."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model = copy.deepcopy(tiny_llama())
    if fused:
        fuse(model)
    compile_decoding(model)
    shared = {"max_steps": 9, "eos": []}
    for strategy in STRATEGIES:
        generate(model, PROMPTS[0], **shared, **strategy)
    CHANGES[change](model)
    twin = copy.deepcopy(model)  # neither fused nor compiled
    for strategy in STRATEGIES:
        found = generate(model, PROMPTS[0], **shared, **strategy).predicted_tokens
        assert found == generate(twin, PROMPTS[0], **shared).predicted_tokens


def test_drafts_by_other_layers_are_refused():
    """Guards against drafts that the compiled passes make with the model's own layers, unnoticed."""
    model = copy.deepcopy(tiny_llama(fused=True))
    fuse(model)
    compile_decoding(model)
    with pytest.raises(ValueError, match="draft_weights: no copies of layers with compile True"):
        generate(model, PROMPTS[0], exit_layer=2, num_speculations=2, draft_weights="int4")


def test_without_a_compiler_it_is_refused_beforehand():
    """Guards against a page of traceback in the middle of the first answer."""
    missing = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with missing, pytest.raises(ValueError, match="compile True: needs a C"):
        compile_decoding(tiny_llama())
