"""Arithmetic of memory and time, and what the page says of it."""

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM

from benchmarks import estimates
from benchmarks.synthetic import llama

PAGE = (ROOT / "docs" / "gpu.md").read_text()
SLOW = pytest.mark.slow  # many layers
MODELS = [name if name == "Llama-3.2-1B" else pytest.param(name, marks=SLOW) for name in estimates.EXITS]


def test_the_page_of_training_has_the_table():
    """Guards against figures of an older formula."""
    assert estimates.training_table() in (ROOT / "docs" / "training.md").read_text()


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("name", MODELS)
def test_the_page_of_gpus_has_what_is_traced(name):
    """Guards against a page that says less than what passes launch and read now: a kernel more in each layer,
    a copy, a mask, or a call of the host that a replay does not save; and against weights, a head or a cache
    that a trace leaves out or counts twice.
    """
    assert estimates.decoding_row(name) in PAGE
    assert name != "Llama-3.2-1B" or estimates.about_launches(name) in PAGE
    config = estimates.MODELS[name]
    exit_layer = estimates.EXITS[name]
    width = config.hidden_size
    size = config.head_dim
    kv_heads = config.num_key_value_heads
    projections = 2 * size * (config.num_attention_heads + kv_heads) + 3 * config.intermediate_size
    layer = 2 * width * projections + 4 * 1000 * kv_heads * size
    head = 2 * width * config.vocab_size
    depth = config.num_hidden_layers
    passes = {"plain": (1, depth), "round": (7, depth + 6 * exit_layer)}
    for way, (heads, layers) in passes.items():
        found = sum(launch.num_bytes for launch in estimates.traces(name)[way].launches)
        assert found == pytest.approx(heads * head + layers * layer, rel=0.02)


def test_weights_gradients_and_optimizer_by_hand():
    """Guards against a tied model that is counted twice, and against an adapter of one matrix."""
    config = llama(8, 16, 3, 2, 1, 50, True)
    parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    full = estimates.memory(config, 1, 4, 2, computed_in=torch.float32)
    assert (full.weights, full.gradients, full.optimizer) == (4 * parameters, 4 * parameters, 8 * parameters)
    pairs = 3 * ((8 + 8) + 2 * (8 + 4) + (8 + 8) + 3 * (8 + 16))
    adapter = estimates.memory(config, 1, 4, 2, lora_rank=5)
    assert adapter.optimizer == 8 * 5 * pairs
    assert estimates.memory(config, 1, 4, 2, ranks=4).optimizer == 2 * parameters
