"""Code of a caller that passes follow, and code that they refuse.

`ModelRunner` runs layers one by one and never calls the `forward` of the whole model, so code around all
layers is refused. Hooks on a layer, adapters in it and layers of other classes are followed: transformers
computes such a layer, on a CPU all layers of the model, and the layer has no copy.
"""

from collections.abc import Iterator
from typing import Any

from accelerate.hooks import AlignDevicesHook, CpuOffload
from torch import nn
from torch.nn.modules import module as torch_module
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import model_type_to_module_name

from self_speculation.weights.few_bits import FewBitsLinear

# Hooks of accelerate that only move inputs, outputs and weights between devices.
_MOVING = (AlignDevicesHook, CpuOffload)

# Modules of plain layers that no family defines.
_ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation")
_PLAIN = (nn.Linear, nn.LayerNorm, nn.Dropout, nn.ModuleList, FewBitsLinear)


def check_followed(model: PreTrainedModel) -> None:
    """Raises ValueError that names what is around the model's layers and changes the output."""
    if not isinstance(model, PreTrainedModel):
        kind = type(model).__name__
        if hasattr(model, "active_peft_config"):
            kind += (
                "; pass model.merge_and_unload(), or model.get_base_model(), which is slower;"
                " prompt tuning is not followed"
            )
        raise ValueError(f"model: must be one of transformers, not a {kind}")
    if cause := next(_around_layers(model), None):
        raise ValueError(f"model: {cause}, which would be passed over: layers are run one by one")


def replaced_forward(module: nn.Module, name: str = "forward") -> Any:
    """The function that replaces a module's `forward`; None: the class's, compiled or not."""
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
    for hook in (
        *torch_module._global_forward_pre_hooks.values(),
        *torch_module._global_forward_hooks.values(),
    ):
        yield f"all modules have the hook {_name(hook)}"
    if not _is_transformers_own(prepares := model.prepare_inputs_for_generation):
        yield f"its inputs are made by {_name(prepares)}, as for prompt tuning"


def _replacement(module: nn.Module) -> object:
    """The replacement of `forward`, apart from hooks of accelerate that only move tensors; None: none."""
    replacement = replaced_forward(module)
    if getattr(getattr(replacement, "func", None), "__module__", "") != "accelerate.hooks":
        return replacement
    hook: Any = vars(module)["_hf_hook"]
    changing = [each for each in getattr(hook, "hooks", (hook,)) if type(each) not in _MOVING]
    return changing[0] if changing else replaced_forward(module, "_old_forward")


def _is_transformers_own(function: object) -> bool:
    return (getattr(function, "__module__", None) or "").startswith("transformers.")


def _name(function: object) -> str:
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__qualname__} of {named.__module__}"


def why_not_plain(model: PreTrainedModel, *roots: nn.Module) -> str | None:
    """The first reason why modules are not plain, so that only transformers can compute them; None: they are.

    Plain modules are of the model's family, without hooks, and have weights of one dtype on one device.
    """
    family = f"transformers.models.{model_type_to_module_name(model.config.model_type)}."
    named = [pair for root in roots for pair in root.named_modules()]
    for name, module in named:
        kind = type(module)
        if kind not in _PLAIN and not kind.__module__.startswith((family, *_ACTIVATIONS)):
            return f"{name or 'it'} is a {kind.__name__} of {kind.__module__.partition('.')[0]}"
        if module._forward_hooks or module._forward_pre_hooks or replaced_forward(module):
            return f"{name or 'it'} has a hook or another forward"
    weights = [weight for root in roots for weight in root.parameters()]
    in_few_bits = [module.weight for _, module in named if type(module) is FewBitsLinear]
    for weight in weights:
        if type(weight) is not nn.Parameter or not weight.is_floating_point():
            return f"its weights are in fewer bits or in parts ({type(weight).__name__}, {weight.dtype})"
    device, *more = {weight.device for weight in (*weights, *in_few_bits)}
    if more or device.type == "meta" or len({weight.dtype for weight in weights}) > 1:
        return "its weights differ in dtype or device, or are offloaded"
    return None
