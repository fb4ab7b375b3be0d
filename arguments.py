"""The command line of every script: one dataclass per concern, one parser.

Imports nothing heavy, so a script answers a mistyped flag at once.
"""

import argparse
import ast
import difflib
import json
import re
import shlex
import sys
from argparse import SUPPRESS
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

import self_speculation
from self_speculation.config import GenerationConfig as GenerationConfig  # scripts import it from here
from self_speculation.config import (
    LoadingOptions,
    check,
    check_template_kwargs,
    check_types,
    default_model,
    field_texts,
    field_types,
    why_no_model,
)

JSONObject = dict[str, Any]  # also arguments by name

# Flags of `--help`; `--help all` has all.
_FIRST = """
    model dtype device quantization output_dir max_steps generation_strategy exit_layer num_speculations
    sample temperature top_p stop_words draft_weights prompt chat streamer compare grammar batch_size host
    port api_key dataset data_path num_samples n_shot resume reference tasks num_fewshot limit include_path
    output_path url ways clients picking no_drafts
    exit_layer_first exit_layer_last num_speculations_first num_speculations_last num_steps
    learning_rate sequence_length early_exit_scale layer_dropout lora_rank gradient_accumulation
"""

# Fields of LoadingOptions that are no flags: --model_args has the first, and only programs need the second.
_NO_FLAGS = ("trust_remote_code", "fuse")

# Fields of GenerationConfig that are flags of few scripts.
SELDOM = ("min_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "reuse_cache")

_VARIABLE = "SELF_SPECULATION_"  # begins the name of a variable for a flag
_OTHER_VARIABLES = ("SELF_SPECULATION_CACHE",)

_TRUTHS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}

# Flags of llama.cpp, transformers and vLLM: what does the same here, or why nothing has to.
_FOREIGN = {
    "n n_predict predict max_tokens max_new_tokens max_gen_toks max_length": "--max_steps",
    "c ctx_size n_ctx max_model_len": "the context is the model's own, and memory grows with the text",
    "ngl n_gpu_layers gpu_layers device_map": "--device: auto, or split",
    "m model_path model_name_or_path": "--model",
    "hf hf_repo": "hf download REPOSITORY FILE.gguf --local-dir . fetches it for --model FILE.gguf",
    "p": "--prompt",
    "f file": "a pipe, as in generate.py < FILE",
    "t threads_batch": "--threads",
    "s": "--seed",
    "temp": "--temperature",
    "do_sample": "--sample",
    "repeat_penalty": "--repetition_penalty",
    "r reverse_prompt stop": "--stop_words",
    "cnv conversation interactive i": "--chat True",
    "sys system_prompt": "--chat True, and /system TEXT in the conversation",
    "grammar_file json_schema j json_schema_file guided_json": "--grammar",
    "md model_draft draft_model": "--draft_weights int4: the model drafts for itself",
    "draft draft_n draft_max num_speculative_tokens": "--num_speculations",
    "np parallel max_num_seqs": "--batch_size",
    "tensor_parallel_size tp pipeline_parallel_size pp ts tensor_split sm split_mode": "--device split: some "
    "layers on each GPU",
    "a alias served_model_name": "--served_name",
    "torch_dtype": "--dtype",
    "trust_remote_code": "--model_args trust_remote_code=True",
    "load_in_4bit load_in_8bit": "--quantization",
    "ctk ctv cache_type_k cache_type_v kv_cache_dtype": "--cache_dtype",
    "fa flash_attn b ub ubatch_size mlock no_mmap": "nothing has to be set for that",
    "fuse": "only in Python, by LoadingOptions(fuse=False)",
    "min_p repeat_penalty repetition_penalty frequency_penalty presence_penalty": "requests and "
    "GenerationConfig have it",
}


@dataclass(frozen=True)
class ModelArguments(LoadingOptions):
    """Which model to load, how, and onto which device."""

    model: str | None = None
    """Hub id, folder or .gguf file; without it, the bundled model (train.py: a new one)."""
    model_args: str | None = None  # type: ignore[assignment]  # `loading_options` has the parsed ones
    """JSON or k=v,k=v passed to from_pretrained; v may be a dictionary. trust_remote_code=True executes code
    from the model's repository: trust it as you trust its author."""
    output_dir: str = "./logs"
    """Folder for records; generate.py writes none."""
    threads: int | None = None
    """Threads of a CPU; without it, one for each core, and fewer while other programs use the cores."""

    def __post_init__(self) -> None:
        check(self, "seed", 0 <= self.seed < 2**32, f"must be between 0 and {2**32 - 1}")
        at_least(self, 1, "threads")
        check(self, "model", self.model != "", "must be a hub id, a folder or a .gguf file")
        is_adapter = (Path(self.model or "").expanduser() / "adapter_config.json").is_file()
        if self.model and not is_adapter and (why := why_no_model(self.model)):
            raise ValueError(f"model {self.model!r}: {why}")
        self.loading_options()
        exact = self.quantization == "none" and self.device != "split"
        check(self, "compile", exact or not self.compile, "not with --quantization or --device split")

    @property
    def model_name(self) -> str:
        """--model, or the bundled model."""
        return default_model() if self.model is None else self.model

    def from_pretrained_args(self) -> JSONObject:
        """Parse `model_args`."""
        return key_values(self, "model_args")

    def loading_options(self, **changes: object) -> LoadingOptions:
        """The library's options, with `changes` by field."""
        options = {each.name: getattr(self, each.name) for each in fields(LoadingOptions)}
        found = self.from_pretrained_args()
        options["trust_remote_code"] = found.pop("trust_remote_code", False) is True
        return LoadingOptions(**{**options, "model_args": found, **changes})


