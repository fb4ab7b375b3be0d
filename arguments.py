"""The command line of every script: one dataclass per concern, one parser.

Imports nothing heavy, so that a mistyped flag is answered at once.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, TextIO, get_args

import simple_parsing

from self_speculation.config import DtypeName, LoadingOptions, Parallel, Quantization
from self_speculation.config import GenerationConfig as GenerationConfig  # for whoever imports it from here

DatasetName = Literal[
    "cnn_dm_summarization",
    "xsum_summarization",
    "cnn_dm_lm",
    "human_eval",
    "top_v2",
    "custom_jsonl",
    "chat_format",
]

_WORDS = ("true", "false", "none")  # values of --model_args, in any case

# What is about drafts alone; an exit layer means something to autoregressive decoding too.
_ABOUT_DRAFTS = ("num_speculations", "draft_weights", "draft_confidence", "draft_vocabulary", "prompt_lookup")

# `metadata` of a flag that may have another value when a run is resumed. Under "resume" is a function of what
# `runs.records.describe` returns, the value that the run had and the one now -> None, or why they must be the
# same. Without it, they must be.
MAY_DIFFER = {"resume": lambda run, was, now: None}

# Where `refuse` writes; None: to standard error. A rank whose output is silenced keeps its real one here.
errors: TextIO | None = None


@dataclass(frozen=True)
class ModelArguments:
    """Which model to load, how, and onto which device."""

    model: str | None = None
    """Hub id, folder or .gguf file; without it, the bundled model (train.py: a new one)."""
    model_args: str | None = None
    """k=v,k=v passed to from_pretrained, such as attn_implementation=eager."""
    trust_remote_code: bool = False
    """Execute Python code that the model's repository brings; trust it as you trust its author."""
    seed: int = 42
    """Seed of every random generator."""
    output_dir: str = field(default="./logs", metadata=MAY_DIFFER)
    """Folder for records; generate.py writes none."""
    dtype: DtypeName = "auto"
    """Number format; auto: the checkpoint's own, and on a CPU weights in 16 bits are multiplied in float32;
    float32, bfloat16, float16: of weights and all else; half: bfloat16 where the device computes in it, else
    float16."""
    device: str = "auto"
    """cpu, cuda, cuda:N or mps; auto: a GPU if there is one."""
    parallel: Literal[Parallel, "fsdp"] = "data"
    """Several GPUs: a copy of the model on each (data), a share of every layer (tensor), or, for train.py, of
    all that is kept (fsdp), by torchrun; or some layers on each, with the rest in memory (pipeline), in one
    process."""
    quantization: Quantization = "none"
    """Hold the layers' weights in this many bits, by torchao (int8) or bitsandbytes (int4, as NF4)."""
    fuse: bool = True
    """Decode by fewer and faster kernels over the same weights; False: by the layers of transformers. On a
    CPU there may be a second copy of the weights, packed: always of weights in 16 bits that are multiplied in
    float32, else where that is clearly faster and fits into a third of the free memory."""
    compile: bool = False
    """On a GPU, capture the passes of decoding as CUDA graphs: some seconds first, then less per token.
    train.py: compile the layers (torch.compile)."""

    def __post_init__(self) -> None:
        check(self, "seed", 0 <= self.seed < 2**32, f"must be between 0 and {2**32 - 1}")
        self.from_pretrained_args()
        if self.parallel in ("tensor", "pipeline") and self.device != "auto":
            raise ValueError(f"device {self.device}: must be auto with --parallel {self.parallel}")
        for name, allowed in (("parallel", ("data", "fsdp")), ("quantization", ("none",))):
            if self.compile and (value := getattr(self, name)) not in allowed:
                raise ValueError(f"compile True: not with --{name} {value}")

    def from_pretrained_args(self) -> dict[str, Any]:
        """`model_args` as a dictionary: Python literals as such, also true, false and none in any case."""
        found: dict[str, Any] = {}
        for pair in filter(str.strip, (self.model_args or "").split(",")):
            key, equals, value = map(str.strip, pair.partition("="))
            check(self, "model_args", key.isidentifier() and bool(equals), "must be k=v,k=v")
            try:
                found[key] = ast.literal_eval(value.capitalize() if value.lower() in _WORDS else value)
            except (ValueError, SyntaxError):
                found[key] = value
        own_flag = "trust_remote_code" in found
        check(self, "model_args", not own_flag, "--trust_remote_code is a flag of its own")
        return found

    def loading_options(self, **changes: Any) -> LoadingOptions:
        """What the library is told, with changes by field."""
        own = {field.name: getattr(self, field.name) for field in fields(LoadingOptions)}
        return LoadingOptions(**{**own, "model_args": self.from_pretrained_args(), **changes})


