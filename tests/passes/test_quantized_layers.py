"""Copies of layers in four bits: their products, their memory, and layers that have none.

test_self_speculation_generator.py and decoding/test_sampling_distribution.py check that outputs do not depend
on them.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import (
    COPY,
    PROMPT,
    assert_close,
    generate,
    own_llama,
    tiny_llama,
    transformers_generate,
)
from helpers import SPECULATION, refused, watch
from test_llama_model_utils import family, is_dense
from torch import nn

import benchmark
import sweep
from self_speculation.families import FAMILIES
from self_speculation.passes import quantized_layers
from self_speculation.passes.fused_layers import bytes_made, fuse
from self_speculation.passes.model_runner import ModelRunner
from self_speculation.passes.quantized_layers import quantized
from self_speculation.weights import int4_linear
from self_speculation.weights.int4_linear import copy_bytes, has_kernel, int4_copy
from self_speculation.weights.kernels import CPUOperators, cpu_operators
from self_speculation.weights.linear import Linear


def four_bits(weight):
    """The weight that steps, scales and middles stand for; inputs beyond whole groups are padded."""
    padding = (0, -weight.shape[1] % 32)
    counts = int4_linear._shares(nn.functional.pad(torch.ones(weight.shape[1]), padding))
    steps, numbers = int4_linear.in_four_bits(nn.functional.pad(weight, padding), counts)
    scales, middles = (part.float().repeat_interleave(32, 0).T for part in numbers.unbind(2))
    return ((steps - 8) * scales + middles)[:, : weight.shape[1]]


@pytest.mark.parametrize("shape", [(64, 32), (2128, 96), (50, 48), (2100, 576), (40, 100), (17, 33)])
def test_a_kernel_of_torch_multiplies_by_what_was_packed(shape, monkeypatch):
    """Guards against steps, scales or middles in another order than the kernel's, against errors where a
    large weight is packed in parts, and against padding that counts. Some shapes have whole blocks and
    groups, others have not. test_kernels.py has our kernel.
    """
    monkeypatch.setattr(int4_linear, "cpu_operators", lambda: CPUOperators(None))
    torch.manual_seed(0)
    linear = nn.Linear(*reversed(shape)).requires_grad_(False)
    copied, approximate = int4_copy(Linear(linear)), four_bits(linear.weight)
    assert (approximate - linear.weight).norm() < 0.13 * linear.weight.norm()
    for width in (1, 2, 5, 17):
        x = torch.randn(width, shape[1]).bfloat16().float()
        got = copied(x)
        assert got.is_contiguous()
        assert_close(got.float(), x @ approximate.T + linear.bias, torch.bfloat16, roundings=2)


def test_four_bits_reach_the_ends_of_a_group():
    """Guards against a range that always includes zero: a group of positive weights needs all 16 steps."""
    weight = torch.linspace(3.0, 4.0, 32)[None]
    steps, _ = int4_linear.in_four_bits(weight, int4_linear._shares(torch.ones(32)))
    assert (steps.min(), steps.max()) == (0, 15)
    assert (four_bits(weight) - weight).abs().max() < 0.6 / 15 + 4 * 2**-8
    assert not four_bits(torch.zeros(1, 32)).any()


def test_columns_of_large_inputs_are_closest():
    """Guards against a rounding that ignores which inputs are large: those make the error of the output."""
    torch.manual_seed(0)
    weight, squares = torch.randn(200, 32), torch.ones(32)
    squares[::8] = 100.0

    def error(counts):
        steps, numbers = int4_linear.in_four_bits(weight, int4_linear._shares(counts))
        scales, middles = numbers[0].float().unbind(1)
        off = (steps - 8) * scales[:, None] + middles[:, None] - weight
        return (off.square() @ squares).mean()

    assert error(squares) < 0.7 * error(torch.ones(32))
    runner = ModelRunner(tiny_llama(fused=True))
    found = quantized_layers._input_squares(runner, runner.layers)
    assert set(found) == {linear for layer in runner.layers for linear in layer.linears}
    assert all(len(squares) == linear.shape[1] for linear, squares in found.items())
    linear, copied = runner.layers[0].linears[1], quantized(runner, 1).layers[0].linears[1]
    expected = int4_copy(linear, found[linear])
    assert all(map(torch.equal, copied.tensors, expected.tensors))


def test_the_layout_of_a_gpu(monkeypatch):
    """Guards against swapped steps (the first of a pair is the upper half of a byte) and against tiles that
    do not divide the input size.
    """
    packed = []

    def convert(pairs, tiles):
        packed.append((pairs.tolist(), tiles))
        return pairs

    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", convert)
    for columns in (32, 64, 96, 128):
        int4_linear._packed(torch.arange(columns, dtype=torch.int32)[None] % 16)
    assert [tiles for _, tiles in packed] == [2, 4, 2, 8]
    assert packed[0][0] == [[0x01, 0x23, 0x45, 0x67, 0x89, 0xAB, 0xCD, 0xEF] * 2]


def test_there_may_be_no_kernel(monkeypatch):
    """Guards against a traceback where neither ours nor torch's can be had."""
    monkeypatch.setattr(quantized_layers, "has_kernel", lambda *_: False)
    with pytest.raises(ValueError, match="draft_weights int4: there are no kernels for it with torch"):
        quantized(ModelRunner(own_llama(fused=True)), 2)


