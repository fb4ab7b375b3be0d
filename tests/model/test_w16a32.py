"""Weights in 16 bits that a CPU multiplies in float32: the words of float32, from half the memory."""

import copy
from contextlib import contextmanager

import pytest
import torch
from conftest import assert_close, generate, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoModelForCausalLM

from arguments import ModelArguments
from runs.startup import load_generator
from self_speculation import (
    GenerationConfig,
    LoadingOptions,
    Request,
    load_model_and_tokenizer,
    make_strategy,
)
from self_speculation.model import linear, progress
from self_speculation.model.fused_layers import activation_dtype, bytes_made, fuse
from self_speculation.model.linear import Float16Linear, works
from self_speculation.model.model_runner import ModelRunner, forward

PROMPTS = [[5, 9, 4], [7], [3, 3, 8, 3, 3, 8, 3], [6, 4, 11, 30, 12], [9, 8, 7, 6, 5, 4, 3, 9, 8], [21, 22]]
DRAFTS = [
    {},
    {"exit_layer": 2},
    {"exit_layer": 2, "num_speculations": 3},
    {"exit_layer": 3, "num_speculations": 4, "prompt_lookup": 2, "draft_confidence": "auto"},
    {"exit_layer": 4, "num_speculations": 3, "draft_weights": "int4"},
    {"exit_layer": 2, "num_speculations": 3, "draft_vocabulary": 20},
]
pytestmark = pytest.mark.skipif(
    not works(Float16Linear, torch.device("cpu"), torch.float32), reason="torch without FBGEMM"
)


def pair(dtype, **config):
    """A W16A32 model, and one in float32 of the same weights, by the layers of transformers."""
    model = copy.deepcopy(tiny_llama(**config)).to(dtype)
    if dtype == torch.bfloat16:  # float16 has the same numbers
        for weight in model.parameters():
            weight.data = weight.data.half().to(dtype)
    exact = copy.deepcopy(model).float()
    assert fuse(model, fp32_activations=True) == 4
    return model, exact


@pytest.fixture(params=[torch.bfloat16, torch.float16])
def models(request):
    return pair(request.param)


def test_logits_are_those_of_float32(models):
    """Guards against an activation that is rounded to 16 bits on its way: logits are off by 1e-2 then."""
    model, exact = models
    ids = torch.tensor([PROMPTS[2]])
    with torch.inference_mode():
        mine = forward(ModelRunner(model, 7, 7), ids, 7).logits
        assert mine.dtype == torch.float32
        assert_close(mine, exact(ids).logits, roundings=200)


@settings(max_examples=20)
@given(
    which=st.sampled_from(range(2)),
    drafts=st.sampled_from(DRAFTS),
    prompt=st.sampled_from(PROMPTS),
    max_steps=st.integers(1, 24),
    batch_size=st.sampled_from([1, 3]),
)
def test_the_words_of_float32_whatever_drafts(which, drafts, prompt, max_steps, batch_size):
    """Guards against near-ties as wide as those of 16 bits: greedy outputs would differ by drafts."""
    model, exact = PAIRS[which]
    strategy = "self_speculative" if "num_speculations" in drafts else "autoregressive"
    config = GenerationConfig(sample=False, max_steps=max_steps, generation_strategy=strategy, **drafts)
    requests = [Request(each) for each in (prompt, *PROMPTS[: batch_size - 1])]
    results = dict(make_strategy(strategy).generate_batch(model, requests, config, batch_size))
    depth = {"exit_layer": 2} if drafts == {"exit_layer": 2} else {}
    for index, request in enumerate(requests):
        expected = generate(exact, request.ids, max_steps=max_steps, eos=[], **depth)
        assert results[index].predicted_tokens == expected.predicted_tokens


PAIRS = (
    [pair(torch.bfloat16), pair(torch.float16)]
    if works(Float16Linear, torch.device("cpu"), torch.float32)
    else []
)


def test_current_weights_decode(models, monkeypatch):
    """Guards against packed copies of earlier weights, and a second copy by another library's kernels."""
    monkeypatch.setattr(linear, "PackedLinear", None)
    model, _ = models
    generate(model, PROMPTS[0], max_steps=5)
    model.lm_head.weight.data[7] = 3.0
    exact = copy.deepcopy(model).float()
    ids = torch.tensor([PROMPTS[2]])
    with torch.inference_mode():
        assert_close(forward(ModelRunner(model, 7, 7), ids, 7).logits, exact(ids).logits, roundings=200)


def test_a_hook_has_it_compute_as_its_own_layers_do(models):
    """Guards against states in float32 that layers in 16 bits refuse, and a hook that is passed by."""
    model, _ = models
    assert activation_dtype(model) == torch.float32
    handle = model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: output * 2)
    assert activation_dtype(model) == model.dtype
    assert len(generate(model, PROMPTS[0], max_steps=5, eos=[]).predicted_tokens) == 5
    handle.remove()
    assert activation_dtype(model) == torch.float32


def test_parameters_stay_what_they_are(tmp_path):
    """Guards against weights that leave the file that they are mapped from, and so are in memory twice."""
    copy.deepcopy(tiny_llama()).to(torch.bfloat16).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    before = {name: (weight.data_ptr(), weight.clone()) for name, weight in model.state_dict().items()}
    fuse(model, fp32_activations=True)
    generate(model, PROMPTS[0], max_steps=5)
    for name, weight in model.state_dict().items():
        assert weight.data_ptr() == before[name][0]
        assert torch.equal(weight, before[name][1])
    products_of = [m.weight.nbytes for m in model.modules() if isinstance(m, nn.Linear)]
    assert bytes_made(model) == sum(products_of)