def key_values(group: object, name: str) -> JSONObject:
    """Parse a flag of JSON or of k=v,k=v: Python literals, also true, false and none in any case, or else
    text.
    """
    text = getattr(group, name) or ""
    allowed = "must be a JSON object or k=v,k=v"
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name} {text!r}: {allowed}") from error
    found = JSONObject()
    # A comma that an item of a list or dictionary follows is part of a value.
    for pair in filter(str.strip, re.split(r",(?=[^\])}'\"]*=|[^\])}]*$)", text)):
        key, equals, value = map(str.strip, pair.partition("="))
        check(group, name, key.isidentifier() and bool(equals), allowed)
        is_word = value.lower() in ("true", "false", "none")
        try:
            found[key] = ast.literal_eval(value.capitalize() if is_word else value)
        except (ValueError, SyntaxError):
            found[key] = value
    return found


@dataclass(frozen=True)
class TemplateArguments:
    """Base of groups with a chat template."""

    chat_template_kwargs: str | None = None
    """Variables of the chat template, as JSON or k=v,k=v, such as enable_thinking=false. The template ignores
    unknown ones."""

    def __post_init__(self) -> None:
        name = "chat_template_kwargs"
        kwargs = self.template_kwargs
        try:
            check_template_kwargs(kwargs)
        except ValueError as error:
            check(self, name, False, str(error))
        check(self, name, not kwargs or getattr(self, "chat", True), "needs --chat True")

    @property
    def template_kwargs(self) -> JSONObject:
        """Parse `chat_template_kwargs`."""
        return key_values(self, "chat_template_kwargs")


@dataclass(frozen=True)
class BatchArguments:
    """How many sequences at once."""

    batch_size: int = 1
    """Sequences decoded at a time; each comes out as it would alone."""

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_size")


@dataclass(frozen=True)
class RunArguments(BatchArguments):
    """How to work through examples."""

    resume: str | None = None
    """Folder of an interrupted run to continue."""


def parse(
    description: str,
    *groups: type,
    args: Sequence[str] | None = None,
    without: Collection[str] = (),
    environment: Mapping[str, str] | None = None,
) -> tuple[Any, ...]:
    """Parse one instance of each dataclass in `groups` from the command line.

    Fields named in `without` are no flags. With --resume FOLDER, the arguments of that run are the defaults;
    with an `environment`, variables such as SELF_SPECULATION_PORT are.
    Bad usage ends the program with status 2 and one line that names the flag, the value and what is allowed.
    """
    names = {field.name for group in groups for field in fields(group)} - {*without, *_NO_FLAGS}
    args = sys.argv[1:] if args is None else [*args]
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--FLAG VALUE ...]", description=description.strip(), add_help=False,
        allow_abbrev=False, exit_on_error=False, argument_default=SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    wants_help = next((at for at, arg in enumerate(args) if arg in ("-h", "--help")), None)
    shows_all = wants_help is None or args[wants_help + 1 : wants_help + 2] == ["all"]
    for group in groups:
        _add_flags(parser, group, names, shows_all)
    version = f"%(prog)s {self_speculation.__version__}"
    parser.add_argument("--version", action="version", version=version, help="Print the version.")
    flags = parser._option_string_actions
    flags |= {flag.replace("_", "-"): action for flag, action in flags.items()}  # as in the paper's scripts
    if wants_help is not None:
        print(parser.format_help(), end="")
        print("" if shows_all else "\n--help all lists all flags.\n", end="")
        sys.exit(0)
    variables = _from_environment(environment or {}, parser)
    given = argparse.Namespace()
    try:
        given, unknown = parser.parse_known_args(args)
        earlier = _earlier_arguments(given.resume) if "resume" in given else {}
        values = earlier | variables | vars(given)
        for group in groups:
            check_types(group, values)
        found = [
            group(**{each.name: values[each.name] for each in fields(group) if each.name in values})
            for group in groups
        ]
    except argparse.ArgumentError as error:
        flag = error.argument_name
        refused = [value for name, value in pairwise(args) if name == flag and value not in flags]
        dashed = next((value for value in refused if value.startswith("-")), None)
        hint = f"; a value that begins with - is written {flag}={dashed}" if dashed else ""
        refuse(f"{flag}: {error.message}{hint}")
    except ValueError as error:  # a dataclass refuses the value of a field; the message starts with the field
        name, _, problem = str(error).partition(" ")
        is_variable = name in variables and name not in given
        refuse(f"{_VARIABLE}{name.upper()} {problem}" if is_variable else f"--{error}")
    if unknown:
        hint = _hint(unknown[0], [f"--{name}" for name in names])
        refuse(f"unknown argument {unknown[0]!r}; {hint}--help all lists the flags")
    return tuple(found)


