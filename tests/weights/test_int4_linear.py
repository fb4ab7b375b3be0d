"""Weights in four bits: rounding by torch and by the operator, and products by torch's kernel."""

from functools import partial

import pytest
import torch
from conftest import assert_close, needs_operators
from torch import nn
from torch.nn.functional import pad

from self_speculation.weights import int4_linear
from self_speculation.weights.few_bits import FewBitsLinear
from self_speculation.weights.int4_linear import Int4Linear, in_four_bits

# Shapes with whole blocks of rows and groups of columns, and shapes without.
SHAPES = [(64, 32), (2128, 96), (50, 48), (2100, 576), (40, 100), (17, 33)]


def rounded(weight, squares=None):
    """The numbers that torch rounds a weight to."""
    shape = weight.shape
    padding = (0, -weight.shape[1] % 32)
    squares = torch.ones(shape[1]) if squares is None else squares
    quants, numbers = in_four_bits(pad(weight, padding), int4_linear._importance(squares))
    scales, zero_points = (part.float().repeat_interleave(32, 0).T for part in numbers.unbind(2))
    return ((quants - 8) * scales + zero_points)[:, : shape[1]]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_kernel_of_torch_multiplies_by_what_was_packed(shape, monkeypatch):
    """Guards against quants, scales or zero points in another order than the kernel's, against errors where a
    large weight is packed in parts, and against padding that counts.
    """
    ops = torch.ops.aten
    squares = torch.ones(shape[1])
    monkeypatch.setattr(ops, "_weight_int4pack_mm", ops._weight_int4pack_mm_for_cpu)
    packed = partial(ops._convert_weight_to_int4pack_for_cpu, innerKTiles=1)
    monkeypatch.setattr(int4_linear, "_packed", packed)
    monkeypatch.setattr(int4_linear, "_AT_A_TIME", 2**18)
    torch.manual_seed(0)
    linear = nn.Linear(*reversed(shape)).requires_grad_(False)
    copied = Int4Linear(linear.weight, linear.bias, squares)
    approximate = rounded(linear.weight)
    assert (approximate - linear.weight).norm() < 0.13 * linear.weight.norm()
    for width in (1, 2, 5, 17):
        x = torch.randn(width, shape[1]).bfloat16().float()
        got = copied(x)
        assert got.is_contiguous()
        assert_close(got, x @ approximate.T + linear.bias, torch.bfloat16, roundings=2)


def test_columns_of_large_inputs_are_closest():
    """Guards against a rounding that ignores which inputs are large: those make the error of the output; and
    against a range that always includes zero: a group of positive weights needs all 16 quants.
    """
    weight = torch.linspace(3.0, 4.0, 32)[None]
    assert (rounded(weight) - weight).abs().max() < 0.6 / 15 + 4 * 2**-8
    torch.manual_seed(0)
    weight = torch.randn(200, 32)
    squares = torch.ones(32)
    squares[::8] = 100.0
    errors = [((rounded(weight, each) - weight).square() @ squares).mean() for each in (squares, None)]
    assert errors[0] < 0.7 * errors[1]


@needs_operators
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_operator_rounds_as_torch_does(shape, dtype):
    """Guards against other copies on a GPU. Sums in another order decide ties, also of scales between two
    numbers of bfloat16.
    """
    torch.manual_seed(0)
    weight = (torch.randn(shape) + 0.2).to(dtype)
    squares = torch.rand(shape[1]) ** 4
    made = FewBitsLinear(int4_linear.four_bits(weight, squares), *shape).dequantized()
    expected = rounded(weight, squares)
    assert torch.isclose(made, expected, rtol=1e-4, atol=1e-5).float().mean() > 0.98
    errors = [float(((each - weight).square() @ squares).sum()) for each in (made, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_the_layout_of_a_gpu(monkeypatch):
    """Guards against swapped quants (the first of a pair is the upper half of a byte) and against tiles that
    do not divide the input size.
    """
    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", lambda *given: given)
    packed = [int4_linear._packed(torch.arange(n, dtype=torch.int32)[None] % 16) for n in (32, 64, 96, 128)]
    assert [tiles for _, tiles in packed] == [2, 4, 2, 8]
    assert packed[0][0].tolist() == [[0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF] * 2]
