"""Code around all layers changes a model's output and is refused by name; code in layers is followed."""

import copy
from types import MethodType, SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from conftest import EOS, generate, tiny_llama, transformers_generate
from torch import nn
from transformers import LlamaForCausalLM

from self_speculation import GenerationConfig, Request, make_strategy, self_speculative_generate
from self_speculation.model.fused_layers import fuse
from self_speculation.scheduler import Scheduler

PROMPT = [5, 9, 4, 7, 7, 3]
ADAPTIVE = {"custom_generate": self_speculative_generate, "generation_strategy": "adaptive"}
SPECULATION = {"custom_generate": self_speculative_generate, "exit_layer": 2, "num_speculations": 3}


@pytest.fixture(params=[False, True], ids=["plain", "fused"])
def model(request):
    model = copy.deepcopy(tiny_llama())
    if request.param:
        fuse(model)
    return model


def negated(_module, _inputs, output):
    output.logits = -output.logits


def shifted(_module, args, kwargs):
    """A hook that has the model read other tokens."""
    return args, {**kwargs, "input_ids": (kwargs["input_ids"] + 1) % 50}


def of_base(self, *args, **kwargs):
    output = type(self).forward(self, *args, **kwargs)
    output.last_hidden_state = -output.last_hidden_state
    return output


def of_model(self, *args, **kwargs):
    output = type(self).forward(self, *args, **kwargs)
    output.logits = -output.logits
    return output


def with_prompt(self, input_ids, **kwargs):
    """As peft tunes prompts: other ids for the model than those of the text."""
    return type(self).prepare_inputs_for_generation(self, (input_ids + 1) % 50, **kwargs)


