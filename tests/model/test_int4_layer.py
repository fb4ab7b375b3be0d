"""Layers of copies in four bits by two operators of our own: the same as by torch's, up to rounding.

Norms and attention differ from torch's in the last bit, which may round an input of a product to the next of
255 steps.
"""

import pytest
import torch
from conftest import generate, own_llama
from test_llama_model_utils import family
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from self_speculation.model.fused_layers import FusedLayer, fuse
from self_speculation.model.int4_layer import Int4Layer
from self_speculation.model.int4_linear import Int4Linear
from self_speculation.model.kernels import int4_kernel
from self_speculation.model.model_runner import ModelRunner, forward
from self_speculation.model.quantized_layers import quantized
from self_speculation.model.traced_runner import TracedRunner, trace_after

pytestmark = pytest.mark.skipif(int4_kernel().variant is None, reason=str(int4_kernel()))
EPSILON = 1e-5


def is_close(got, expected):
    """Up to a few inputs that are rounded to another step."""
    return got.shape == expected.shape and (got - expected).norm() <= 0.02 * expected.norm()


def copied(rows, columns, bias=None):
    return Int4Linear(torch.randn(rows, columns), bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("columns", "tokens"), [(64, 1), (33, 1), (100, 5), (576, 9)])
def test_products_of_normed_inputs(columns, tokens, dtype):
    """Guards against a norm of other tokens, of padding, or without its weight or epsilon."""
    torch.manual_seed(0)
    linear, weight = copied(48, columns), (torch.rand(columns) + 0.5).to(dtype)
    x = torch.randn(tokens, columns) * torch.logspace(-3, 2, tokens)[:, None]
    got = linear.matmul_bf16(x, weight, EPSILON)
    expected = linear(rms_norm(x, (columns,), weight.float(), EPSILON))
    for own, other in zip(got, expected, strict=True):
        assert is_close(own, other)


@pytest.mark.parametrize(
    ("hidden_size", "width", "tokens"), [(64, 96, 1), (40, 50, 1), (96, 33, 6), (576, 1536, 2)]
)
def test_the_end_of_a_layer(hidden_size, width, tokens):
    """Guards against gate and up in each other's place, padding that is added, a norm before the sum, and an
    activation that overflows.
    """
    torch.manual_seed(0)
    out, down = copied(hidden_size, 64), copied(hidden_size, width)
    joint, norm = copied(2 * width, hidden_size), torch.rand(hidden_size) + 0.5
    x, hidden = torch.randn(tokens, 64), torch.randn(tokens, hidden_size)
    hidden[0] *= 1e-3  # the norm's epsilon counts
    norm[0] = 400.0  # gates of both signs, far beyond where exp overflows
    after = hidden + out(x)
    gate, up = joint(rms_norm(after, (hidden_size,), norm, EPSILON)).split(width, 1)
    expected = after + down(silu(gate) * up)
    weights = (norm, EPSILON, *joint.tensors(), *down.tensors())
    torch.ops.self_speculation.int4_mlp(hidden, x, *out.tensors(), *weights, width)
    assert gate.min() < -90
    assert gate.max() > 90
    for own, other in zip(hidden, expected, strict=True):
        assert is_close(own, other)


