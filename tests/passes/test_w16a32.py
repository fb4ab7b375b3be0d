"""W16A32: a CPU multiplies weights in 16 bits by float32 activations. The output is that of float32."""

from contextlib import contextmanager

import pytest
import torch
from conftest import (
    COPY,
    PROMPT,
    config_of,
    generate,
    needs_operators,
    own_llama,
)

from arguments import ModelArguments
from runs.startup import load_generator
from self_speculation import (
    GenerationConfig,
    LoadingOptions,
    load_model_and_tokenizer,
    make_strategy,
    progress,
)
from self_speculation.passes.runners import activation_dtype, fuse

pytestmark = needs_operators


@pytest.fixture(params=[torch.bfloat16, torch.float16])
def model(request):
    """A W16A32 model."""
    model = own_llama().half().to(request.param)
    assert fuse(model) == 4
    return model


def test_a_hooked_model_computes_in_16_bits(model):
    """Guards against layers in 16 bits that get states in float32, and against a hook that is ignored."""
    assert activation_dtype(model) == torch.float32
    handle = model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: output * 2)
    assert fuse(model) == 0
    assert activation_dtype(model) == model.dtype
    assert len(generate(model, PROMPT, max_steps=5, eos=[]).predicted_tokens) == 5
    handle.remove()
    fuse(model)
    assert activation_dtype(model) == torch.float32


def test_progress_is_shown(model):
    """Guards against minutes of silence while a large model is copied."""
    shown = []

    @contextmanager
    def bar(title, num_bytes, _):
        shown.append((title, num_bytes, done := []))
        yield done.append

    with progress.shown_by(bar):
        make_strategy("self_speculative").prepare(model, config_of(**COPY))
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
        (torch.float32, {"model_args": {"dtype": "float16"}}, torch.float16, torch.float32),
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