def _from_environment(environment: Mapping[str, str], parser: argparse.ArgumentParser) -> JSONObject:
    """Values of flags, from variables of the environment. An empty variable counts as absent."""
    flags = parser._option_string_actions
    words = list[str]()
    for variable in sorted(
        name for name, value in environment.items() if name.startswith(_VARIABLE) and value
    ):
        if variable in _OTHER_VARIABLES:
            continue
        flag = f"--{variable.removeprefix(_VARIABLE).lower()}"
        value = environment[variable]
        if flag not in flags:
            refuse(f"{variable}: there is no flag {flag}; {_hint(flag, flags)}--help all lists the flags")
        try:
            words += [flag, *shlex.split(value)] if flags[flag].nargs == "+" else [f"{flag}={value}"]
        except ValueError:
            refuse(f"{variable} {value!r}: must be words as in a shell; this quotation or escape has no end")
    try:
        return vars(parser.parse_args(words))
    except argparse.ArgumentError as error:
        refuse(f"{_VARIABLE}{(error.argument_name or '').strip('-').upper()}: {error.message}")


def _add_flags(parser: argparse.ArgumentParser, group: type, names: Collection[str], shows_all: bool) -> None:
    """Add a flag for each field; without `shows_all`, --help shows the flags of `_FIRST` only."""
    section = parser.add_argument_group((group.__doc__ or "").split(".")[0])
    types = field_types(group)
    texts = field_texts(group)
    for each in sorted(fields(group), key=lambda each: each.name != "model"):  # it is the first one
        if each.name not in names:
            continue
        kind = types[each.name]
        options = JSONObject()
        if type(None) in get_args(kind):
            kind = get_args(kind)[0]
        if get_origin(kind) is list:
            (kind,) = get_args(kind)
            options = {"nargs": "+"}
        if get_origin(kind) is Literal:
            options = {"metavar": f"{{{','.join(get_args(kind))}}}"}
        elif kind is bool:
            options = {"nargs": "?", "const": True, "metavar": "True|False"}
            negated = (f"--no{each.name}", f"--no_{each.name}")
            parser.add_argument(
                *negated, dest=each.name, action="store_false", default=SUPPRESS, help=SUPPRESS
            )
        else:
            options |= {"metavar": kind.__name__.upper(), **each.metadata.get("flag", {})}
        options["type"] = partial(_converted, kind)
        default = "" if each.default is None else f" (default: {each.default})"
        text = f"{texts[each.name]}{default}".replace("%", "%%")
        section.add_argument(
            f"--{each.name}", help=text if shows_all or each.name in _FIRST.split() else SUPPRESS, **options
        )


def _converted(kind: Any, text: str) -> Any:
    """A value of the type of a flag, or the text itself, which `check_types` refuses."""
    if kind is bool:
        return _TRUTHS.get(text.lower(), text)
    with suppress(ValueError):
        return kind(text) if isinstance(kind, type) else text
    return text


def _hint(unknown: str, flags: Collection[str]) -> str:
    """What to use in place of an unknown flag; empty if nothing is known."""
    flag = unknown.partition("=")[0]
    for names, ours in _FOREIGN.items():
        if flag.lstrip("-").replace("-", "_") in names.split():
            if not ours.startswith("--"):
                return f"{ours}; "
            if ours.partition(" ")[0].rstrip(":,") in flags:
                return f"here it is {ours}; "
    near = difflib.get_close_matches(flag, flags, 1)
    return f"did you mean {near[0]}? " if near else ""


def _earlier_arguments(folder: str) -> JSONObject:
    """The arguments of the run in a folder; raises ValueError if there is none."""
    try:
        return {**read_run(folder)["arguments"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"resume {folder}: no run.json of a run in there") from error


def read_run(folder: str) -> JSONObject:
    """`run.json` in the folder of --resume."""
    return json.loads((Path(folder).expanduser() / "run.json").read_text("utf-8"))


def given_flags(args: Sequence[str] | None, group: type) -> set[str]:
    """The fields of a dataclass that the command line names, even with their default values."""
    words = sys.argv[1:] if args is None else args
    flags = {word.partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
    names = {field.name for field in fields(group)}
    return {name for name in names if {f"__{name}", f"__no{name}", f"__no_{name}"} & flags}


def refuse(message: str, status: int = 2) -> NoReturn:
    """End the program with one line of error; status 2 for bad usage, 1 for a failure later."""
    name = sys.argv[0].rpartition("/")[2]
    print(f"{name}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def at_least(group: object, least: int, *names: str) -> None:
    """Refuse a field with a number below the least one. None means no limit."""
    for name in names:
        values = value if isinstance(value := getattr(group, name), list) else [value]
        ok = all(each is None or each >= least for each in values)
        check(group, name, ok, f"must be at least {least}")
