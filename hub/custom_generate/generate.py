"""`model.generate(..., custom_generate=REPOSITORY, trust_remote_code=True)` of transformers calls this."""

from importlib import import_module
from typing import Any

from transformers import GenerationMixin


def generate(*inputs: Any, model: GenerationMixin, **kwargs: Any) -> Any:
    """`model.generate` with drafts. Arguments and errors are those of `self_speculative_generate`."""
    # By name: transformers advises `pip install` for a missing package of an import statement, but the
    # package index does not have this one. Without one, it compares with requirements.txt.
    speculate = import_module("self_speculation").self_speculative_generate
    # Of the class: `model.generate` is this function if the model's repository has this file.
    return GenerationMixin.generate(model, *inputs, custom_generate=speculate, **kwargs)
