"""`Linear` computes x W^T + b over the current weights, by an operator or by torch."""

import pytest
import torch
from conftest import assert_close
from torch import nn

from self_speculation.model.linear import MAX_NARROW_TOKENS, Linear


@pytest.mark.parametrize("width", [1, 2, 5, MAX_NARROW_TOKENS, MAX_NARROW_TOKENS + 1])
@pytest.mark.parametrize("rows", [(64, 32, 32), (131, 12, 12), (151,)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kernel_computes_the_product(width, rows, bias, dtype):
    """Guards against a wrong kernel that only some widths use, and against rows that pieces split badly."""
    torch.manual_seed(0)
    projections = [nn.Linear(24, n, bias=bias).to(dtype) for n in rows]
    x = torch.randn(width, 24)
    with torch.inference_mode():
        expected = torch.cat([projection.float()(x) for projection in projections], -1)
        joint = Linear(*(projection.to(dtype) for projection in projections))
        assert_close(joint(x), expected)
        assert joint(x).is_contiguous()
        assert_close(joint.add_to(torch.ones_like(expected), x), expected + 1)


def test_copies_are_dropped_when_a_bias_changes():
    """Guards against comparing weights alone, and against a new copy that hides an outdated one."""
    own = nn.Linear(32, 32)
    some = Linear(own)
    some.cached_copy("a copy", object)
    some.follow_weights()
    assert "a copy" in some.copies
    with torch.no_grad():
        own.bias[3] += 1
    some.cached_copy("another copy", object)
    some.follow_weights()
    assert "a copy" not in some.copies


@pytest.mark.parametrize("width", [3, MAX_NARROW_TOKENS + 1])
def test_some_projections_have_a_bias(width):
    """Guards against a bias that is added to the outputs of another projection, or to none."""
    torch.manual_seed(0)
    projections = [nn.Linear(8, rows, bias=bias) for rows, bias in ((6, False), (4, True), (2, False))]
    x = torch.randn(width, 8)
    with torch.no_grad():
        expected = torch.cat([projection(x) for projection in projections], 1)
        joint = Linear(*projections)
        assert_close(joint(x), expected)
        projections[1].bias += 1
        expected[:, 6:10] += 1
        assert_close(joint(x), expected)
