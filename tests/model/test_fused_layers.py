"""Fused layers: the arithmetic of the layers they stand for, over the same memory, and nothing else touched.

That they compute what every family's own layers compute is in test_llama_model_utils.py.
"""

import copy
import gc
import weakref

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from conftest import assert_close, generate, tiny_llama, transformers_generate
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from self_speculation import GenerationConfig, Request, make_strategy
from self_speculation.model import fused_layers, linear
from self_speculation.model.captured_runner import capture_decoding
from self_speculation.model.fused_layers import NARROW, bytes_made, fuse, fused_model
from self_speculation.model.linear import Linear, follow_weights
from self_speculation.model.model_runner import ModelRunner, forward
from self_speculation.model.quantized_layers import quantized

PROMPT = [5, 9, 4, 7, 7, 3]
needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")


@pytest.fixture
def model():
    return copy.deepcopy(tiny_llama())


def fused(model):
    """Which layers are fused; the head's answer is the last."""
    layers, head, _ = fused_model(model)
    return [form is not None for form in (*layers, head)]


def pack(model, monkeypatch):
    """Have it decode by packed copies of its weights, whatever is faster here."""
    monkeypatch.setattr(linear, "_PACKED", dict.fromkeys((torch.float32, torch.bfloat16), range(1, 9)))
    fuse(model)
    decodes_like_itself(model)
    assert bytes_made(model)


def decodes_like_itself(model):
    ids = torch.tensor([PROMPT])
    with torch.inference_mode():
        mine = forward(ModelRunner(model, 6, 6), ids, 6).logits
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
    assert all(w.untyped_storage().nbytes() == w.nbytes for w in after.values())  # of its own: no view
    attention = model.model.layers[0].self_attn
    joint = fused_model(model)[0][0].linears[0].weight
    assert joint.data_ptr() == attention.q_proj.weight.data_ptr()
    assert joint.shape[0] == sum(
        len(p.weight) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )

    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(weight, before[name]) for name, weight in again.state_dict().items())
    assert (tmp_path / "model.safetensors").stat().st_size < 1.2 * sum(w.nbytes for w in before.values())


def replaced(model):
    """Another parameter in the place of one, as pruning and expanding do."""
    model.model.layers[0].mlp.down_proj.weight = nn.Parameter(torch.randn(32, 48))


def pointed_elsewhere(model):
    model.model.layers[1].self_attn.q_proj.weight.data = torch.randn(32, 32)


def gelus(model):
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.GELU()


def trained(model):
    ids = torch.tensor([PROMPT])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.requires_grad_()(ids, labels=ids).loss.backward()
    assert not any(p.grad is None or p.is_inference() for p in model.parameters())
    optimizer.step()


def assigned_and_trained(model):
    """Parameters that were made while decoding must be trainable."""
    model.load_state_dict(tiny_llama().state_dict(), assign=True)
    generate(model, PROMPT, max_steps=3, eos=[])
    trained(model)


CHANGES = {
    "trained": trained,
    "assigned and trained": assigned_and_trained,
    "dtype": lambda model: model.to(torch.bfloat16),
    "assigned": lambda model: model.load_state_dict(tiny_llama(agreement="always").state_dict(), assign=True),
    "from a vector": lambda model: nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(model.parameters()).detach() * 1.1, model.parameters()
    ),
    "replaced": replaced,
    "pointed elsewhere": pointed_elsewhere,
    "fused again": fuse,
    # What follows goes past the versions that torch counts.
    "heads ablated": lambda model: model.model.layers[1].self_attn.o_proj.weight.data[:, 16:].zero_(),
    "neurons pruned": lambda model: model.model.layers[1].mlp.down_proj.weight.data[:, 1::2].zero_(),
    "new rows of the head": lambda model: model.lm_head.weight.data[40:].normal_(),
    "rows of the head in another order": lambda model: model.lm_head.weight.data.copy_(
        model.lm_head.weight.data.flip(0).clone()
    ),
    "one row": lambda model: model.model.layers[2].self_attn.k_proj.weight.data[3].add_(3),
    "one column": lambda model: model.model.layers[2].mlp.up_proj.weight.data[:, 5].add_(3),
    "columns in another order": lambda model: model.lm_head.weight.data.copy_(
        model.lm_head.weight.data.flip(1).clone()
    ),
    "norms": lambda model: model.model.norm.weight.data[3].mul_(30),
    # What follows changes no weight.
    "epsilon": lambda model: setattr(model.model.layers[1].input_layernorm, "variance_epsilon", 0.5),
    "scaling": lambda model: setattr(model.model.layers[1].self_attn, "scaling", 0.9),
    "another activation": gelus,
}


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=needs_onednn)])
@pytest.mark.parametrize("change", CHANGES)
def test_what_decodes_is_the_weights_of_now(model, change, packed, monkeypatch):
    """Guards against decoding with the weights that a model had when it was loaded."""
    if packed:
        pack(model, monkeypatch)
    else:
        fuse(model)
    before = generate(model, PROMPT, max_steps=20, eos=[]).predicted_tokens
    CHANGES[change](model)
    assert all(fused(model))
    decodes_like_itself(model)
    after = generate(model, PROMPT, max_steps=20, eos=[]).predicted_tokens
    if change not in ("fused again", "dtype"):
        assert after == transformers_generate(model, PROMPT, 20, -1)
        assert after != before


