"""W16A32: a CPU multiplies weights in 16 bits by float32 activations. The output is that of float32."""

import copy
import functools
from contextlib import contextmanager

import pytest
import torch
from conftest import (
    COPY,
    WAYS,
    assert_close,
    config_of,
    generate,
    in_batch,
    needs_operators,
    own_llama,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from test_llama_model_utils import family

from arguments import ModelArguments
from runs.startup import load_generator
from self_speculation import (
    GenerationConfig,
    LoadingOptions,
    Request,
    load_model_and_tokenizer,
    make_strategy,
)
from self_speculation.model import progress
from self_speculation.model.fused_layers import activation_dtype, fuse
from self_speculation.model.model_runner import ModelRunner, forward

PROMPTS = [[5, 9, 4], [7], [3, 3, 8, 3, 3, 8, 3], [6, 4, 11, 30, 12], [9, 8, 7, 6, 5, 4, 3, 9, 8], [21, 22]]
ALL_WAYS = {**WAYS, "early exit": {"exit_layer": 2}}
pytestmark = needs_operators


def pair(dtype):
    """A W16A32 model, and one in float32 of the same weights, by transformers' layers."""
    model = own_llama().half().to(dtype)
    exact = copy.deepcopy(model).float()
    assert fuse(model) == 4
    return model, exact


@pytest.fixture(params=[torch.bfloat16, torch.float16])
def models(request):
    return pair(request.param)


def assert_logits(model, exact):
    ids = torch.tensor([PROMPTS[2]])
    with torch.inference_mode():
        mine = forward(runner := ModelRunner(model), runner.new_cache(7, 7), ids, 7).logits
        assert mine.dtype == torch.float32
        assert_close(mine, exact(ids).logits, roundings=200)


def test_logits_are_those_of_current_weights_in_float32(models):
    """Guards against activations that are rounded to 16 bits (logits are off by 1e-2), and against anything
    that is made of earlier weights.
    """
    model, exact = models
    assert_logits(model, exact)
    generate(model, PROMPTS[0], max_steps=5)
    model.lm_head.weight.data[7] = 3.0
    assert_logits(model, copy.deepcopy(model).float())


def test_scaled_embeddings_are_not_rounded():
    """Guards against embeddings that are scaled in 16 bits, by a scale in 16 bits."""
    model = family("gemma3_text").half()
    exact = copy.deepcopy(model).float()
    embed = exact.model.embed_tokens
    embed.embed_scale.fill_(embed.scalar_embed_scale)
    assert fuse(model) == 4
    assert_logits(model, exact)


shared_pair = functools.cache(pair)


@settings(max_examples=20)
@given(
    dtype=st.sampled_from([torch.bfloat16, torch.float16]),
    way=st.sampled_from(sorted(ALL_WAYS)),
    prompt=st.sampled_from(PROMPTS),
    max_steps=st.integers(1, 24),
    batch_size=st.sampled_from([1, 3]),
)
def test_the_output_is_that_of_float32_with_any_drafts(dtype, way, prompt, max_steps, batch_size):
    """Guards against near-ties as wide as those of 16 bits: drafts would change greedy outputs."""
    model, exact = shared_pair(dtype)
    requests = [Request(each) for each in (prompt, *PROMPTS[: batch_size - 1])]
    depth = ALL_WAYS[way] if way == "early exit" else {}
    found = in_batch(model, requests, batch_size, max_steps=max_steps, **ALL_WAYS[way])
    expected = in_batch(exact, requests, 1, max_steps=max_steps, **depth)
    for index in range(batch_size):
        assert found[index].predicted_tokens == expected[index].predicted_tokens


def test_a_hooked_model_computes_in_16_bits(models):
    """Guards against layers in 16 bits that get states in float32, and against a hook that is ignored."""
    model, _ = models
    assert activation_dtype(model) == torch.float32
    handle = model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: output * 2)
    assert activation_dtype(model) == model.dtype
    assert len(generate(model, PROMPTS[0], max_steps=5, eos=[]).predicted_tokens) == 5
    handle.remove()
    assert activation_dtype(model) == torch.float32


def test_progress_is_shown(models):
    """Guards against minutes of silence while a large model is copied."""
    shown = []

    @contextmanager
    def bar(title, num_bytes, _):
        shown.append((title, num_bytes, done := []))
        yield done.append

    with progress.shown_by(bar):
        fuse(models[0])
        make_strategy("self_speculative").prepare(models[0], config_of(**COPY))
    assert [title for title, *_ in shown] == ["copies for drafts, int4"]
    assert all(sum(done) == num_bytes > 0 for _, num_bytes, done in shown)


@pytest.fixture
def folder(byte_tokenizer, tmp_path):
    """Saves a model and its tokenizer."""

    def save(dtype=torch.bfloat16):
        model = own_llama(vocab_size=len(byte_tokenizer))
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
        (torch.bfloat16, {"dtype": "bfloat16"}, torch.bfloat16, torch.float32),
        (torch.float32, {"dtype": "bfloat16"}, torch.bfloat16, torch.float32),
        (torch.bfloat16, {"dtype": "float32"}, torch.float32, torch.float32),
        (torch.bfloat16, {"fuse": False}, torch.float32, torch.float32),
    ],
)
def test_auto_keeps_16_bits_of_the_checkpoint(folder, saved, options, weights, activations):
    """Guards against a format that was not asked for."""
    model, _ = load_model_and_tokenizer(folder(saved), LoadingOptions(device="cpu", **options))
    assert (model.dtype, activation_dtype(model)) == (weights, activations)


def test_a_checkpoint_that_cannot_be_w16a32_is_loaded_in_float32(folder, capsys):
    """Guards against the output of another model, and against a change of format without a warning, such as
    one that vanishes together with the progress of loading.
    """
    arguments = ModelArguments(model=folder(), device="cpu", model_args="attn_implementation=eager")
    model = load_generator(arguments, GenerationConfig()).model
    assert model.dtype == activation_dtype(model) == torch.float32
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "in float32" in line]
    assert line.startswith("warning: model ")
    assert "since a layer is not one that our operators have" in line
