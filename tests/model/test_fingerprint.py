"""A fingerprint changes with a model. Caches, copies and captured passes are valid while it is the same."""

import copy
import gc

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from hypothesis import given
from hypothesis import strategies as st
from test_fake_cuda import DEVICE
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor, Replicate, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from self_speculation.model import fingerprint as fingerprints
from self_speculation.model.fingerprint import contents, fingerprint, structure


def norm(model):
    return model.model.layers[1].input_layernorm


def weight(model):
    return model.model.layers[2].mlp.down_proj.weight  # [32, 48]


CHANGES = {
    "a row, through data": lambda model: weight(model).data[7].mul_(1.5),
    "a column, through data": lambda model: weight(model).data[:, 11].mul_(1.5),
    "a sign": lambda model: model.lm_head.weight.data.neg_(),
    "an element of a norm, through data": lambda model: norm(model).weight.data[3].mul_(30),
    "an element, by torch": lambda model: nn.init.ones_(weight(model)[3, 5]),
    "a new storage": lambda model: setattr(weight(model), "data", weight(model).data.clone()),
    "a new parameter": lambda model: setattr(
        model.model.layers[2].mlp.down_proj, "weight", nn.Parameter(weight(model).data)
    ),
    "a format": lambda model: model.to(torch.bfloat16),
    "a buffer": lambda model: model.model.rotary_emb.inv_freq.mul_(2),
    "a number": lambda model: setattr(norm(model), "variance_epsilon", 0.5),
    "an element of a list": lambda model: norm(model).active.__setitem__(0, "b"),
    "an element of a list of a dict": lambda model: norm(model).scales["b"].__setitem__(0, 2.0),
    "a class": lambda model: setattr(norm(model), "__class__", GemmaRMSNorm),
    "a forward": lambda model: setattr(norm(model), "forward", lambda hidden: hidden),
    "a hook of accelerate": lambda model: add_hook_to_module(norm(model), AlignDevicesHook("cpu")),
    "a hook before": lambda model: norm(model).register_forward_pre_hook(lambda *_: None),
    "a hook after": lambda model: norm(model).register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_changes_it(model, change):
    """Guards against keys, values and copies that are used after their model has changed. Such as peft, which
    names the adapter in a list of each layer.
    """
    norm(model).active, norm(model).scales = ["a"], {"a": 1.0, "b": [1.0]}
    before = fingerprint(model)
    assert fingerprint(model) == before
    CHANGES[change](model)
    assert fingerprint(model) != before


def test_the_same_bits_in_another_format(model):
    """Guards against a fingerprint of addresses and bits alone."""
    head = model.lm_head.to(torch.bfloat16)
    before = fingerprint(head)
    head.weight.data = head.weight.data.view(torch.float16)
    assert fingerprint(head) != before


def test_hooks_at_one_address_differ(model):
    """Guards against comparing hooks by `id`: a later hook may get the `id` of a freed one."""

    def put():
        return norm(model).register_forward_hook(lambda module, inputs, output: output * 2)

    handle = put()
    before = fingerprint(model)
    handle.remove()
    gc.collect()
    put()
    assert fingerprint(model) != before


def test_a_pass_does_not_change_it(model):
    """Guards against a cache that is never valid, since some rotary embeddings write to their buffers."""
    rotary = model.model.rotary_emb
    rotary.register_forward_pre_hook(lambda *_: (rotary.inv_freq.mul_(1), None)[1])
    model(torch.tensor([[5, 9, 4]]))
    before = fingerprint(model)
    model(torch.tensor([[5, 9, 4]]))
    assert fingerprint(model) == before


@given(rows=st.integers(1, 400), columns=st.integers(1, 400))
def test_a_sample_meets_every_row_and_column(rows, columns):
    """Guards against a row or a column that can change unseen, and against samples as large as the weight."""
    places = fingerprints._sample(torch.arange(rows * columns).view(rows, columns))
    assert {*(places // columns).tolist()} == {*range(rows)}
    assert {*(places % columns).tolist()} == {*range(columns)}
    if min(rows, columns) > 60:
        assert len(places) <= 1.2 * max(rows, columns)


def test_a_sample_of_a_packed_weight_is_small():
    """Guards against reading whole weights of bitsandbytes, [n, 1], and against missing rows in them."""
    packed = torch.arange(2176 * 500).view(-1, 1)
    places = fingerprints._sample(packed)
    assert {*(places // 2176).tolist()} == {*range(500)}
    assert len(places) < 0.001 * len(packed) + 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool])
def test_tensors_of_every_kind(dtype):
    """Guards against formats or strides that cannot be read, and against NaN, which differs from itself."""
    torch.manual_seed(0)
    whole = (torch.randn(24, 32) * 9).to(dtype)
    if dtype.is_floating_point:
        whole[:, 4] = torch.nan
    for part in (lambda w: w, torch.t, lambda w: w[:, 3:20], lambda w: w[2, 3], lambda w: w[:0]):
        tensor = part(whole.clone())
        before = contents([[tensor]])
        assert contents([[tensor.clone()]]) == before
        if tensor.numel():
            tensor.copy_(tensor.logical_not() if dtype == torch.bool else 1)
            assert contents([[tensor]]) != before


def test_a_change_belongs_to_its_group(model):
    """Guards against a change of one layer that invalidates another, also of another format."""
    model.model.layers[1].to(torch.bfloat16)
    groups = [[*layer.parameters()] for layer in model.model.layers]
    before = contents(groups)
    model.model.layers[2].mlp.up_proj.weight.data[3] = 0
    assert [a == b for a, b in zip(before, contents(groups), strict=True)] == [True, True, False, True]
    assert contents([groups[0]]) == before[:1]
    assert contents([]) == []


def test_weights_without_versions_or_memory(model):
    """Guards against errors with a model that was made in inference mode or is offloaded."""
    with torch.inference_mode():
        made = copy.deepcopy(model)
        before = fingerprint(made)
        made.lm_head.weight[3] = 0
        assert fingerprint(made) != before
    assert fingerprint(model.to("meta")) == fingerprint(model)


@pytest.mark.usefixtures("one_rank")
def test_a_sharded_weight_is_read_locally(model):
    """Guards against reading the parts of other ranks."""
    head, mesh = model.lm_head, init_device_mesh("cpu", (1,))
    head.weight = nn.Parameter(DTensor.from_local(head.weight.data, mesh, [Replicate()]))
    before = fingerprint(model)
    assert fingerprint(model) == before
    head.weight.to_local().data[3] = 0
    assert fingerprint(model) != before


class Copies(TorchDispatchMode):
    """Counts bytes of tensors that are no views."""

    made = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not function.is_view:
            self.made += result.nbytes
        return result


def test_weights_on_a_gpu_are_sampled_in_one_read(monkeypatch):
    """Guards against copies of whole weights (8 GB for a model of 8 billion), and against a second read."""

    class Read(Exception):
        """Fake tensors have no bits."""

    def cpu(tensor):
        read.append(tensor)
        raise Read

    read, shapes = [], ((512, 256), (256, 640))
    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    with FakeTensorMode():
        weights = [torch.empty(shape, dtype=torch.bfloat16, device=DEVICE) for shape in shapes]
        weights.append(torch.empty(256, dtype=torch.float32, device=DEVICE))
        with Copies() as copies, pytest.raises(Read):
            contents([weights])
    assert [(tensor.device, tensor.dtype) for tensor in read] == [(torch.device(DEVICE), torch.uint8)]
    assert 0 < copies.made < 0.03 * sum(weight.nbytes for weight in weights)


def test_structure_needs_no_read_from_the_device(model, monkeypatch):
    """Guards against waiting for a GPU before each answer."""
    for name in ("cpu", "tolist", "item", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("a read"))
    before = structure(model)
    model.lm_head.weight.data.neg_()
    assert structure(model) == before
