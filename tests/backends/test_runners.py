"""Every runner of a model computes by the weights of now, over the memory of the model's weights."""

import copy
import gc
import itertools
import weakref
from functools import partial

import pytest
import torch
from conftest import (
    ADAPTIVE,
    COPY,
    LAYERS,
    PROMPT,
    answer_of,
    card_llama,
    config_of,
    ids_of,
    needs_operators,
    own_llama,
    tiny_llama,
    transformers_generate,
)
from cuda_graphs import decode_eagerly
from torch import nn

from self_speculation import Request, make_strategy, release
from self_speculation.backends.card_runner import FusedLayer, FusedRunner
from self_speculation.backends.cpu_runner import InPlaceRunner
from self_speculation.backends.layers import FusedWeights
from self_speculation.backends.runners import capture_decoding, eager_runner, fuse
from self_speculation.engine.prefix_cache import kept_caches
from self_speculation.models.model_cache import peek


def assigned_and_trained(model):
    """The parameters are made while the model decodes."""
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    ids_of(model, max_steps=3)
    ids = torch.tensor([PROMPT])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.requires_grad_()(ids, labels=ids).loss.backward()
    assert not any(p.grad is None or p.is_inference() for p in model.parameters())
    optimizer.step()


def replaced_data(model):
    weight = model.model.layers[1].self_attn.v_proj.weight
    weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))


def replaced_and_put_back(model):
    """Prefixes and copies of the weights in between must not stay."""
    weight = model.model.layers[1].mlp.up_proj.weight
    strategy = make_strategy("autoregressive")
    former = weight.data
    weight.data = 1.5 * weight.data
    answer_of(strategy, model, Request([*PROMPT, 1]), max_steps=3, reuse_cache=True)
    weight.data = former


@torch.no_grad()
def written(model):
    model.model.layers[1].self_attn.o_proj.weight[:, 16:] = 0


def reordered(model):
    """A trace that ignores it reads keys and values of another layer than the prompt's pass writes."""
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]


# `weights_key` sees the following changes.
SEEN = [assigned_and_trained, replaced_data, replaced_and_put_back, written, reordered, nn.Module.double]


def one_element(model):
    model.model.layers[2].mlp.down_proj.weight.data[3, 5] += 30


def another_norm(model):
    model.model.norm.weight.data[3].mul_(30)


def another_activation(model):
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.GELU(approximate="tanh")


def scaled(model):
    model.model.layers[1].self_attn.scaling = 1.0


def turned(model):
    model.model.rotary_emb.inv_freq.mul_(2)


def hooked(model):
    model.model.layers[1].register_forward_hook(lambda module, inputs, output: -output)


def another_forward(model):
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda hidden: 3 * type(mlp).forward(mlp, hidden)


# After the following changes somebody must call `fuse`.
TOLD = [one_element, another_norm, another_activation, scaled, turned, hooked, another_forward]
# Layers of transformers have nothing that is made of weights: only graphs and kept keys can be outdated.
CHANGED = [
    *itertools.product([*SEEN, *TOLD], ["in place"]),
    *itertools.product(
        [assigned_and_trained, replaced_data, reordered, another_norm, scaled, turned, hooked], ["captured"]
    ),
    *itertools.product([replaced_data, one_element, turned, hooked], ["layers"]),
]


