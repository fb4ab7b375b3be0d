"""Refuses models with replaced or wrapped code that `ModelRunner` would not call.

`ModelRunner` runs layers one by one and never calls the `forward` of the whole model. It follows hooks on
layers, adapters in them and layers of other classes, but nothing around all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module
from transformers import PreTrainedModel

# Hooks of accelerate that only move inputs, outputs and weights between devices.
_MOVING = ("AlignDevicesHook", "CpuOffload")


def check_followed(model: Any) -> None:
    """Raises ValueError that names what is around the model's layers and changes its output."""
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model: must be one of transformers, not {_wrapper(model)}")
    for cause in _around_layers(model):
        raise ValueError(f"model: {cause}, which would be passed over: layers are run one by one")


def replaced_forward(module: nn.Module) -> Callable | None:
    """The function that replaces a module's `forward`; None: it has that of its class, compiled or not."""
    forward: Any = vars(module).get("forward")
    forward = getattr(forward, "_torchdynamo_orig_callable", forward)
    return None if forward is None or _is_own(forward, module) else forward


def _is_own(function: Any, module: nn.Module) -> bool:
    """Whether it is a method of this module, as its class has it."""
    name = getattr(function, "__name__", "")
    is_of_class = getattr(function, "__func__", None) is getattr(type(module), name, None)
    return is_of_class and getattr(function, "__self__", None) is module


def _wrapper(model: Any) -> str:
    """The class of a model that is none of transformers, and advice."""
    kind = type(model).__name__
    active = getattr(model, "active_peft_config", None)  # of a PeftModel
    if active is None:
        return kind
    if active.is_prompt_learning:
        return f"a {kind}: its {active.peft_type.value} adds to the prompt, which is not followed"
    return f"a {kind}: pass model.merge_and_unload(), or model.get_base_model(), which is slower"


def _around_layers(model: PreTrainedModel) -> Iterator[str]:
    """Code that changes the inputs or outputs of all layers together."""
    for part in (model, model.base_model):
        kind = type(part)
        for hook in (*part._forward_pre_hooks.values(), *part._forward_hooks.values()):
            yield f"{kind.__name__} has the hook {_name(hook)}"
        for replacement in _replacements(part):
            yield f"{kind.__name__} has {_name(replacement)} instead of its forward"
        if not _is_of_transformers(kind.forward):
            yield f"{kind.__name__} has a forward of its own, {_name(kind.forward)}"
    for hooks in (torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks):
        for hook in hooks.values():
            yield f"all modules have the hook {_name(hook)}"
    if not _is_of_transformers(prepares := model.prepare_inputs_for_generation):
        yield f"its inputs are made by {_name(prepares)}, as for prompt tuning"


def _replacements(module: nn.Module) -> Iterator[Any]:
    """The function that replaces `forward`, or accelerate's hooks around it that do not only move tensors."""
    forward: Any = replaced_forward(module)
    if getattr(getattr(forward, "func", None), "__module__", "") == "accelerate.hooks":
        hook: Any = vars(module)["_hf_hook"]
        for each in getattr(hook, "hooks", (hook,)):
            if not (type(each).__module__ == "accelerate.hooks" and type(each).__name__ in _MOVING):
                yield each
        forward = vars(module)["_old_forward"]
    if forward is not None and not _is_own(forward, module):
        yield forward


def _is_of_transformers(function: Any) -> bool:
    return (getattr(function, "__module__", None) or "").startswith("transformers.")


def _name(function: Any) -> str:
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__qualname__} of {named.__module__}"
