"""Lean layers: the arithmetic of the layers they stand for, over the same memory, and nothing else touched.

That they compute what every family's own layers compute is in test_llama_model_utils.py.
"""

import copy

import pytest
import torch
from conftest import assert_close, generate, tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM

from self_speculation.model import products
from self_speculation.model.decoder import Decoder, forward
from self_speculation.model.lean_layers import NARROW, bytes_packed, fuse, lean_head, lean_layer
from self_speculation.model.products import FORMS, Packed, Product

PROMPT = [5, 9, 4, 7, 7, 3]
NEEDS_ONEDNN = [Packed] if torch.backends.mkldnn.is_available() else []


@pytest.fixture
def model():
    return copy.deepcopy(tiny_llama())


def lean(model):
    """Which layers decode lean; the head's answer is the last."""
    return [lean_layer(model, layer) is not None for layer in model.model.layers] + [
        lean_head(model) is not None
    ]


def made_by_fuse(model):
    """The products of all layers and of the head."""
    fuse(model)
    parts = [*(lean_layer(model, layer) for layer in model.model.layers), lean_head(model)]
    return [product for part in parts for product in part.products]


def decodes_like_itself(model):
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        mine = forward(Decoder(model, 6, 6), ids, 6).logits
        assert_close(mine, model(ids).logits, roundings=100 if model.dtype == torch.float32 else 4)


def test_no_second_copy_and_the_original_layout_on_disk(model, tmp_path):
    """Guards against memory doubled by joint weights, and against files that only this library can read."""
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert fuse(model) == 4
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    storages = {weight.untyped_storage().data_ptr(): weight.untyped_storage() for weight in after.values()}
    assert sum(s.nbytes() for s in storages.values()) == sum(w.nbytes for w in before.values())
    attention = model.model.layers[0].self_attn
    joint = lean_layer(model, model.model.layers[0]).products[0].weight
    assert joint.data_ptr() == attention.q_proj.weight.data_ptr()
    assert joint.shape[0] == sum(
        len(p.weight) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )

    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(weight, before[name]) for name, weight in again.state_dict().items())
    assert (tmp_path / "model.safetensors").stat().st_size < 1.2 * sum(w.nbytes for w in before.values())


def test_it_follows_a_training_of_the_model(model):
    """Guards against stale copies: weights that an optimizer changes in place are those that decode."""
    fuse(model)
    ids = torch.tensor([PROMPT])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert all(lean(model))
    decodes_like_itself(model)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: model.load_state_dict(tiny_llama(agreement="always").state_dict(), assign=True),
    ],
)
def test_a_model_whose_weights_were_replaced_is_decoded_by_its_own_layers(model, change):
    """Guards against decoding with the weights that a model had when it was loaded."""
    fuse(model)
    change(model)
    assert not any(lean(model)[:4])
    decodes_like_itself(model)


def test_a_copy_of_a_model_has_its_own_weights(model):
    fuse(model)
    twin = copy.deepcopy(model)
    nn.init.zeros_(twin.model.layers[0].mlp.down_proj.weight)
    assert all(lean(model))
    decodes_like_itself(model)
    decodes_like_itself(twin)


class Adapter(nn.Linear):
    """What an adapter or a quantised layer is to us: another class in the place of a Linear."""

    def forward(self, x):
        return super().forward(x) + 1


def wrap(model):
    projection = model.model.layers[1].mlp.down_proj
    model.model.layers[1].mlp.down_proj = adapter = Adapter(48, 32, bias=False)
    adapter.weight = projection.weight


def hook(model):
    model.model.layers[1].self_attn.register_forward_hook(lambda module, inputs, output: (-output[0], None))


def replace_forward(model):
    """As accelerate does for offloading."""
    norm = model.model.layers[1].input_layernorm
    original = norm.forward
    norm.forward = lambda hidden: 2 * original(hidden)


@pytest.mark.parametrize("change", [wrap, hook, replace_forward])
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_is_not_recognised_is_left_as_it_is(model, change, when):
    """Guards against an adapter, a quantised layer or a hook that is passed over without a word."""
    if when == "before":
        change(model)
    fuse(model)
    if when == "after":
        change(model)
    assert lean(model) == [True, False, True, True, True]
    decodes_like_itself(model)


def test_eager_attention_and_other_families_are_left_alone(model):
    model.set_attn_implementation("eager")
    assert fuse(model) == 0
    assert not any(lean(model))


@pytest.mark.parametrize("width", [1, 2, 5, NARROW, NARROW + 1])
@pytest.mark.parametrize("rows", [(64, 32, 32), (131, 12, 12), (151,)])
@pytest.mark.parametrize("bias", [False, True])
def test_every_form_of_a_product_is_the_product(width, rows, bias):
    """Which form is taken depends on the machine; all must be right on every one, for 2 blocks of 64 rows, 5
    of 31 and a prime number of rows.
    """
    torch.manual_seed(0)
    projections = [nn.Linear(24, n, bias=bias) for n in rows]
    x = torch.randn(width, 24)
    with torch.inference_mode():
        expected = torch.cat([projection(x) for projection in projections], -1)
        product = Product(*projections)
        for form in (*FORMS, *NEEDS_ONEDNN):
            product.use({width: form})
            assert_close(product(x), expected)
            assert product(x).is_contiguous()


@pytest.mark.parametrize("kind", NEEDS_ONEDNN)
@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.mul_(2),
        lambda weight: weight.data.mul_(2),  # as adapters are merged
        lambda weight: weight[3].zero_(),
    ],
)
def test_a_copy_in_another_order_follows_the_weights(model, kind, change):
    """Guards against decoding with weights that a model had before it was trained on."""
    fuse(model)
    layer = model.model.layers[1]
    for product in (*lean_layer(model, layer).products, *lean_head(model).products):
        product.use(dict.fromkeys(range(1, 9), kind))
    decodes_like_itself(model)
    with torch.no_grad():
        change(layer.self_attn.k_proj.weight)
        change(layer.mlp.down_proj.weight)
        change(model.lm_head.weight)
    decodes_like_itself(model)


@pytest.mark.skipif(not NEEDS_ONEDNN, reason="torch without oneDNN")
def test_weights_are_copied_where_that_is_faster_and_fits(model, monkeypatch):
    """Guards against a model that takes twice its memory on a machine that has it once."""
    monkeypatch.setattr(products, "_SMALLEST_TO_CHOOSE", 1)
    monkeypatch.setattr(products, "_CACHED", 1)
    monkeypatch.setattr(
        products,
        "_least_seconds",
        lambda kinds, sample: {
            (shape, 1): {kind: 1.0 - (kind is Packed) * 0.5 for kind in kinds} for shape, _ in sample
        },
    )
    weights = 4 * sum(product.weight.numel() for product in made_by_fuse(model))
    monkeypatch.setattr(products, "free_memory", lambda device: 3 * weights + 30)
    fuse(model)
    assert bytes_packed(model) == weights
    monkeypatch.setattr(products, "free_memory", lambda device: 3 * weights - 30)
    fuse(model)
    assert not bytes_packed(model)
    decodes_like_itself(model)


def test_generating_does_not_depend_on_it(model):
    plain = generate(model, PROMPT, max_steps=20, eos=[])
    fuse(model)
    for extra in ({}, {"exit_layer": 2, "num_speculations": 3}):
        assert (
            generate(model, PROMPT, max_steps=20, eos=[], **extra).predicted_tokens == plain.predicted_tokens
        )