def test_at_full_depth_drafts_are_mostly_right(bundled):
    """Guards against copies that guess worse than four bits allow. The model is trained: the two best tokens
    of a random one are too close.
    """
    model, tokenizer = bundled
    prompt = tokenizer.encode("def parse_header(line):\n")
    how = {**COPY, "exit_layer": model.config.num_hidden_layers}
    assert generate(model, prompt, max_steps=80, eos=[], **how).acceptance_rate > 0.8


def test_copies_that_do_not_fit_are_refused(monkeypatch):
    """Guards against a machine that swaps because copies fill its memory, and against new copies for each
    generation.
    """
    model = own_llama(3, fused=True)
    runner = ModelRunner(model)
    linears = [linear for part in (*runner.layers[:2], runner.head) for linear in part.linears]
    needed = sum(copy_bytes(linear.shape) for linear in linears)
    free = needed - 1
    monkeypatch.setattr(quantized_layers, "free_memory", lambda *_: free)
    with pytest.raises(ValueError, match=r"draft_weights int4: takes 0.00 GiB more .* 0.00 GiB are free"):
        quantized(runner, 2)
    free = needed
    quantized(runner, 2)
    free = 0
    quantized(ModelRunner(model), 2)  # the copies are there already
    with pytest.raises(ValueError, match="draft_weights int4: takes"):
        quantized(runner, 3)


@pytest.mark.parametrize("fused", [False, True])
def test_the_best_ids_have_the_logits_of_the_models_head(fused):
    """Guards against drafts of the second best id, which four bits confuse with the best in 6 of 100 cases,
    and against biases of other ids or rows.
    """
    torch.manual_seed(0)
    model = own_llama()
    model.lm_head.bias = nn.Parameter(torch.randn(50))
    if fused:
        fuse(model)
    runner, hidden = ModelRunner(model), torch.randn(3, 32)
    with torch.inference_mode():
        exact, logits = runner.head(hidden), quantized(runner, 4).head(hidden)
    best = exact.topk(4).indices
    assert_close(logits.gather(1, best), exact.gather(1, best))
    assert logits.topk(4).indices.equal(best)
    assert 0 < (logits - exact).norm() < 0.2 * exact.norm()  # the others have four bits


def in_sixteen_steps(model):
    """Weights that four bits hold."""
    for module in model.modules():
        if type(module) is nn.Linear:
            steps = torch.randint(-8, 8, module.weight.shape)
            steps[:, ::32], steps[:, 1::32] = -8, 7
            module.weight.data = steps * 0.06
    return model


