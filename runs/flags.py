"""Flags of several groups that cannot work together. Does not import torch."""

import ctypes
import json
import re
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path

from arguments import GenerationConfig, ModelArguments, RunArguments, refuse
from data import DataArguments, DataError, Example, load_examples
from runs import ranks
from runs.failures import check_folder


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
    check_device(model_args.device)
    layers = num_layers(model_args)
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


def check_device(name: str) -> None:
    """End the program in one line if no device of this kind can be on this machine."""
    kind = name.partition(":")[0]
    why = "it is one of macOS" if kind == "mps" and sys.platform != "darwin" else ""
    found = find_spec("torch") if kind == "cuda" else None
    if found is not None and found.origin is not None:
        built = run_path(str(Path(found.origin).with_name("version.py")))  # importing torch takes seconds
        if built["cuda"] is None and built["hip"] is None:
            why = f"torch {built['__version__']} is built without CUDA"
        elif built["hip"] is None and sys.platform == "linux":
            try:
                ctypes.CDLL("libcuda.so.1")
            except OSError:
                why = f"torch {built['__version__']} needs a driver of NVIDIA, and there is none"
    if why:
        refuse(f"--device {name}: not on this machine, {why}; use auto or cpu")


def read_examples(model_args: ModelArguments, data_args: DataArguments, args: RunArguments) -> list[Example]:
    """The examples of a run, whose folder can be written; else end the program in one line."""
    check_folder(model_args.output_dir, args.resume)
    try:
        return load_examples(data_args, model_args.seed)
    except DataError as error:
        refuse(str(error))


def num_layers(model_args: ModelArguments) -> object:
    """The number of layers that the files of --model tell, if they do. Ends the program in one line if a
    .gguf file is damaged, or neither cache nor hub has the model.
    """
    path = Path(model_args.model_name).expanduser()
    if path.suffix.lower() == ".gguf":
        from self_speculation.loading.gguf_header import Header  # imports numpy

        try:
            values = Header(path).metadata
        except (OSError, ValueError) as error:
            refuse(f"--model {model_args.model!r}: {getattr(error, 'strerror', None) or error}")
        return values.get(f"{values['general.architecture']}.block_count")
    if model_args.model_args:  # they may name another revision
        return None
    from self_speculation.loading.sources import LoadingError, config_file  # takes a fifth of a second

    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        try:
            return json.loads(config_file(model_args.model_name).read_text("utf-8"))["num_hidden_layers"]
        except LoadingError as error:
            refuse(f"--{error}")
    return None