@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=needs_onednn)])
def test_fuse_makes_everything_anew(model, packed, monkeypatch):
    """Guards against a copy that outlives a change of a single element, which no fingerprint sees."""
    if packed:
        pack(model, monkeypatch)
    fuse(model)
    drafts = {"exit_layer": 4, "num_speculations": 3, "draft_weights": "int4", "max_steps": 20, "eos": []}
    generate(model, PROMPT, **drafts)
    before = [weakref.ref(copied) for form in fused_model(model).layers for copied in form.linears]
    model.model.layers[2].mlp.down_proj.weight.data[3, 5].add_(30)
    fuse(model)
    gc.collect()
    assert not any(product() for product in before)
    decodes_like_itself(model)
    assert generate(model, PROMPT, **drafts).predicted_tokens == transformers_generate(model, PROMPT, 20, -1)


@pytest.mark.parametrize("change", ["pointed elsewhere", "heads ablated"])
def test_a_request_of_a_batch_uses_current_weights(model, change):
    """Guards against a batch that keeps its first weights after it was empty."""
    fuse(model)
    strategy, config = make_strategy("autoregressive"), GenerationConfig(sample=False, max_steps=12)
    answers = strategy.generate_batch(model, [Request(PROMPT)] * 2, config, batch_size=1)
    assert next(answers)[1].predicted_tokens == transformers_generate(model, PROMPT, 12, -1)
    CHANGES[change](model)
    assert next(answers)[1].predicted_tokens == transformers_generate(model, PROMPT, 12, -1)


@pytest.mark.parametrize("change", [*CHANGES][:-3])
def test_copies_for_drafts_are_of_the_weights_of_now(model, change):
    """Guards against a draft that guesses what the model was: right, but slow."""

    def draft_logits(model):
        with torch.inference_mode():
            return forward(quantized(ModelRunner(model, 6, 6), 4), torch.tensor([PROMPT]), 6).logits

    fuse(model)
    before = draft_logits(model)
    CHANGES[change](model)
    twin = copy.deepcopy(model)
    fuse(twin)
    expected = draft_logits(twin)
    # Copies of layers that have not changed are weighted by inputs of before.
    assert (draft_logits(model) - expected).norm() <= 0.3 * (before - expected).norm()


def test_copies_are_of_the_biases_of_now():
    """Guards against biases that a copy keeps as they were, where only the weights are compared."""
    linear = nn.Linear(32, 32)
    product = Linear(linear)
    product.derive("a copy", object)
    follow_weights([product])
    assert "a copy" in product.derived
    with torch.no_grad():
        linear.bias[3] += 1
    follow_weights([product])
    assert "a copy" not in product.derived


@pytest.mark.usefixtures("graphs")
def test_what_is_out_of_use_is_freed():
    """Guards against what is kept for a model and keeps it, or a layer that it no longer has, for ever."""
    model = copy.deepcopy(tiny_llama())
    fuse(model)
    generate(model, PROMPT, max_steps=3)
    pruned = weakref.ref(model.model.layers[3])
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:3], 3
    generate(model, PROMPT, strategy="adaptive", draft_weights="int4", max_steps=6)
    gc.collect()
    assert pruned() is None
    capture_decoding(model)
    generate(model, PROMPT, exit_layer=2, num_speculations=3, max_steps=6)
    whole = weakref.ref(model)
    del model
    gc.collect()
    assert whole() is None


