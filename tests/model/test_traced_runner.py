"""Passes as single calls of TorchScript: the very numbers of the layers, and never those of other weights."""

import copy
import gc
import weakref

import pytest
import torch
from conftest import EOS, generate, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef

from self_speculation.drafts.policy import AdaptivePolicy
from self_speculation.model import linear, traced_runner
from self_speculation.model.fused_layers import NARROW, fuse, fused_model
from self_speculation.model.int4_linear import Int4Linear
from self_speculation.model.model_runner import ModelRunner, forward_early, forward_remainder
from self_speculation.model.traced_runner import TracedRunner, trace_at_once

PROMPT = [5, 9, 4, 7, 7, 3]
DRAFTS = {"exit_layer": 2, "num_speculations": 3}
STRATEGIES = [
    {},
    {"exit_layer": 2},
    DRAFTS,
    {**DRAFTS, "prompt_lookup": 2, "draft_confidence": "auto"},
    {"exit_layer": 4, "num_speculations": 3, "draft_weights": "int4"},
    {"strategy": "adaptive", "draft_weights": "int4"},
    {**DRAFTS, "num_speculations": NARROW + 3},
]


@pytest.fixture(autouse=True)
def nothing_is_packed(monkeypatch):
    """TorchScript does not take oneDNN's tensors, so packed widths are not traced_runner."""
    monkeypatch.setattr(linear.Linear, "can_be_packed", False)


@pytest.fixture(params=["float32", "in 16 bits", "bfloat16"])
def model(request):
    """Whose passes are traced when they first run."""
    model = copy.deepcopy(tiny_llama())
    if request.param != "float32":
        model.to(torch.bfloat16)
    fuse(model, fp32_activations=request.param == "in 16 bits")
    trace_at_once(model)
    return model


def num_traces(model):
    return len(traced_runner._TRACES[model].made) if model in traced_runner._TRACES else 0


def untraced(model):
    """The same, by passes that are never traced_runner."""
    twin = copy.deepcopy(model)
    fuse(twin, fp32_activations=traced_runner.ModelRunner(model, 1, 1).dtype != model.dtype)
    return twin


@settings(max_examples=30)
@given(
    widths=st.lists(st.integers(1, NARROW + 1), min_size=1, max_size=5),
    exit_layer=st.integers(1, 3),
    prompt_length=st.integers(1, 9),
    back=st.integers(0, 2),
)
def test_every_bit_is_that_of_the_layers(widths, exit_layer, prompt_length, back):
    """Guards against a width or a length that became a constant of the trace."""
    decoders = [ModelRunner(MODEL, prompt_length, 200), TracedRunner(MODEL, prompt_length, 200)]
    with torch.inference_mode():
        found = [[forward_early(d, torch.arange(5, 5 + prompt_length)[None], 4).logits] for d in decoders]
        for width in widths:
            ids = torch.arange(9, 9 + width)[None]
            for runner, results in zip(decoders, found, strict=True):
                early = forward_early(runner, ids, exit_layer, 1)
                late = forward_remainder(runner, early.hidden, exit_layer)
                runner.cache.rollback(min(back, width))
                results += [early.hidden, late.logits]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


MODEL = copy.deepcopy(tiny_llama())
fuse(MODEL)
trace_at_once(MODEL)


@pytest.mark.parametrize("how", STRATEGIES)
def test_the_same_ids(model, how):
    """Guards against traces of layers that are not those that draft, or verify."""
    expected = generate(untraced(model), PROMPT, max_steps=40, eos=[], **how).predicted_tokens
    assert generate(model, PROMPT, max_steps=40, eos=[], **how).predicted_tokens == expected
    assert num_traces(model)


def written_through_data(model):
    model.model.layers[3].self_attn.v_proj.weight.data[1] = 2.0


def pointed_elsewhere(model):
    model.model.layers[0].mlp.gate_proj.weight.data = torch.ones_like(
        model.model.layers[0].mlp.gate_proj.weight
    )


def hooked(model):
    model.model.layers[2].register_forward_hook(lambda module, inputs, output: -output)


def reordered(model):
    """A trace reads keys and values of one layer, a prompt's pass writes those of another."""
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]


def reassigned(model):
    model.load_state_dict({name: w.flip(-1) for name, w in model.state_dict().items()}, assign=True)


def replaced_activation(layer):
    layer.mlp.act_fn = torch.nn.ReLU()


CHANGES = [written_through_data, pointed_elsewhere]


@pytest.mark.parametrize(
    ("change", "how"),
    [
        *((change, how) for change in CHANGES for how in (STRATEGIES[0], STRATEGIES[4])),
        (hooked, STRATEGIES[2]),
        (reordered, STRATEGIES[0]),
    ],
)
def test_what_decodes_is_the_weights_of_now(model, change, how):
    """Guards against constants of a trace that are what the weights were."""
    generate(model, PROMPT, max_steps=8, **how)
    change(model)
    expected = generate(untraced(model), PROMPT, max_steps=20, eos=[], **how).predicted_tokens
    assert generate(model, PROMPT, max_steps=20, eos=[], **how).predicted_tokens == expected


def test_it_is_traced_once_it_pays():
    """Guards against a first answer that waits for what it is too short to gain by."""
    model = copy.deepcopy(tiny_llama())
    fuse(model)
    generate(model, PROMPT, max_steps=traced_runner._PASSES_BEFORE, eos=[])
    assert num_traces(model) == 0
    generate(model, PROMPT, max_steps=5, eos=[])
    assert num_traces(model) == 1


