"""A fingerprint changes with a model. Caches, copies and captured passes are valid while it is the same."""

import copy
import gc

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, init_device_mesh
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from self_speculation.fingerprint import fingerprint, structure


def norm(model):
    return model.model.layers[1].input_layernorm


def weight(model):
    return model.model.layers[2].mlp.down_proj.weight  # [32, 48]


CHANGES = {
    "a row": lambda model: weight(model).detach()[7].mul_(1.5),
    "a sign": lambda model: model.lm_head.weight.detach().neg_(),
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


def test_weights_without_versions_or_memory(model):
    """Guards against errors with a model that was made in inference mode or is offloaded."""
    with torch.inference_mode():
        made = copy.deepcopy(model)
        assert fingerprint(made) != fingerprint(made)  # writes are not seen
    assert fingerprint(model.to("meta")) == fingerprint(model)


@pytest.mark.usefixtures("one_rank")
def test_a_sharded_weight_is_read_locally(model):
    """Guards against reading the parts of other ranks."""
    head, mesh = model.lm_head, init_device_mesh("cpu", (1,))
    head.weight = nn.Parameter(DTensor.from_local(head.weight.data, mesh, [Replicate()]))
    before = fingerprint(model)
    assert fingerprint(model) == before
    with torch.no_grad():
        head.weight.to_local()[3] = 0
    assert fingerprint(model) != before


def test_structure_needs_no_read_from_the_device(model, monkeypatch):
    """Guards against waiting for a GPU before each answer."""
    for name in ("cpu", "tolist", "item", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("a read"))
    before = structure(model)
    model.lm_head.weight.data.neg_()
    assert structure(model) == before
