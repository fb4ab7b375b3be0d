"""`Linear` computes x W^T + b over the current weights, by an operator or by torch."""

import pytest
import torch
from conftest import assert_close, needs_operators, own_llama
from torch import nn

from self_speculation.passes.quantized_layers import quantize
from self_speculation.weights.linear import Linear


@pytest.mark.parametrize("width", [1, 2, 5, 64, 65])
@pytest.mark.parametrize("rows", [(64, 32, 32), (131, 12, 12), (151,)])
@pytest.mark.parametrize("biases", [(False, False, False), (True, True, True), (False, True, False)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kernel_computes_the_product(width, rows, biases, dtype):
    """Guards against a wrong kernel that only some widths use, against rows that pieces split badly, and
    against a bias that is added to the outputs of another projection.
    """
    torch.manual_seed(0)
    pairs = zip(rows, biases, strict=False)
    projections = [nn.Linear(24, n, bias=bias).to(dtype) for n, bias in pairs]
    x = torch.randn(width, 24)
    with torch.inference_mode():
        expected = torch.cat([projection.float()(x) for projection in projections], -1)
        joint = Linear(*(projection.to(dtype) for projection in projections))
        assert_close(joint(x), expected)
        assert joint(x).is_contiguous()
        assert_close(joint.add_to(torch.ones_like(expected), x), expected + 1)


def test_biases_of_all_products():
    """Guards against a bias that sums in place on a GPU leave out."""
    torch.manual_seed(0)
    module, x, hidden = nn.Linear(64, 32), torch.randn(3, 64), torch.randn(3, 32)
    with torch.inference_mode():
        linear, expected = Linear(module), module(x)
        linear._joint = module.weight.t(), module.bias  # as on a GPU
        torch.testing.assert_close(linear.add_to(hidden.clone(), x), hidden + expected)


@needs_operators
@pytest.mark.parametrize("bits", [4, 8])
def test_rounded_models_keep_their_biases(bits):
    """Guards against weights in few bits without the biases of the model."""
    model = own_llama(attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    biases = {name: bias.clone() for name, bias in model.named_parameters() if name.endswith("bias")}
    quantize(model, bits)
    rounded = {name: bias for name, bias in model.named_buffers() if name.endswith("bias")}
    assert rounded.keys() == biases.keys()
    assert all(torch.equal(rounded[name], biases[name]) for name in biases)