class Negated(LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = -output.logits
        return output


class OfOtherPrompts(LlamaForCausalLM):
    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return super().prepare_inputs_for_generation((input_ids + 1) % 50, **kwargs)


class Negates(ModelHook):
    def post_forward(self, module, output):  # noqa: ARG002
        output.logits = -output.logits
        return output


def replace_forward(module, function):
    module.forward = MethodType(function, module)


REFUSED = {
    "forward": (lambda m: replace_forward(m, of_model), "LlamaForCausalLM has of_model of test_"),
    "forward of its base": (lambda m: replace_forward(m.model, of_base), "LlamaModel has of_base of test_"),
    "forward, then accelerate": (
        lambda m: (replace_forward(m, of_model), add_hook_to_module(m, AlignDevicesHook("cpu"))),
        "LlamaForCausalLM has of_model of test_overrides instead of its forward",
    ),
    "a hook of accelerate": (
        lambda m: add_hook_to_module(m, Negates()),
        "LlamaForCausalLM has Negates of test_overrides instead of its forward",
    ),
    "a hook of accelerate beside one that moves": (
        lambda m: (
            add_hook_to_module(m, AlignDevicesHook("cpu")),
            add_hook_to_module(m, Negates(), append=True),
        ),
        "LlamaForCausalLM has Negates of test_overrides instead of its forward",
    ),
    "prompt tuning": (
        lambda m: setattr(m, "prepare_inputs_for_generation", MethodType(with_prompt, m)),
        "its inputs are made by with_prompt of test_overrides, as for prompt tuning",
    ),
    "a subclass": (
        lambda m: setattr(m, "__class__", Negated),
        "has a forward of its own, Negated.forward of",
    ),
    "a subclass with other inputs": (
        lambda m: setattr(m, "__class__", OfOtherPrompts),
        "its inputs are made by OfOtherPrompts.prepare_inputs_for_generation of test_",
    ),
    "a hook": (
        lambda m: m.register_forward_hook(negated),
        "LlamaForCausalLM has the hook negated of test_over",
    ),
    "a hook before": (
        lambda m: m.register_forward_pre_hook(shifted, with_kwargs=True),
        "has the hook shifted of test_overrides, which would be passed over: layers are run one by one",
    ),
    "a hook on its base": (
        lambda m: m.model.register_forward_hook(negated),
        "LlamaModel has the hook negated",
    ),
}


@pytest.mark.parametrize("how", REFUSED)
def test_what_is_around_all_layers_is_refused(model, how):
    """Guards against another text than that of `generate`, without a word."""
    change, message = REFUSED[how]
    change(model)
    for options in (ADAPTIVE, SPECULATION):
        with pytest.raises(ValueError, match=message):
            model.generate(torch.tensor([PROMPT]), max_new_tokens=4, **options)
    for options in ({}, {"exit_layer": 2, "num_speculations": 3}, {"strategy": "adaptive"}):
        with pytest.raises(ValueError, match=message):
            generate(model, PROMPT, max_steps=4, **options)


def test_hooks_on_all_modules_are_refused(model):
    """Guards against layers with the hook, and a model without."""
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.raises(ValueError, match=r"all modules have the hook .*<lambda> of test_overrides"):
            generate(model, PROMPT, max_steps=4)
    finally:
        handle.remove()
    generate(model, PROMPT, max_steps=4)


def test_a_change_while_others_are_in_flight(model):
    """Guards against a batch that checks its model only when it begins. Sequences in flight go on."""
    scheduler = Scheduler(
        make_strategy("autoregressive"), model, GenerationConfig(sample=False, max_steps=4), 2
    )
    scheduler.add_request("before", Request(PROMPT))
    scheduler.step()
    handle = model.register_forward_hook(negated)
    scheduler.add_request("after", Request(PROMPT))
    handle.remove()
    results = {}
    while len(results) < 2:
        scheduler.step()
        results |= dict(scheduler.pop_finished())
    assert results["before"].predicted_tokens == generate(model, PROMPT, max_steps=4, eos=[]).predicted_tokens
    assert "has the hook negated" in str(results["after"])


def hooked_layer(model):
    model.model.layers[2].register_forward_hook(lambda _module, _inputs, output: -output)


def wrapped_layer(model):
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda hidden: 3 * type(mlp).forward(mlp, hidden)


def hooked_embedding_and_head(model):
    model.model.embed_tokens.register_forward_hook(lambda module, inputs, output: output * 2)
    model.lm_head.register_forward_hook(lambda module, inputs, output: -output)


def one_device(model):
    dispatch_model(model, {"": "cpu"}, force_hooks=True)


def two_devices(model):
    half = {f"model.layers.{index}": "cpu" for index in range(4)}
    rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    dispatch_model(model, {**half, **rest}, force_hooks=True)


def offloaded(model):
    cpu_offload(model.model.layers[2], torch.device("cpu"))


def hook_that_went(model):
    add_hook_to_module(model, AlignDevicesHook("cpu"))
    remove_hook_from_module(model)
    assert "forward" in vars(model)


def several_that_move(model):
    for _ in range(2):
        add_hook_to_module(model, AlignDevicesHook("cpu"), append=True)


def compiled_forward(model):
    """As the pages of transformers have it."""
    model.forward = torch.compile(model.forward, backend="eager")


class Same(LlamaForCausalLM):
    """With methods of its own, and the forward of its family."""


FOLLOWED = [hooked_layer, wrapped_layer, hooked_embedding_and_head, one_device, two_devices, offloaded]
FOLLOWED += [hook_that_went, several_that_move, compiled_forward, lambda m: setattr(m, "__class__", Same)]


@pytest.mark.parametrize("change", FOLLOWED)
def test_what_is_in_layers_or_changes_nothing_is_followed(model, change):
    """Guards against refusing models that accelerate has placed, and hooks that count here as there."""
    change(model)
    with torch.compiler.set_stance("force_eager"):  # what is compiled takes seconds
        expected = transformers_generate(model, PROMPT, 9)
    for options in ({}, {"exit_layer": 2, "num_speculations": 3}, {"strategy": "adaptive"}):
        assert generate(model, PROMPT, max_steps=9, eos=[EOS], **options).predicted_tokens == expected
    assert transformers_generate(model, PROMPT, 9, **ADAPTIVE) == expected


class PeftModelForCausalLM(nn.Module):
    """What a strategy sees of peft: a module around a model, with the attributes of that."""

    def __init__(self, model, kind, is_prompt_learning):
        super().__init__()
        self.base_model, self.config = model, model.config
        self.active_peft_config = SimpleNamespace(
            peft_type=SimpleNamespace(value=kind), is_prompt_learning=is_prompt_learning
        )


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (
            lambda model: PeftModelForCausalLM(model, "LORA", is_prompt_learning=False),
            r"a PeftModelForCausalLM: pass model.merge_and_unload\(\), or model.get_base_model\(\), which",
        ),
        (
            lambda model: PeftModelForCausalLM(model, "P_TUNING", is_prompt_learning=True),
            "a PeftModelForCausalLM: its P_TUNING adds to the prompt, which is not followed",
        ),
        (nn.Sequential, "must be one of transformers, not Sequential"),
    ],
)
def test_a_model_in_a_model_is_refused(model, wrap, message):
    """Guards against an AttributeError, or the text of the model without its prompt."""
    with pytest.raises(ValueError, match=message):
        generate(wrap(model), PROMPT, max_steps=4)