@dataclass(frozen=True)
class DataArguments:
    """Which examples."""

    dataset: DatasetName = "human_eval"
    """Examples to generate from."""
    data_path: str | None = None
    """Local .jsonl, .csv or .parquet (.gz too) in the dataset's columns, or a folder of test.* and train.*"""
    random_shuffle: bool = True
    """Take the examples in an order drawn from the seed; False: in the order of the dataset."""
    num_samples: int | None = None
    """How many examples; without it, all."""
    n_shot: int = 0
    """Solved examples before each prompt, from the training split or else from those not evaluated."""
    template: str | None = None
    """Text around each prompt; {message} stands for the prompt, other braces for themselves."""
    chat: bool = False
    """Ask by the tokenizer's chat template; a prompt, with its shots and --template, is one message."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_samples")
        at_least(self, 0, "n_shot")
        names = get_args(DatasetName)
        check(self, "dataset", self.dataset in names, f"must be one of {', '.join(names)}")
        check(self, "template", "{message}" in (self.template or "{message}"), "must contain {message}")


def _why_same_batch_size(run: dict[str, Any], *_: Any) -> str | None:
    asked = run["arguments"]
    if run["script"] == "sweep":
        return "cells are compared by the time that they take with so many sequences"
    if asked["draft_weights"] != "exact" and asked["sample"] and asked["temperature"] > 0:
        return f"where {asked['draft_weights']} copies draft, what is sampled depends on the batch"
    return None


@dataclass(frozen=True)
class BatchArguments:
    """How many sequences at once."""

    batch_size: int = field(default=1, metadata={"resume": _why_same_batch_size})
    """Sequences decoded at a time; each comes out as it would alone."""

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_size")


class _HelpFormatter(simple_parsing.SimpleHelpFormatter):
    """A group's heading is the name of its class alone; a default is shown only where it is not None."""

    def start_section(self, heading: str | None) -> None:
        super().start_section((heading or "").partition(" [")[0])

    def add_text(self, text: str | None) -> None:
        super().add_text(text.strip() if text else text)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class _Parser(simple_parsing.ArgumentParser):
    """Refuses bad usage in one line."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.register("action", None, _StoreValue)  # None: where no action is named
        self.register("action", "store", _StoreValue)

    def error(self, message: str) -> NoReturn:
        refuse(message, self.prog)


class _StoreValue(argparse._StoreAction):
    """A flag that is given has a value. By simple_parsing alone, one that may be left out may also stand
    without a value, and counts as left out then.
    """

    def __init__(
        self, option_strings: Sequence[str], dest: str, nargs: str | None = None, **kwargs: Any
    ) -> None:
        nargs = {"?": None, "*": "+"}.get(nargs or "", nargs)
        super().__init__(option_strings, dest, nargs, **kwargs)


def parse(
    description: str,
    *groups: type,
    args: Sequence[str] | None = None,
    rest: argparse.ArgumentParser | None = None,
) -> tuple[Any, ...]:
    """One instance of each dataclass in `groups`, from the command line.

    With --resume FOLDER, what is not given is as it was in that run. Bad usage ends the program with status 2
    and one line that names the flag, the value and what is allowed.

    Args:
        rest: parses all other flags; what it finds comes last, and its help too.
    """
    parser = _Parser(
        description=description,
        epilog=rest.format_help() if rest else None,
        allow_abbrev=False,
        add_option_string_dash_variants=simple_parsing.DashVariant.UNDERSCORE,
        formatter_class=_HelpFormatter,
    )
    names = {field.name for group in groups for field in fields(group)}
    args = _as_spelled_here(args, names)
    try:
        earlier = _earlier_arguments(args, groups)
        for group in groups:
            own = {field.name: earlier[field.name] for field in fields(group) if field.name in earlier}
            parser.add_arguments(group, dest=group.__name__, default=group(**own) if own else None)
        values, unknown = parser.parse_known_args(args)
    except ValueError as error:  # raised by a dataclass about its own values, field name first
        parser.error(f"--{error}")
    _check_copies(parser, values)
    _check_stop_words(parser, values)
    found = [getattr(values, group.__name__) for group in groups]
    actions = list(parser._actions)
    if rest is not None:
        others, unknown = rest.parse_known_args(unknown)
        found.append(others)
        actions += rest._actions
    if unknown:
        flags = [flag for action in actions for flag in action.option_strings]
        near = _nearest(unknown[0].partition("=")[0], flags)
        hint = f"did you mean {near}? " if near else ""
        parser.error(f"unknown argument {unknown[0]!r}; {hint}--help lists the flags")
    return tuple(found)


def _nearest(unknown: str, flags: Sequence[str]) -> str | None:
    """The flag that was meant, or None: one that differs in a letter, begins alike, or is similar."""
    misspelt = difflib.get_close_matches(unknown, flags, 1, cutoff=0.9)
    shorter = sorted((flag for flag in flags if unknown.startswith(f"{flag}_")), key=len, reverse=True)
    return next(iter([*misspelt, *shorter, *difflib.get_close_matches(unknown, flags, 1)]), None)


def refuse_idle_drafts(config: GenerationConfig) -> None:
    """End the program where flags are about drafts, and the strategy makes none."""
    if config.generation_strategy != "autoregressive":
        return
    for flag in fields(config):
        value = getattr(config, flag.name)
        if flag.name in _ABOUT_DRAFTS and value != flag.default:
            # Adaptive asks for nothing more, but chooses these for itself.
            is_chosen = flag.name in ("num_speculations", "draft_confidence")
            strategy = "self_speculative" if is_chosen else "adaptive"
            refuse(
                f"--{flag.name} {value}: autoregressive decoding drafts nothing, add --generation_strategy "
                f"{strategy}"
            )


def _earlier_arguments(args: Sequence[str] | None, groups: Sequence[type]) -> dict[str, Any]:
    """Those of the run that --resume names; none without that flag.

    Raises:
        ValueError: there is no such run.
    """
    if not any(field.name == "resume" for group in groups for field in fields(group)):
        return {}
    flag = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    flag.add_argument("--resume", nargs="?")
    folder = flag.parse_known_args(args)[0].resume
    return {} if folder is None else {**read_run(folder)["arguments"], "resume": None}


def read_run(folder: str) -> dict[str, Any]:
    """What `run.json` in the folder of --resume says.

    Raises:
        ValueError: there is none of a run.
    """
    try:
        described = json.loads((Path(folder).expanduser() / "run.json").read_text("utf-8"))
        if not isinstance(described["arguments"], dict):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"resume {folder}: no run.json of a run in there") from error
    return described


def _check_copies(parser: _Parser, values: argparse.Namespace) -> None:
    """Copies for drafts are made of fused layers of one device."""
    model_args = getattr(values, ModelArguments.__name__, None)
    config = getattr(values, GenerationConfig.__name__, None)
    if model_args is None or config is None or config.draft_weights == "exact":
        return
    for name, needed in (("fuse", True), ("quantization", "none"), ("parallel", "data")):
        if (value := getattr(model_args, name)) != needed:
            parser.error(f"--draft_weights {config.draft_weights}: not with --{name} {value}")


def _check_stop_words(parser: _Parser, values: argparse.Namespace) -> None:
    """Refuse several in one, by commas or as a list: such a text would never come up."""
    config = getattr(values, GenerationConfig.__name__, None)
    for word in (config and config.stop_words) or []:
        if re.search(r"[^\W\d],[^\W\d]", word) or re.fullmatch(r"""\[\s*(["']).*\1\s*\]""", word, re.DOTALL):
            several = " ".join(re.findall(r"\w+", word))
            parser.error(f"--stop_words {word!r}: several stand one after the other, as in {several}")


def given_flags(args: Sequence[str] | None, group: type) -> set[str]:
    """The fields of a dataclass that the command line names, also those that it sets to their defaults."""
    names = {field.name for field in fields(group)}
    flags = {arg.partition("=")[0] for arg in _as_spelled_here(args, names)}
    return {name for name in names if {f"--{name}", f"--no{name}"} & flags}


def _as_spelled_here(args: Sequence[str] | None, names: Collection[str]) -> list[str]:
    """The command line, with `--max_steps` for `--max-steps` and `--nosample` for `--no_sample`: the paper's
    scripts take these as well.
    """
    spelled = []
    for arg in sys.argv[1:] if args is None else args:
        flag, equals, value = arg.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and name in names:
            arg = f"--{name}{equals}{value}"
        elif flag.startswith("--no") and name.removeprefix("no_") in names:
            arg = f"--no{name.removeprefix('no_')}{equals}{value}"
        spelled.append(arg)
    return spelled


def refuse(message: str, prog: str | None = None, status: int = 2) -> NoReturn:
    """End the program with one line of error; status 2 for bad usage, 1 for what went wrong later."""
    name = prog or sys.argv[0].rpartition("/")[2]
    print(f"{name}: error: {' '.join(message.split())}", file=errors or sys.stderr)
    sys.exit(status)


def check(group: Any, name: str, ok: bool, allowed: str) -> None:
    """Raises ValueError unless `ok`: the field's name and value, and what is allowed."""
    if not ok:
        raise ValueError(f"{name} {getattr(group, name)!r}: {allowed}")


def at_least(group: Any, least: int, *names: str) -> None:
    """Check fields that hold a number, several, or None, which stands for no limit."""
    for name in names:
        values = value if isinstance(value := getattr(group, name), list) else [value]
        ok = all(each is None or each >= least for each in values)
        check(group, name, ok, f"must be at least {least}")