@pytest.mark.parametrize("size", [1, 100, 2**24])
def test_a_weight_is_packed_in_pieces(size, monkeypatch):
    """Guards against rows that are left out or come twice where a piece ends, and against a copy in float32
    of the whole of a large head.
    """
    monkeypatch.setattr(linear, "_PIECE", size)
    weights = [torch.randn(rows, 40, generator=torch.Generator().manual_seed(rows)) for rows in (3, 50, 7)]
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    made = linear.Float16Linear(*[weight.bfloat16() for weight in weights])
    exact = torch.cat(weights).bfloat16().half().float()
    assert_close(made(x), x @ exact.T)
    assert made.num_bytes == 2 * exact.numel()
    assert len(made.packed) == {1: 60, 100: 20, 2**24: 1}[size]


def test_progress_is_told(models):
    """Guards against minutes of silence while a large model is packed."""
    told = []

    @contextmanager
    def bar(what, num_bytes, _):
        told.append((what, num_bytes, done := []))
        yield done.append

    model = copy.deepcopy(models[0])
    with progress.shown_by(bar):
        fuse(model, fp32_activations=True)
        how = {"exit_layer": 4, "num_speculations": 2, "generation_strategy": "self_speculative"}
        make_strategy("self_speculative").prepare(model, GenerationConfig(**how, draft_weights="int4"))
    assert [what for what, *_ in told] == ["packing weights", "copies for drafts, int4"]
    assert all(sum(done) == num_bytes > 0 for _, num_bytes, done in told)


@pytest.mark.parametrize("value", [7e4, float("nan")])
def test_weights_that_float16_does_not_have(models, value):
    """Guards against a kernel that makes 65504 of them, unseen."""
    model, _ = models
    if model.dtype == torch.float16 and value == 7e4:
        value = float("inf")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = value
    with pytest.raises(ValueError, match="beyond 65504, or NaN"):
        generate(model, PROMPTS[0], max_steps=3)
    with pytest.raises(ValueError, match="beyond 65504, or NaN"):
        fuse(model, fp32_activations=True)
    assert activation_dtype(model) == model.dtype  # nobody asks for it any more


@pytest.fixture
def folder(byte_tokenizer, tmp_path):
    """Saves a model in 16 bits, with its tokenizer."""

    def save(dtype=torch.bfloat16, largest=1.0):
        model = copy.deepcopy(tiny_llama(vocab_size=len(byte_tokenizer)))
        model.model.layers[0].mlp.up_proj.weight.data[0, 0] = largest
        byte_tokenizer.save_pretrained(tmp_path)
        model.to(dtype).save_pretrained(tmp_path)
        return str(tmp_path)

    return save


@pytest.mark.parametrize(
    ("saved", "options", "weights", "activations"),
    [
        (torch.bfloat16, {}, torch.bfloat16, torch.float32),
        (torch.float16, {}, torch.float16, torch.float32),
        (torch.float32, {}, torch.float32, torch.float32),
        (torch.bfloat16, {"dtype": "bfloat16"}, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, {"dtype": "float32"}, torch.float32, torch.float32),
        (torch.bfloat16, {"fuse": False}, torch.float32, torch.float32),
        (torch.bfloat16, {"model_args": {"attn_implementation": "eager"}}, torch.float32, torch.float32),
    ],
)
def test_what_auto_means(folder, saved, options, weights, activations):
    """Guards against a format that nobody asked for."""
    path = folder(saved)
    if "model_args" in options:
        with pytest.warns(UserWarning, match="in float32, since"):
            model, _ = load_model_and_tokenizer(path, LoadingOptions(device="cpu", **options))
    else:
        model, _ = load_model_and_tokenizer(path, LoadingOptions(device="cpu", **options))
    assert (model.dtype, activation_dtype(model)) == (weights, activations)


def test_a_checkpoint_with_larger_weights_is_loaded_in_float32(folder):
    """Guards against an output that is silently another model's."""
    with pytest.warns(UserWarning, match="in float32, since weights beyond 65504"):
        model, _ = load_model_and_tokenizer(folder(largest=1e5), LoadingOptions(device="cpu"))
    assert model.dtype == activation_dtype(model) == torch.float32


def test_scripts_say_so_wherever_their_errors_go(folder, capsys):
    """Guards against a warning that is lost with the progress of loading."""
    load_generator(ModelArguments(model=folder(largest=1e5), device="cpu"), GenerationConfig())
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "65504" in line]
    assert line.startswith("warning: model ")


def test_a_draft_may_be_of_any_weights():
    """Guards against a model in float32 that is refused for what a copy for drafts alone cannot hold."""
    model = copy.deepcopy(tiny_llama(hidden_size=64))
    model.lm_head.weight.data[3, 3] = 1e5
    fuse(model)
    how = {"exit_layer": 4, "num_speculations": 3, "draft_weights": "int4", "max_steps": 12, "eos": []}
    expected = generate(model, PROMPTS[0], max_steps=12, eos=[]).predicted_tokens
    assert generate(model, PROMPTS[0], **how).predicted_tokens == expected