def test_a_model_made_in_inference_mode_and_autocast_around_it(model):
    """Guards against parameters that cannot be set, and products in another format than what they add to."""
    with torch.inference_mode():
        made = type(model)(model.config).eval()
        made.load_state_dict(model.state_dict())
    assert fuse(made) == 4
    plain = generate(model, PROMPT, max_steps=12, eos=[]).predicted_tokens
    fuse(model)
    twin = copy.deepcopy(model)  # with weights of its own
    nn.init.zeros_(twin.model.layers[0].mlp.down_proj.weight)
    decodes_like_itself(twin)
    for each in (made, model):
        assert generate(each, PROMPT, max_steps=12, eos=[]).predicted_tokens == plain
        with torch.autocast("cpu", torch.bfloat16):
            for extra in ({}, {"exit_layer": 2, "num_speculations": 3}, {"strategy": "adaptive"}):
                assert generate(each, PROMPT, max_steps=12, eos=[], **extra).predicted_tokens == plain


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


def another_class(model):
    """Another norm of transformers, with the same attributes."""
    model.model.layers[1].input_layernorm.__class__ = DoublingNorm


class DoublingNorm(LlamaRMSNorm):
    """As if it were another family's."""

    __module__ = "transformers.models.gemma.modeling_gemma"

    def forward(self, hidden):
        return 2 * super().forward(hidden)


def another_norm(model):
    model.model.layers[1].post_attention_layernorm = nn.LayerNorm(32)


@pytest.mark.parametrize("change", [wrap, hook, replace_forward, another_class, another_norm])
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_is_not_recognised_is_left_as_it_is(model, change, when):
    """Guards against an adapter, a quantised layer or a hook that is passed over without a word."""
    if when == "before":
        change(model)
    fuse(model)
    if when == "after":
        change(model)
    assert fused(model) == [True, False, True, True, True]
    decodes_like_itself(model)


@pytest.mark.parametrize("by_accelerate", [False, True])
def test_a_layer_whose_hook_is_removed_is_fused_again(model, by_accelerate):
    """Guards against a model that stays slow, and a method that is put back and taken for another one."""
    fuse(model)
    mlp = model.model.layers[1].mlp
    if by_accelerate:
        add_hook_to_module(mlp, AlignDevicesHook("cpu"))
    else:
        handle = mlp.register_forward_hook(lambda *_: None)
    assert fused(model) == [True, False, True, True, True]
    remove_hook_from_module(mlp) if by_accelerate else handle.remove()
    assert all(fused(model))


def test_eager_attention_is_not_fused(model):
    model.set_attn_implementation("eager")
    assert fuse(model) == 0
    assert not any(fused(model))


@pytest.mark.parametrize("width", [1, 2, 5, NARROW, NARROW + 1])
@pytest.mark.parametrize("rows", [(64, 32, 32), (131, 12, 12), (151,)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=needs_onednn)])
def test_a_product_is_the_product(width, rows, bias, packed, monkeypatch):
    """Which way is taken depends on the machine; both must be right on every one."""
    torch.manual_seed(0)
    projections = [nn.Linear(24, n, bias=bias) for n in rows]
    x = torch.randn(width, 24)
    with torch.inference_mode():
        expected = torch.cat([projection(x) for projection in projections], -1)
        product = Linear(*projections)
        if packed:
            product.may_be_packed = True
            monkeypatch.setattr(linear, "_PACKED", {torch.float32: [width]})
        assert_close(product(x), expected)
        assert product(x).is_contiguous()
        assert_close(product.add_to(torch.ones_like(expected), x), expected + 1)


@needs_onednn
def test_weights_are_packed_where_there_is_room(model, monkeypatch):
    """Guards against a copy that finds no room, and against one that plain decoding never reads."""
    weights = 4 * sum(
        p.numel() for name, p in model.named_parameters() if "norm" not in name and "embed" not in name
    )
    monkeypatch.setattr(fused_layers, "free_memory", lambda device: 3 * weights - 30)
    fuse(model)
    decodes_like_itself(model)
    assert not bytes_made(model)
    monkeypatch.setattr(fused_layers, "free_memory", lambda device: 3 * weights + 30)
    other = copy.deepcopy(model)
    fuse(other)
    generate(other, PROMPT[:4], max_steps=5, eos=[])
    assert not bytes_made(other)
    decodes_like_itself(other)
    assert bytes_made(other) == weights


@needs_onednn
def test_which_kernel_computes_follows_from_format_and_width(model, monkeypatch):
    """Guards against a choice by stopwatch, which took the slower product on a shared machine."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    fuse(model)
    for dtype, packed in ((torch.float32, range(5, NARROW + 1)), (torch.bfloat16, range(1, NARROW + 1))):
        product = fused_model(model.to(dtype)).layers[0].linears[0]
        assert [width for width in range(1, 20) if product.is_packed(width)] == [*packed]
