"""One fingerprint tells whether a model is still what it was: for kept caches, copies and compiled passes."""

import copy
import gc

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from conftest import tiny_llama
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


@pytest.fixture
def model():
    return copy.deepcopy(tiny_llama())


def norm(model):
    return model.model.layers[1].input_layernorm


def weight(model):
    return model.model.layers[2].mlp.down_proj.weight  # [32, 48]


def stepped(model):
    ids = torch.tensor([[5, 9, 4]])
    optimizer = torch.optim.SGD([weight(model)], lr=0.1)
    model(ids, labels=ids).loss.backward()
    optimizer.step()


def element_of(model):
    with torch.no_grad():
        weight(model)[3, 5] += 1


CHANGES = {
    "a row, through data": lambda model: weight(model).data[7].mul_(1.5),
    "a column, through data": lambda model: weight(model).data[:, 11].mul_(1.5),
    "two rows": lambda model: weight(model).data.__setitem__([4, 9], weight(model).data[[9, 4]]),
    "two columns": lambda model: weight(model).data.__setitem__(
        (slice(None), [4, 9]), weight(model).data[:, [9, 4]]
    ),
    "a sign": lambda model: model.lm_head.weight.data.neg_(),
    "an element of a norm, through data": lambda model: norm(model).weight.data[3].mul_(30),
    "an element": element_of,
    "loaded": lambda model: model.load_state_dict(tiny_llama(agreement="always").state_dict()),
    "stepped": stepped,
    "a new storage": lambda model: setattr(weight(model), "data", weight(model).data.clone()),
    "a new parameter": lambda model: setattr(
        model.model.layers[2].mlp.down_proj, "weight", nn.Parameter(weight(model).data)
    ),
    "a format": lambda model: model.to(torch.bfloat16),
    "a buffer": lambda model: model.model.rotary_emb.inv_freq.mul_(2),
    "a scaling of rotation": lambda model: setattr(model.model.rotary_emb, "attention_scaling", 1.5),
    "an epsilon": lambda model: setattr(norm(model), "variance_epsilon", 0.5),
    "a scaling of scores": lambda model: setattr(model.model.layers[0].self_attn, "scaling", 0.9),
    "a layer's index": lambda model: setattr(model.model.layers[0].self_attn, "layer_idx", 3),
    "a class": lambda model: setattr(norm(model), "__class__", GemmaRMSNorm),
    "a forward": lambda model: setattr(norm(model), "forward", lambda hidden: hidden),
    "a hook of accelerate": lambda model: add_hook_to_module(norm(model), AlignDevicesHook("cpu")),
    "a hook before": lambda model: norm(model).register_forward_pre_hook(lambda *_: None),
    "a hook after": lambda model: norm(model).register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_sees(model, change):
    """Guards against keys, values and copies that are used after the model has changed."""
    before = fingerprint(model)
    assert fingerprint(model) == before
    CHANGES[change](model)
    assert fingerprint(model) != before


def test_it_sees_what_is_in_lists(model):
    """Guards against keys of an adapter that is another by now: peft names it in a list of each layer."""
    norm(model).active, norm(model).scales = ["a"], {"a": 1.0, "b": [1.0]}
    seen = [fingerprint(model)]
    norm(model).active[0] = "b"
    seen.append(fingerprint(model))
    norm(model).scales["b"][0] = 2.0
    seen.append(fingerprint(model))
    assert len({*seen}) == 3


def test_another_hook_at_the_same_address(model):
    """Guards against a hook that is told from another one by its `id`, which a later one takes over."""

    def put():
        return norm(model).register_forward_hook(lambda module, inputs, output: output * 2)

    handle = put()
    before = fingerprint(model)
    handle.remove()
    gc.collect()
    put()
    assert fingerprint(model) != before


def test_an_answer_changes_nothing(model):
    """Guards against what a model's own passes do to it: then nothing would ever be kept."""
    rotary = model.model.rotary_emb
    rotary.register_forward_pre_hook(
        lambda *_: (rotary.inv_freq.mul_(1), None)[1]
    )  # as those of long contexts
    model(torch.tensor([[5, 9, 4]]))
    before = fingerprint(model)
    model(torch.tensor([[5, 9, 4]]))
    assert fingerprint(model) == before


@given(rows=st.integers(1, 400), columns=st.integers(1, 400))
def test_every_row_and_every_column_is_met(rows, columns):
    """Guards against a row or a column that may be written to unseen, and a sample as large as the weight."""
    places = fingerprints._sample(torch.arange(rows * columns).view(rows, columns))
    assert {*(places // columns).tolist()} == {*range(rows)}
    assert {*(places % columns).tolist()} == {*range(columns)}
    if min(rows, columns) > 60:  # of shorter ones, all are few
        assert len(places) <= 1.2 * max(rows, columns)


@pytest.mark.parametrize("columns", [2048, 2176, 5504])
def test_a_packed_weight_of_one_dimension(columns):
    """Guards against millions of bytes that are read of each weight of bitsandbytes, [n, 1], and against rows
    in there that are left out.
    """
    packed = torch.arange(columns * 500).view(-1, 1)
    places = fingerprints._sample(packed)
    assert {*(places // columns).tolist()} == {*range(500)}
    assert len(places) < 0.001 * len(packed) + 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool])
@pytest.mark.parametrize(
    "laid_out",
    [lambda w: w, lambda w: w.t(), lambda w: w[:, 3:20], lambda w: w[5], lambda w: w[2, 3], lambda w: w[:0]],
    ids=["rows", "columns", "some columns", "a vector", "a number", "nothing"],
)
def test_tensors_of_every_kind(dtype, laid_out):
    """Guards against kinds of weights that cannot be read, and NaN that differ from themselves."""
    torch.manual_seed(0)
    whole = (torch.randn(24, 32) * 9).to(dtype)
    if dtype.is_floating_point:
        whole[:, 4] = torch.nan
    tensor = laid_out(whole)
    before = contents([[tensor]])
    assert contents([[tensor.clone()]]) == before
    if tensor.numel():
        tensor.copy_(tensor.logical_not() if dtype == torch.bool else 1)
        assert contents([[tensor]]) != before


def test_groups_are_told_apart(model):
    """Guards against a change that is put down to another layer, and to both of two formats."""
    layers = [
        layer.to(torch.bfloat16 if i % 2 else torch.float32) for i, layer in enumerate(model.model.layers)
    ]
    groups = [[*layer.parameters()] for layer in layers]
    before = contents(groups)
    layers[2].mlp.up_proj.weight.data[3] = 0
    assert [a == b for a, b in zip(before, contents(groups), strict=True)] == [True, True, False, True]
    assert contents([groups[0]]) == before[:1]
    assert contents([]) == []


def test_weights_without_versions_or_memory(model):
    """Guards against a model that was made in inference mode, and against one that is offloaded."""
    with torch.inference_mode():
        made = copy.deepcopy(model)
        before = fingerprint(made)
        made.lm_head.weight[3] = 0
        assert fingerprint(made) != before
    offloaded = copy.deepcopy(model).to("meta")
    assert fingerprint(offloaded) == fingerprint(offloaded)


@pytest.fixture
def mesh(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_a_weight_that_processes_share(model, mesh):
    """Guards against reading all of it, which other processes have: each looks at its own part."""
    head = model.lm_head
    head.weight = nn.Parameter(DTensor.from_local(head.weight.data, mesh, [Replicate()]))
    before = fingerprint(model)
    assert fingerprint(model) == before
    head.weight.to_local().data[3] = 0
    assert fingerprint(model) != before


class Made(TorchDispatchMode):
    """Tensors that are more than views."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.cat, torch.ops.aten.clone, torch.ops.aten._to_copy):
            self.made.append(result)
        return result


def test_weights_on_a_gpu_are_not_copied(monkeypatch):
    """Guards against copies of weights, let alone as int64: 8 GB for a model of 8 billion weights, at each
    turn of a chat; and against a second read.
    """
    read = []

    class Read(Exception):
        """Tensors without memory have no bits to go on with."""

    def cpu(tensor):
        read.append(tensor)
        raise Read

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    with FakeTensorMode():
        weights = [
            torch.empty(size, dtype=torch.bfloat16, device=DEVICE) for size in ((512, 256), (256, 640))
        ]
        weights.append(torch.empty(256, dtype=torch.float32, device=DEVICE))
        with Made() as ran, pytest.raises(Read):
            contents([weights])
    assert len(read) == 1
    assert read[0].device == torch.device(DEVICE)
    assert sum(tensor.nbytes for tensor in ran.made) < 0.03 * sum(weight.nbytes for weight in weights)
    assert all(tensor.dtype in (torch.bfloat16, torch.float32, torch.uint8) for tensor in ran.made)
    assert read[0].dtype == torch.uint8


def test_structure_is_read_on_the_host(model, monkeypatch):
    """Guards against a read from the device each time that somebody asks whether modules are the same."""
    for name in ("cpu", "tolist", "item", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("a read"))
    before = structure(model)
    model.lm_head.weight.data.neg_()
    assert structure(model) == before
