"""Traced passes give the same bits as the layers, and always those of the current weights."""

import copy
import gc
import weakref
from itertools import count

import pytest
import torch
from conftest import ADAPTIVE, COPY, LAYERS, PROMPT, generate, ids_of, own_llama
from helpers import watch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef

from self_speculation.drafts.adaptive import AdaptivePolicy
from self_speculation.model import linear, traced_runner
from self_speculation.model.fused_layers import activation_dtype, fuse, fused_model
from self_speculation.model.linear import NARROW
from self_speculation.model.made import state
from self_speculation.model.model_runner import ModelRunner, forward_early, forward_remainder
from self_speculation.model.traced_runner import TracedRunner, trace_after


@pytest.fixture(autouse=True)
def nothing_is_packed(monkeypatch):
    """Passes over packed copies are not traced: TorchScript does not take oneDNN's tensors."""
    monkeypatch.setattr(linear.Linear, "can_be_packed", False)


def fused(dtype=torch.float32, fp32_activations=False):
    """A fused model whose passes are traced when they first run."""
    model = own_llama().to(dtype)
    fuse(model, fp32_activations=fp32_activations)
    trace_after(model, 0)
    return model


@pytest.fixture(params=["float32", "W16A32", "bfloat16"])
def model(request):
    dtype = torch.float32 if request.param == "float32" else torch.bfloat16
    return fused(dtype, request.param == "W16A32")


def num_usable(model):
    """Traces with weights."""
    return sum(bool(trace.reads) for trace in state(model, traced_runner._Traces).made.values())


def untraced(model):
    """The same model, whose passes are not traced."""
    twin = copy.deepcopy(model)
    fuse(twin, fp32_activations=activation_dtype(model) != model.dtype)
    return twin


@settings(max_examples=30)
@given(
    widths=st.lists(st.integers(1, NARROW + 1), min_size=1, max_size=5),
    exit_layer=st.integers(1, 3),
    prompt_length=st.integers(1, 9),
    back=st.integers(0, 2),
)
def test_traced_passes_give_the_same_bits(widths, exit_layer, prompt_length, back):
    """Guards against a width or a length that becomes a constant of the trace."""
    runners = [
        (made, made.new_cache(prompt_length, 200)) for made in (ModelRunner(MODEL), TracedRunner(MODEL))
    ]
    with torch.inference_mode():
        found = [
            [forward_early(*pair, torch.arange(5, 5 + prompt_length)[None], 4).logits] for pair in runners
        ]
        for width in widths:
            ids = torch.arange(9, 9 + width)[None]
            for (runner, cache), results in zip(runners, found, strict=True):
                early = forward_early(runner, cache, ids, exit_layer, 1)
                late = forward_remainder(runner, cache, early.hidden, exit_layer)
                cache.rollback(min(back, width))
                results += [early.hidden, late.logits]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


MODEL = fused()


def pointed_elsewhere(model):
    model.model.layers[0].mlp.gate_proj.weight.data = torch.randn(48, 32, dtype=model.dtype)


def reassigned(model):
    model.load_state_dict({name: w.flip(-1) for name, w in model.state_dict().items()}, assign=True)


@pytest.mark.parametrize(("change", "how"), [(pointed_elsewhere, {}), (reassigned, COPY)])
def test_graphs_outlive_weights(model, change, how, monkeypatch):
    """Guards against a model that is no longer traced after many changes of its weights. test_runners.py has
    more changes.
    """
    ids_of(model, max_steps=8, **how)
    made, graphs = num_usable(model), traced_runner.num_traces(model)
    monkeypatch.setattr(traced_runner, "_TRACES_AT_MOST", graphs)
    trace_after(model, 32)
    for turn in range(3):
        change(model)
        assert ids_of(model, **how) == ids_of(untraced(model), **how), turn
        assert 0 < num_usable(model) <= made
        assert traced_runner.num_traces(model) == graphs


