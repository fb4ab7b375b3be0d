"""Flags of several groups that cannot work together. Does not import torch."""

import json
import re
from contextlib import suppress
from pathlib import Path

from arguments import GenerationConfig, ModelArguments, refuse
from runs import ranks


def validate(model_args: ModelArguments, config: GenerationConfig) -> None:
    """End the program in one line if the flags do not fit each other or the model's files."""
    is_split = model_args.device == "split"
    if is_split and ranks.num_processes() > 1:
        refuse("--device split: is one process; start it without torchrun")
    for name, is_so in (("quantization", model_args.quantization != "none"), ("device", is_split)):
        if is_so and config.draft_weights != "exact":
            refuse(f"--draft_weights {config.draft_weights}: not with --{name} {getattr(model_args, name)}")
    for word in config.stop_words or []:  # several in one value never match
        if re.search(r"[^\W\d],[^\W\d]", word) or re.fullmatch(r"""\[\s*(["']).*\1\s*\]""", word, re.DOTALL):
            several = " ".join(re.findall(r"\w+", word))
            refuse(f"--stop_words {word!r}: several stand one after the other, as in {several}")
    folder = Path(model_args.model_name).expanduser()
    layers = None
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        layers = json.loads((folder / "config.json").read_text("utf-8"))["num_hidden_layers"]
    try:
        config.check_drafts()
        if isinstance(layers, int) and not model_args.model_args:
            config.check_depth(layers)
    except ValueError as error:
        is_missing = str(error).startswith(("exit_layer:", "num_speculations:"))
        refuse(f"--{error}{'; sweep.py finds exit layer and length' if is_missing else ''}")
    for idle in config.idle_fields():
        add = f"add --generation_strategy {idle.metadata['used_by'][0]}"
        refuse(f"--{idle.name} {getattr(config, idle.name)}: autoregressive decoding drafts nothing, {add}")