@pytest.mark.parametrize("how", [DRAFTS, {**DRAFTS, "draft_weights": "int4"}])
def test_traces_are_freed_with_their_model(how):
    """Guards against weights that a trace keeps in memory: TorchScript frees no constants of its graphs."""
    model = copy.deepcopy(tiny_llama())
    fuse(model)
    trace_at_once(model)
    generate(model, PROMPT, max_steps=5, eos=[EOS], **how)
    kept = [model.model.layers[0].mlp.down_proj.weight, *model.model.layers[1].input_layernorm.parameters()]
    kept += [tensor for form in fused_model(model).layers for tensor in form.tensors()]
    copies = [copy for form in fused_model(model).layers for p in form.linears for copy in p.derived.values()]
    kept += [tensor for copy in copies if isinstance(copy, Int4Linear) for tensor in copy.tensors()]
    weights = [StorageWeakRef(tensor.untyped_storage()) for tensor in kept if tensor.dim()]
    assert num_traces(model)
    del model, kept, copies
    gc.collect()
    assert all(weight.expired() for weight in weights)


@pytest.mark.parametrize("how", [DRAFTS, STRATEGIES[4]])
def test_traces_of_other_weights_are_freed(model, how):
    """Guards against weights of before that are kept by traces which nobody asks for any more."""
    generate(model, PROMPT, max_steps=8, eos=[], **how)
    of_layer = [*fused_model(model).layers[0].linears]
    kept = [weakref.ref(part) for product in of_layer for part in (product, *product.derived.values())]
    assert num_traces(model) > 1
    model.to(torch.float64).to(torch.float32)
    del of_layer
    generate(model, PROMPT, max_steps=8, eos=[])
    gc.collect()
    assert not any(part() for part in kept)
    assert num_traces(model) == 1


def test_no_more_is_traced_than_may_stay_in_memory(monkeypatch):
    """Guards against graphs, which TorchScript never frees, of every range that anybody asks for."""
    monkeypatch.setattr(traced_runner, "_TRACES_AT_MOST", 3)
    model = copy.deepcopy(tiny_llama())
    fuse(model)
    trace_at_once(model)
    for exit_layer in (1, 2, 3):
        generate(model, PROMPT, exit_layer=exit_layer, num_speculations=3, max_steps=12, eos=[])
    assert num_traces(model) == 3


@pytest.mark.parametrize("how", [STRATEGIES[0], STRATEGIES[4]])
def test_other_weights_are_decoded_by_the_graphs_there_are(model, how, monkeypatch):
    """Guards against a model that is no longer traced because its weights have changed so often."""
    generate(model, PROMPT, max_steps=8, eos=[], **how)
    made, graphs = num_traces(model), traced_runner.num_traces(model)
    monkeypatch.setattr(traced_runner, "_TRACES_AT_MOST", graphs)
    traced_runner._TRACES[model].passes_before = 32  # a graph that is there waits for nothing
    for turn in range(3):
        for change in (*CHANGES, reassigned):
            change(model)
        expected = generate(untraced(model), PROMPT, max_steps=8, eos=[], **how).predicted_tokens
        assert generate(model, PROMPT, max_steps=8, eos=[], **how).predicted_tokens == expected, turn
        assert 0 < num_traces(model) <= made
        assert traced_runner.num_traces(model) == graphs


def test_another_graph_for_layers_of_other_numbers(model):
    """Guards against constants of a graph that are another model's: the scale of attention, an activation."""
    generate(model, PROMPT, max_steps=8, eos=[])
    before = generate(model, PROMPT, max_steps=20, eos=[]).predicted_tokens
    for change in (lambda layer: setattr(layer.self_attn, "scaling", 3.0), replaced_activation):
        change(model.model.layers[1])
        expected = generate(untraced(model), PROMPT, max_steps=20, eos=[]).predicted_tokens
        assert generate(model, PROMPT, max_steps=20, eos=[]).predicted_tokens == expected != before
    assert traced_runner.num_traces(model) == 3


def test_another_graph_for_states_in_another_format():
    """Guards against a graph over copies in four bits that takes states in float32 for those in bfloat16."""
    model, how = copy.deepcopy(tiny_llama()).to(torch.bfloat16), STRATEGIES[4]
    trace_at_once(model)
    for fp32_activations in (True, False):
        fuse(model, fp32_activations=fp32_activations)
        expected = generate(untraced(model), PROMPT, max_steps=20, eos=[], **how)
        found = generate(model, PROMPT, max_steps=20, eos=[], **how)
        assert found.predicted_tokens == expected.predicted_tokens
        assert found.acceptance_rate == expected.acceptance_rate


def test_rounds_in_which_something_is_traced_teach_no_times(model, monkeypatch):
    """Guards against a source that is taken for slow because its layers were traced meanwhile."""
    made, learn = [], AdaptivePolicy.learn

    def learnt(policy, *numbers):
        made.append((traced_runner.num_traces(model), numbers[-1]))
        learn(policy, *numbers)

    monkeypatch.setattr(AdaptivePolicy, "learn", learnt)
    generate(model, PROMPT, strategy="adaptive", max_steps=20, eos=[])
    counts = [count for count, _ in made]
    assert counts[-1] >= 1
    for before, (count, seconds) in zip([0, *counts], made, strict=False):
        assert (seconds is None) == (count > before)
    assert sum(seconds is not None for _, seconds in made) > len(made) / 2