def test_a_range_is_traced_after_some_passes():
    """Guards against a short first answer that waits for a trace and gains nothing."""
    model = fused()
    trace_after(model, traced_runner._PASSES_BEFORE)
    ids_of(model, max_steps=traced_runner._PASSES_BEFORE)
    assert num_usable(model) == 0
    ids_of(model, max_steps=5)
    assert num_usable(model) == 1


def test_layers_that_are_alike_have_one_graph():
    """Guards against a first answer that waits until every layer is traced, in every range."""
    model = fused()
    ids_of(model, max_steps=8)
    ids_of(model, max_steps=8, **LAYERS)
    traces = state(model, traced_runner._Traces)
    assert len(traces.made) == 4  # all layers; those that draft; the others; all but those, of one token
    assert len(traces.of_layers) == 2  # of one token, of several


def weights(model):
    """Weak references to all weights and copies; their storages."""
    linears = [each for layer in model.model.layers for each in fused_model(model)[0][layer].linears]
    parts = [part for each in linears for part in (each, *each.copies.values())]
    read = [tensor for part in parts if hasattr(part, "tensors") for tensor in part.tensors()]
    return [weakref.ref(part) for part in parts], [StorageWeakRef(t.untyped_storage()) for t in read]


def are_freed(parts, storages):
    return not any(part() for part in parts) and all(storage.expired() for storage in storages)


@pytest.mark.parametrize("how", [LAYERS, COPY])
@pytest.mark.parametrize("fp32_activations", [False, True])
def test_weights_are_freed(how, fp32_activations):
    """Guards against traces that keep the weights of before, or of a model that is gone, in memory:
    TorchScript never frees the constants of a graph.
    """
    model = fused(torch.bfloat16 if fp32_activations else torch.float32, fp32_activations)
    ids_of(model, max_steps=8, **how)
    assert num_usable(model) > 1
    before = weights(model)
    model.to(torch.float64).to(torch.float32)
    ids_of(model, max_steps=8)
    assert num_usable(model) == 1
    now = weights(model)
    gc.collect()
    assert are_freed(*before)
    del model
    gc.collect()
    assert are_freed(*now)


def test_the_number_of_traces_is_limited(monkeypatch):
    """Guards against memory that grows with each new range: TorchScript never frees a graph."""
    monkeypatch.setattr(traced_runner, "_TRACES_AT_MOST", 3)
    model = fused()
    for exit_layer in (1, 2, 3):
        ids_of(model, max_steps=12, exit_layer=exit_layer, num_speculations=3)
    assert num_usable(model) == 3


def test_another_dtype_of_states_needs_a_new_graph():
    """Guards against a graph over copies in four bits for float32 states that gets bfloat16 states."""
    model = fused(torch.bfloat16, fp32_activations=True)
    for fp32_activations in (True, False):
        fuse(model, fp32_activations=fp32_activations)
        found, expected = (
            generate(each, PROMPT, max_steps=20, eos=[], **COPY) for each in (model, untraced(model))
        )
        assert found.predicted_tokens == expected.predicted_tokens
        assert found.acceptance_rate == expected.acceptance_rate


def test_rounds_that_trace_teach_no_times(model, monkeypatch):
    """Guards against a source that seems slow because a round traced its layers."""
    made, ticks = [], count()  # a busy machine would change the plans
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks) / 1000)
    watch(
        monkeypatch, AdaptivePolicy, "learn",
        lambda _, outcome: made.append((traced_runner.num_traces(model), outcome.seconds)),
    )  # fmt: skip
    ids_of(model, **ADAPTIVE)
    counts = [traces for traces, _ in made]
    assert counts[-1] >= 1
    for before, (traces, seconds) in zip([0, *counts], made, strict=False):
        assert (seconds is None) == (traces > before)
    assert sum(seconds is not None for _, seconds in made) > len(made) / 2
