"""Weights that are mapped from a file: they are known without a read, and their pages can be freed."""

import mmap
import sys

import numpy as np
import pytest
import torch
from conftest import generate, own_llama
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from self_speculation.model.fused_layers import bytes_made, fuse
from self_speculation.model.mapped import MappedFiles, release

SHAPE = (300, 64)  # in float32 more than 18 pages
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def weights(tmp_path):
    tensors = {name: torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) for name in "abc"}
    save_file(tensors, tmp_path / "x.safetensors")
    return load_file(tmp_path / "x.safetensors")


def pages_in_memory(tensor):
    """Number of a tensor's pages in memory."""
    first, last = tensor.data_ptr() // mmap.PAGESIZE, (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE
    with open("/proc/self/pagemap", "rb", buffering=0) as pages:
        pages.seek(8 * first)
        return int((np.frombuffer(pages.read(8 * (last - first)), np.uint64) >> 63).sum())


def test_a_weight_has_an_address_until_it_is_written(weights, tmp_path):
    """Guards against a write through `.data` that is not seen, against one address for two weights, and
    against unseen writes to shared memory, to a shared mapping, or to fresh pages.
    """
    a, b, c = weights.values()
    before = [MappedFiles().address(weight) for weight in (a, b, c)]
    assert None not in before
    assert len(set(before)) == 3
    c.data[150, 3] = 5.0
    assert [MappedFiles().address(weight) for weight in (a, b, c)] == [*before[:2], None]
    (tmp_path / "x").write_bytes(bytes(2**16))
    shared = torch.from_file(str(tmp_path / "x"), shared=True, size=2**14)
    for weight in (torch.ones(SHAPE), torch.empty(2**20), torch.ones(SHAPE).share_memory_(), shared):
        assert MappedFiles().address(weight) is None


def test_released_pages_are_read_again(weights):
    """Guards against a model that is in memory twice, and against written weights that are lost."""
    a, b, _ = weights.values()
    b[100] = 7.0
    for weight in (a, b, torch.full(SHAPE, 3.0)):
        expected = weight.clone()
        assert pages_in_memory(weight) > 10
        release(weight)
        assert (pages_in_memory(weight) <= 1) == (weight is a)  # it shares a page with its neighbour
        assert torch.equal(weight, expected)


def test_without_proc_all_weights_are_read_and_kept(weights, monkeypatch):
    """Guards against an error on systems other than Linux."""

    def missing(*_, **__):
        raise FileNotFoundError

    weight = weights["a"]
    weight.sum()
    with monkeypatch.context() as patched:
        patched.setattr("builtins.open", missing)
        release(weight)
        assert MappedFiles().address(weight) is None
    assert pages_in_memory(weight) > 10


def test_a_packed_model_takes_no_memory_for_its_file(tmp_path):
    """Guards against four bytes per weight: a fingerprint would read the pages of the file again, and against
    weights that are copied out of it.
    """
    own_llama(vocab_size=1000).to(torch.bfloat16).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    places = [weight.data_ptr() for weight in model.parameters()]
    for _ in range(2):
        fuse(model, fp32_activations=True)
        generate(model, [5, 9], max_steps=2)
        assert pages_in_memory(model.model.layers[1].mlp.up_proj.weight) <= 1
        assert MappedFiles().address(model.lm_head.weight) is not None
    assert [weight.data_ptr() for weight in model.parameters()] == places
    assert bytes_made(model) == sum(m.weight.nbytes for m in model.modules() if isinstance(m, nn.Linear))