@pytest.mark.parametrize("start", [0, 1, 3, 126, 127, 128, 129, 300])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 16), (3, 3, 64), (14, 2, 64), (2, 1, 80)])
def test_attention_of_a_token(heads, kv_heads, size, start):
    """Guards against keys of another head or beyond the token, chunks that are weighted wrongly, a rotation
    to the other side, and keys or values that are written elsewhere.
    """
    torch.manual_seed(start)
    joint, hidden_size = (heads + 2 * kv_heads) * size, 64
    linear, bias = copied(joint, hidden_size), torch.randn(joint) if heads == 14 else None
    hidden, norm = torch.randn(1, hidden_size), torch.rand(hidden_size) + 0.5
    keys, values = torch.randn(2, 2, kv_heads, 320, size)  # two slots each
    angles = torch.rand(size // 2).repeat(2) * 6
    unit = torch.eye(size)
    rotate_half = unit.roll(size // 2, 1)
    rotate_half[:, : size // 2].neg_()
    rotation = unit * angles.cos() + rotate_half * angles.sin()

    product = linear(rms_norm(hidden, (hidden_size,), norm, EPSILON))[0]
    product = product if bias is None else product + bias
    queries, new_keys, new_values = product.view(-1, size).split((heads, kv_heads, kv_heads))
    expected_keys, expected_values = keys.clone(), values.clone()
    expected_keys[0, :, start], expected_values[0, :, start] = new_keys @ rotation, new_values
    seen = (
        part[0, :, : start + 1].repeat_interleave(heads // kv_heads, 0)
        for part in (expected_keys, expected_values)
    )
    expected = scaled_dot_product_attention((queries @ rotation)[:, None], *seen, scale=0.3)

    past = torch.empty(start, 0)
    got = torch.ops.self_speculation.int4_attend(
        hidden,
        norm,
        EPSILON,
        *linear.tensors(),
        bias,
        None,
        None,
        rotation[None],
        keys,
        values,
        past,
        0.3,
        heads,
    )
    assert is_close(got, expected.view(1, -1))
    for own, other in ((keys, expected_keys), (values, expected_values)):
        assert is_close(own[0, :, start], other[0, :, start])
        own[0, :, start] = other[0, :, start] = 0
        assert torch.equal(own, other)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
def test_traced_drafts_are_those_of_torchs_operators(model_type):
    """Guards against a position that becomes a constant of the trace, and against layers that take the copies
    of others.
    """
    model = family(model_type, head_dim=16, max_position_embeddings=256).float()
    fuse(model)
    trace_after(model, 0)
    runner = TracedRunner(model)
    number = len(runner.layers)
    drafter = quantized(runner, number)
    assert all(type(layer) is Int4Layer for layer in drafter.layers)
    assert all(layer._can_attend for layer in drafter.layers)
    plain = quantized(ModelRunner(model), number)
    plain.layers = [_without_operators(layer) for layer in plain.layers]
    ids = torch.randint(3, 50, (1, 140), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for prompt in (3, 130):
            states = []
            for own in (drafter, plain):
                cache = runner.new_cache(prompt, prompt + 9)
                forward(runner, cache, ids[:, :prompt])
                passes = [forward(own, cache, ids[:, prompt + i :][:, :1]) for i in range(3)]
                states.append([passed.hidden[0] for passed in passes])
            for got, expected in zip(*states, strict=True):
                assert is_close(got, expected)


def test_traced_drafts_have_the_norms_of_now():
    """Guards against an epsilon that stays a constant of a trace."""
    model = family("llama", head_dim=16).float()
    fuse(model)
    trace_after(model, 0)
    ids = torch.randint(3, 50, (1, 9), generator=torch.Generator().manual_seed(0))

    def drafted(runner):
        cache = runner.new_cache(8, 9)
        forward(runner, cache, ids[:, :8])
        return forward(quantized(runner, len(runner.layers)), cache, ids[:, 8:]).hidden[0]

    for epsilon in (1e-6, 1.0, 30.0):
        for layer in model.model.layers:
            layer.input_layernorm.variance_epsilon = epsilon
            layer.post_attention_layernorm.variance_epsilon = epsilon / 3
        with torch.inference_mode():
            assert is_close(drafted(TracedRunner(model)), drafted(ModelRunner(model))), epsilon


def _without_operators(layer):
    plain = object.__new__(FusedLayer)
    vars(plain).update(vars(layer))
    return plain


@pytest.mark.parametrize(
    ("model_type", "config", "fits"),
    [
        ("llama", {}, True),
        ("llama", {"attention_bias": True}, False),
        ("llama", {"mlp_bias": True}, False),
        ("llama", {"hidden_act": "gelu"}, False),
        ("gemma3_text", {}, False),
    ],
)
def test_layers_that_the_operators_do_not_compute(model_type, config, fits):
    """Guards against biases that are left out, and a Gemma's norms, sums and activation as Llama's."""
    model = family(model_type, **config).float()
    fuse(model)
    layers = quantized(ModelRunner(model), 2).layers
    assert [type(layer) is Int4Layer for layer in layers] == [fits, fits]


def test_halves_have_torchs_operators():
    """Guards against activations in 16 bits in operators that take float32."""
    model = own_llama().bfloat16()
    fuse(model)
    assert not any(type(layer) is Int4Layer for layer in quantized(ModelRunner(model), 2).layers)
    drafts = {"exit_layer": 2, "num_speculations": 2, "draft_weights": "int4"}
    assert len(generate(model, [5, 9, 4], max_steps=6, eos=[], **drafts).predicted_tokens) == 6
