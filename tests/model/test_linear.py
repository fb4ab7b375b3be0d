"""A fused model is saved, copied, wrapped and trained as any other."""

import copy
import pickle

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import generate, tiny_llama
from safetensors.torch import load_file, load_model, save_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from self_speculation.model.fused_layers import fuse

PROMPT = [5, 9, 4, 7, 7, 3]


@pytest.fixture
def model():
    fused = copy.deepcopy(tiny_llama())
    assert fuse(fused) == 4
    generate(fused, PROMPT, max_steps=4, eos=[])
    return fused


@pytest.fixture
def accelerator():
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()
    yield Accelerator(cpu=True)
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def empty():
    """The same shape, other weights."""
    torch.manual_seed(1)
    return LlamaForCausalLM(tiny_llama().config).eval()


def assert_whole(state):
    expected = tiny_llama().state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def by_accelerate(model, folder, accelerator):
    accelerator.save_model(model, folder)
    return load_file(folder / "model.safetensors")


def by_save_state(model, folder, accelerator):
    accelerator.prepare(model)
    accelerator.save_state(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    accelerator.load_state(folder)
    return model.state_dict()


def by_safetensors(model, folder, _):
    save_model(model, str(folder / "model.safetensors"))
    other = empty()
    load_model(other, str(folder / "model.safetensors"))
    return other.state_dict()


def by_transformers(model, folder, _):
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def by_pickle(model, *_):
    return pickle.loads(pickle.dumps(model)).state_dict()


def by_deepcopy(model, *_):
    return copy.deepcopy(model).state_dict()


@pytest.mark.parametrize(
    "way", [by_accelerate, by_save_state, by_safetensors, by_transformers, by_deepcopy, by_pickle]
)
def test_all_of_it_is_saved(model, way, tmp_path, accelerator):
    """Guards against projections that share one storage: what looks for those leaves all but one out."""
    state = way(model, tmp_path, accelerator)
    assert_whole({name: state[name] for name in tiny_llama().state_dict()})


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def by_ddp(model):
    return nn.parallel.DistributedDataParallel(model)


def by_fsdp(model):
    return torch.distributed.fsdp.FullyShardedDataParallel(
        model, device_id=torch.device("cpu"), use_orig_params=True
    )


def by_fully_shard(model):
    for layer in model.model.layers:
        torch.distributed.fsdp.fully_shard(layer)
    return torch.distributed.fsdp.fully_shard(model)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("wrap", [by_ddp, by_fsdp, by_fully_shard])
def test_all_of_it_is_trained(model, wrap):
    """Guards against weights that no longer share the joint one after they are flattened or sharded."""
    reference, ids = copy.deepcopy(tiny_llama()), torch.tensor([PROMPT])
    wrapped = wrap(model)
    for each in (wrapped, reference):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        each(ids, labels=ids).loss.backward()
        optimizer.step()
    with torch.no_grad():
        difference = (wrapped(ids).logits - reference(ids).logits).abs().max()
    assert difference < 1e-3