@pytest.mark.parametrize("model_type", [*filter(is_dense, FAMILIES)])
def test_a_copy_of_every_family(model_type):
    """Guards against copies of layers that leave a product, a bias or a norm out, and against a draft that
    changes the output.
    """
    model = in_sixteen_steps(family(model_type, num_hidden_layers=2).float())
    expected = transformers_generate(model, PROMPT, 12, eos=-1)
    result = generate(model, PROMPT, max_steps=12, eos=[], **{**COPY, "exit_layer": 2})
    assert result.predicted_tokens == expected
    assert result.acceptance_rate > 0.7
    header = 0 if cpu_operators().variant is None else 64
    copied = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    assert bytes_made(model) == sum(
        header + copy_bytes(model.get_submodule(name).weight.shape) for name in copied
    )


def hooked(model):
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)


def with_another_forward(model):
    model.model.layers[1].mlp.forward = lambda x: x


def adapted(model):
    class Lora(nn.Linear):
        pass

    model.model.layers[1].mlp.up_proj = Lora(32, 48, bias=False)


def in_fewer_bits(model):
    weight = model.model.layers[1].mlp.up_proj.weight
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(weight.char(), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (hooked, "layer 1: mlp has a hook or another forward"),
        (with_another_forward, "layer 1: mlp has a hook or another forward"),
        (adapted, "layer 1: mlp.up_proj is a Lora of test_quantized_layers"),
        (in_fewer_bits, r"layer 1: its weights are in fewer bits or in parts \(Parameter, torch.int8\)"),
        (lambda model: model.lm_head.register_forward_hook(lambda *_: None), "head: it has a hook"),
    ],
)
@pytest.mark.parametrize("model_type", ["llama", "gemma"])
def test_layers_that_are_not_plain_have_no_copies(model_type, change, message):
    """Guards against a copy that ignores a hook, an adapter or the format of weights, and against an error
    that does not name them.
    """
    model = family(model_type, num_hidden_layers=2).float()
    change(model)
    fuse(model)
    with pytest.raises(ValueError, match=f"^draft_weights int4: {message}.*; only layers and a head without"):
        quantized(ModelRunner(model), 2)
    if "layer 1" in message:
        quantized(ModelRunner(model), 1)


@pytest.mark.parametrize("script", [benchmark, sweep])
def test_scripts_refuse_in_one_line(script, common, monkeypatch, capsys):
    """Guards against a traceback if a loaded model turns out to be too large to be copied."""
    monkeypatch.setattr(quantized_layers, "free_memory", lambda *_: 0)
    own = ["--exit_layer_last", "2"] if script is sweep else SPECULATION
    line = refused(script.main, [*common, *own, "--draft_weights", "int4"], capsys)
    assert "error: --draft_weights int4: takes" in line


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "found"),
    [
        ("cpu", torch.float16, None, True),
        ("cpu", torch.float64, None, False),
        ("cuda", torch.bfloat16, (8, 0), True),
        ("cuda", torch.float16, (7, 5), False),
        ("mps", torch.float16, None, False),
    ],
)
def test_kernels_follow_from_device_and_dtype(device, dtype, capability, found, monkeypatch):
    """Guards against any error of a trial, such as a lost card, that is told as a lack of kernels."""
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    assert has_kernel(torch.device(device), dtype) == found


def test_two_threads_make_a_copy_once(monkeypatch):
    """Guards against twice the memory and time when two threads first need copies."""
    made, together = watch(monkeypatch, quantized_layers, "int4_copy"), threading.Barrier(2)
    runner = ModelRunner(own_llama())

    def copied():
        together.wait(10)
        return quantized(runner, 2).head._copied

    with ThreadPoolExecutor(2) as pool:
        first, second = (pool.submit(copied) for _ in range(2))
        assert first.result(60) is second.result(60)
    assert len(made) == 2 * 7 + 1