@needs_operators
@pytest.mark.parametrize(("change", "runner"), CHANGED)
def test_a_changed_model_decodes_as_it_is_now(change, runner, request):
    """Guards against weights, copies, numbers or hooks of before in fused layers and
    captured passes (on a GPU their memory may hold anything by then), and against kept keys and values.
    """
    model = own_llama(fused=runner == "in place")
    graphs = None
    if runner == "captured":
        model = card_llama(4)
        graphs = request.getfixturevalue("graphs")
        capture_decoding(model)
    has_copies = change not in (hooked, another_forward, nn.Module.double)
    drafts = COPY if has_copies else LAYERS
    ways = [{}, LAYERS, drafts]
    strategies = [make_strategy(config_of(**way).generation_strategy) for way in ways]

    def answers(order=(0, 1, 2)):
        for strategy, way in ((strategies[index], ways[index]) for index in order):
            yield answer_of(strategy, model, Request(PROMPT), max_steps=8, reuse_cache=True, **way)

    # The first way is the last one: it would go on with the first keys and values if they were not outdated.
    before = [result.predicted_tokens for result in answers((2, 1, 0))]
    if graphs:
        assert graphs.replayed
    change(model)
    if change in TOLD:
        (release if "layers" in runner else fuse)(model)
    found = [*answers()]
    assert runner != "in place" or isinstance(eager_runner(model), InPlaceRunner) == has_copies
    # The third way goes on with the cache of the second one.
    assert [result.num_cached_tokens for result in found[:2]] == [0] * 2
    after = [result.predicted_tokens for result in found]
    assert after == [transformers_generate(model, PROMPT, 8, -1)] * 3
    assert (after == before) == (change in (nn.Module.double, replaced_and_put_back))
    decode_eagerly(model)
    drafted = [result.draft_stats for result in answers()]
    assert [result.draft_stats for result in found] == drafted


def test_each_request_of_a_batch_uses_current_weights(model):
    """Guards against a scheduler that keeps the first weights after the batch was empty."""
    fuse(model)
    strategy = make_strategy("autoregressive")
    config = config_of(max_steps=12)
    answers = strategy.generate_batch(model, [Request(PROMPT)] * 2, config, batch_size=1)
    for change in (written, replaced_data):
        assert next(answers)[1].predicted_tokens == transformers_generate(model, PROMPT, 12, -1)
        change(model)


@pytest.mark.parametrize("is_captured", [False, True])
def test_what_is_made_of_a_model_is_freed(is_captured, request):
    """Guards against memory that stays: of a removed layer, of a model that has moved, and of one that is
    gone while the strategy is not, also if a hook has the model.
    """
    model = card_llama(4)
    strategy = make_strategy("adaptive")
    if is_captured:
        request.getfixturevalue("graphs")
        capture_decoding(model)

    def made(model, **drafts):
        answer_of(strategy, model, Request(PROMPT), reuse_cache=True, **ADAPTIVE, **drafts)
        assert len(kept_caches(model)) == 1
        return [*map(weakref.ref, (model.model.layers[-1], *peek(model, FusedWeights).replaced.values()))]

    before = made(model, draft_weights="int4")
    model.model.layers = model.model.layers[:3]
    model.config.num_hidden_layers = 3
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # as `model.to` does
    release(model)
    gc.collect()
    assert not any(part() for part in before)
    model.model.layers[0].register_forward_hook(partial(lambda model, *_: None, model))
    fuse(model)
    before = made(model)
    del model
    gc.collect()
    assert not any(part() for part in before)


@needs_operators
def test_inference_mode_and_autocast(model):
    """Guards against parameters that cannot be set because they were made in inference mode, and against
    products in the format of the caller's autocast.
    """
    with torch.inference_mode():
        made = type(model)(model.config).eval()
        made.load_state_dict(model.state_dict())
    plain = ids_of(model, max_steps=12)
    for each in (made, model):
        fuse(each)
        assert isinstance(FusedRunner(each).layers[0], FusedLayer)
        with torch.autocast("cpu", torch.bfloat16):
            for drafts in ({}, LAYERS, ADAPTIVE):
                assert ids_of(each, max_steps=12, **drafts) == plain


def test_every_weight_has_a_storage_of_its_own(model):
    """Guards against projections that share one: code that saves a model keeps only one of those."""
    fuse(model)
    FusedRunner(model)
    before = tiny_llama().state_dict()
    for name, weight in model.state_dict().items():
        assert weight.untyped_storage().nbytes() == weight.nbytes, name
        assert torch.equal(weight, before[name]), name
