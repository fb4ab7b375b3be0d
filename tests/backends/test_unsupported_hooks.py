"""Code around all layers changes a model's output and is refused by name; code in layers is followed."""

from functools import partial
from types import MethodType

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from conftest import (
    EOS,
    LAYERS,
    PROMPT,
    generate,
    needs_operators,
    own_llama,
    transformers_generate,
)
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from self_speculation import fuse, self_speculative_generate
from self_speculation.backends.card_runner import FusedLayer, FusedRunner
from self_speculation.backends.runners import activation_dtype
from self_speculation.backends.unsupported_hooks import why_not_plain

ADAPTIVE = {"custom_generate": self_speculative_generate, "generation_strategy": "adaptive"}


def other(*_args, **_kwargs):
    pytest.fail("it was called")


def with_own(model, **functions):
    model.__class__ = type("Own", (LlamaForCausalLM,), functions)


def with_hooks(model, *hooks):
    for hook in hooks:
        add_hook_to_module(model, hook, append=True)


def replaced_and_hooked(model):
    model.forward = MethodType(other, model)
    with_hooks(model, AlignDevicesHook("cpu"))


class OtherHook(ModelHook):
    pre_forward = other


OTHER = "other of test_unsupported_hooks"
REFUSED = [
    (
        lambda m: with_hooks(m, AlignDevicesHook("cpu"), OtherHook()),
        "LlamaForCausalLM has OtherHook of test_",
    ),
    (lambda m: setattr(m.model, "forward", MethodType(other, m.model)), f"LlamaModel has {OTHER} instead of"),
    (replaced_and_hooked, f"LlamaForCausalLM has {OTHER} instead of its forward"),
    (lambda m: with_own(m, forward=other), f"Own has a forward of its own, {OTHER}"),
    (lambda m: with_own(m, prepare_inputs_for_generation=other), f"its inputs are made by {OTHER}"),
    (lambda m: m.model.register_forward_hook(other), f"LlamaModel has the hook {OTHER}"),
    (lambda m: m.register_forward_pre_hook(other, with_kwargs=True), f"hook {OTHER}, which would be passed"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_code_around_all_layers_is_refused(change, message):
    """Guards against an output that silently differs from that of `generate`."""
    model = own_llama()
    change(model)
    with pytest.raises(ValueError, match=message):
        model.generate(torch.tensor([PROMPT]), max_new_tokens=4, **ADAPTIVE)
    for decodes in (partial(generate, prompt=PROMPT, max_steps=4), fuse):
        with pytest.raises(ValueError, match=message):
            decodes(model)


def test_hooks_on_all_modules_are_refused():
    """Guards against a hook that runs for layers but not for the model."""
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(
            ValueError, match=r"all modules have the hook .*<lambda> of test_unsupported_hooks"
        ):
            generate(own_llama(), PROMPT, max_steps=4)
    finally:
        handle.remove()


class Adapter(nn.Linear):
    """Another class in the place of a Linear, such as an adapter or a quantised layer."""

    def forward(self, x):
        return super().forward(x) + 1


class DoublingNorm(LlamaRMSNorm):
    """A norm of another family, with the same attributes."""

    __module__ = "transformers.models.gemma.modeling_gemma"

    def forward(self, hidden):
        return 2 * super().forward(hidden)


def hooked_embedding_and_head(model):
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: output * 2)
    model.lm_head.register_forward_hook(lambda module, inputs, output: -output)


def two_devices(model):
    parts = [*(f"model.layers.{i}" for i in range(4)), "model.embed_tokens", "model.norm", "model.rotary_emb"]
    dispatch_model(model, dict.fromkeys([*parts, "lm_head"], "cpu"), force_hooks=True)


def removed_hook(model):
    with_hooks(model, AlignDevicesHook("cpu"))
    remove_hook_from_module(model)
    assert "forward" in vars(model)


FOLLOWED = {
    "hook before a layer": lambda m: m.model.layers[2].mlp.register_forward_pre_hook(lambda _, x: (-x[0],)),
    "adapter": lambda m: setattr(m.model.layers[1].mlp.down_proj, "__class__", Adapter),
    "another norm": lambda m: setattr(m.model.layers[1].input_layernorm, "__class__", DoublingNorm),
    "hooked embedding and head": hooked_embedding_and_head,
    "two devices": two_devices,
    "removed hook": removed_hook,
    "two hooks that move": lambda m: with_hooks(m, AlignDevicesHook("cpu"), AlignDevicesHook("cpu")),
    "compiled": lambda m: setattr(m, "forward", torch.compile(m.forward, backend="eager")),
    "subclass": with_own,
    "activation of no operator": lambda m: setattr(m.model.layers[1].mlp, "act_fn", nn.Mish()),
    "activation with weights": lambda m: setattr(m.model.layers[1].mlp, "act_fn", nn.PReLU()),
}


@pytest.mark.parametrize("change", FOLLOWED)
@pytest.mark.parametrize("fused", [False, True])
def test_code_in_layers_is_followed(change, fused):
    """Guards against a layer's hook, adapter or norm that is ignored, against refusing a model that
    accelerate placed, and against all layers of transformers since one of them is.
    """
    model = own_llama()
    FOLLOWED[change](model)
    if fused:
        fuse(model)
        are_plain = [why_not_plain(model, layer) is None for layer in model.model.layers]
        assert [isinstance(layer, FusedLayer) for layer in FusedRunner(model).layers] == are_plain
    with torch.compiler.set_stance("force_eager"):  # compiling takes seconds
        expected = transformers_generate(model, PROMPT, 9)
    for options in ({}, LAYERS, {"generation_strategy": "adaptive"}):
        assert generate(model, PROMPT, max_steps=9, eos=[EOS], **options).predicted_tokens == expected
    assert transformers_generate(model, PROMPT, 9, **ADAPTIVE) == expected


@needs_operators
def test_a_hooked_model_computes_in_16_bits():
    """Guards against layers in 16 bits that get states in float32, and against a hook that is ignored."""
    model = own_llama().bfloat16()
    assert (fuse(model), activation_dtype(model)) == (4, torch.float32)
    handle = model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: output * 2)
    assert (fuse(model), activation_dtype(model)) == (0, torch.bfloat16)
    assert len(generate(model, PROMPT, max_steps=5, eos=[]).predicted_tokens) == 5
    handle.remove()
    assert (fuse(model), activation_dtype(model)) == (4, torch.float32)
