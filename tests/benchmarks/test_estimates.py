"""Arithmetic of memory and time, and what the page says of it."""

import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM

from benchmarks import estimates
from benchmarks.synthetic import llama


def test_the_pages_have_the_tables():
    """Guards against pages with figures of an older formula."""
    assert estimates.training_table() in (ROOT / "docs" / "training.md").read_text()
    assert estimates.decoding_table() in (ROOT / "docs" / "gpu.md").read_text()


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


def test_decoding_by_hand():
    """Guards against kernels, a head or a cache that the times leave out."""
    config = llama(256, 1024, 4, 8, 2, 1000, False)
    weights, cache = 256 * 256 * 2 + 2 * 256 * 64 + 3 * 256 * 1024, 2 * 64 * 1000
    layer, head = (2 * number / 2.7e12 for number in (weights + cache, 256 * 1000))
    bytes_alone = estimates.decoding(config, 1, kernels=0)
    assert bytes_alone == pytest.approx((4 * layer + head, layer + head, 10 * layer + 7 * head))
    times = estimates.decoding(config, 1)
    assert times.plain_step - bytes_alone.plain_step == pytest.approx(4 * 27.5e-6 + 18 * 2.75e-6)
    assert times.round == pytest.approx(6 * times.draft_step + times.plain_step + 50e-6)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_estimates_are_not_below_what_is_resident():
    """Guards against something large that was forgotten, and against a guess of twice what is needed."""
    benchmark = [sys.executable, ROOT / "benchmarks" / "training_memory.py"]
    result = subprocess.run(benchmark, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    losses = [float(peak) for peak in re.findall(r"^\w+ +(\d+|inf)$", result.stdout, re.MULTILINE)]
    assert len(losses) == 3, result.stdout
    assert max(losses[1:]) < 0.1 * losses[0], result.stdout
    steps = re.findall(r"^\w+ +(\d+) +(\d+)$", result.stdout, re.MULTILINE)
    assert len(steps) >= 3, result.stdout
    for measured, estimated in steps:
        assert 0.9 * int(measured) < int(estimated) < 1.6 * int(measured), result.stdout
