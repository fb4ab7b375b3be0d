"""`Linear` and its packed copies compute x W^T + b over the current weights, by whichever kernel."""

import pytest
import torch
from conftest import assert_close, needs_fbgemm, needs_onednn
from torch import nn

from self_speculation.model import linear
from self_speculation.model.linear import NARROW, Float16Linear, Linear, follow_weights


@pytest.mark.parametrize("width", [1, 2, 5, NARROW, NARROW + 1])
@pytest.mark.parametrize("rows", [(64, 32, 32), (131, 12, 12), (151,)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=needs_onednn)])
def test_every_kernel_computes_the_product(width, rows, bias, packed, monkeypatch):
    """Guards against a wrong kernel that only some machines use, and against rows that blocks split badly."""
    torch.manual_seed(0)
    projections = [nn.Linear(24, n, bias=bias) for n in rows]
    x = torch.randn(width, 24)
    with torch.inference_mode():
        expected = torch.cat([projection(x) for projection in projections], -1)
        joint = Linear(*projections)
        if packed:
            joint.may_be_packed = True
            monkeypatch.setattr(linear, "_PACKED", {torch.float32: [width]})
        assert_close(joint(x), expected)
        assert joint(x).is_contiguous()
        assert_close(joint.add_to(torch.ones_like(expected), x), expected + 1)


@pytest.mark.parametrize("size", [1, 100, 2**24])
@needs_fbgemm
def test_a_weight_is_packed_in_pieces(size, monkeypatch):
    """Guards against rows that are lost or doubled where a piece ends, and against a copy in float32 of a
    whole large head.
    """
    monkeypatch.setattr(linear, "_PIECE", size)
    torch.manual_seed(0)
    weights, x = [torch.randn(rows, 40).bfloat16() for rows in (3, 50, 7)], torch.randn(5, 40)
    made = Float16Linear(*weights)
    exact = torch.cat(weights).half().float()
    assert_close(made(x), x @ exact.T)
    assert made.num_bytes == 2 * exact.numel()
    assert len(made.packed) == {1: 60, 100: 20, 2**24: 1}[size]


def test_copies_are_dropped_when_a_bias_changes():
    """Guards against comparing weights alone, and against a new copy that hides an outdated one."""
    own = nn.Linear(32, 32)
    some = Linear(own)
    some.cached_copy("a copy", object)
    follow_weights([some])
    assert "a copy" in some.copies
    with torch.no_grad():
        own.bias[3] += 1
    some.cached_copy("another copy", object)
    follow_weights([some])
    assert "a copy" not in some.copies


@pytest.mark.parametrize("fp32_activations", [False, pytest.param(True, marks=needs_fbgemm)])
def test_some_projections_have_a_bias(fp32_activations):
    """Guards against a bias that is added to the outputs of another projection, or to none."""
    torch.manual_seed(0)
    projections = [nn.Linear(8, rows, bias=bias) for rows, bias in ((6, False), (4, True), (2, False))]
    x = torch.randn(3, 8)
    with torch.no_grad():
        expected = torch.cat([projection(x) for projection in projections], 1)
        joint = Linear(*projections, fp32_activations=fp32_activations)
        torch.testing.assert_close(joint(x), expected, atol=2e-3, rtol=2e-3)
        projections[1].bias += 1
        expected[:, 6:10] += 1
        torch.testing.assert_close(joint(x), expected, atol=2e-3, rtol=2e-3)
