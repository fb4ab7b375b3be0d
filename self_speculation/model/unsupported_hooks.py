"""Refuses models with replaced or wrapped code that `ModelRunner` would not call.

`ModelRunner` runs layers one by one and never calls the `forward` of the whole model. It follows hooks on
layers, adapters in them and layers of other classes, but nothing around all layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from accelerate.hooks import AlignDevicesHook, CpuOffload
from torch import nn
from torch.nn.modules import module as torch_module
from transformers import PreTrainedModel

# Hooks of accelerate that only move inputs, outputs and weights between devices.
_MOVING = (AlignDevicesHook, CpuOffload)


def check_followed(model: Any) -> None:
    """Raises ValueError that names what is around the model's layers and changes its output."""
    if not isinstance(model, PreTrainedModel):
        kind = type(model).__name__
        if hasattr(model, "active_peft_config"):
            kind += (
                "; pass model.merge_and_unload(), or model.get_base_model(), which is slower;"
                " prompt tuning is not followed"
            )
        raise ValueError(f"model: must be one of transformers, not a {kind}")
    for cause in _around_layers(model):
        raise ValueError(f"model: {cause}, which would be passed over: layers are run one by one")


def replaced_forward(module: nn.Module, name: str = "forward") -> Any:
    """The function that replaces a module's `forward`; None: it has that of its class, compiled or not."""
    forward: Any = vars(module).get(name)
    forward = getattr(forward, "_torchdynamo_orig_callable", forward)
    is_own = getattr(forward, "__func__", None) is type(module).forward
    return None if is_own and forward.__self__ is module else forward


def _around_layers(model: PreTrainedModel) -> Iterator[str]:
    """Code that changes the inputs or outputs of all layers together."""
    for part in (model, model.base_model):
        kind = type(part)
        for hook in (*part._forward_pre_hooks.values(), *part._forward_hooks.values()):
            yield f"{kind.__name__} has the hook {_name(hook)}"
        if (replacement := _replacement(part)) is not None:
            yield f"{kind.__name__} has {_name(replacement)} instead of its forward"
        if not _is_transformers_own(kind.forward):
            yield f"{kind.__name__} has a forward of its own, {_name(kind.forward)}"
    for hooks in (torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks):
        for hook in hooks.values():
            yield f"all modules have the hook {_name(hook)}"
    if not _is_transformers_own(prepares := model.prepare_inputs_for_generation):
        yield f"its inputs are made by {_name(prepares)}, as for prompt tuning"


def _replacement(module: nn.Module) -> Any:
    """What replaces `forward`, apart from hooks of accelerate that only move tensors; None: nothing."""
    replacement = replaced_forward(module)
    if getattr(getattr(replacement, "func", None), "__module__", "") != "accelerate.hooks":
        return replacement
    hook: Any = vars(module)["_hf_hook"]
    others = [each for each in getattr(hook, "hooks", (hook,)) if type(each) not in _MOVING]
    return others[0] if others else replaced_forward(module, "_old_forward")


def _is_transformers_own(function: Any) -> bool:
    return (getattr(function, "__module__", None) or "").startswith("transformers.")


def _name(function: Any) -> str:
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__qualname__} of {named.__module__}"
