"""The command line of every script: one dataclass per concern, one parser.

Imports nothing heavy, so a script answers a mistyped flag at once.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

import simple_parsing

from self_speculation.config import (
    DtypeName,  # noqa: F401
    LoadingOptions,
    Parallel,  # noqa: F401
    PrefillDtype,  # noqa: F401
    Quantization,  # noqa: F401
    check,
    check_template_kwargs,
    default_model,
    why_no_model,
)
from self_speculation.config import GenerationConfig as GenerationConfig  # scripts import it from here

_ADVANCED = {"prefill_dtype"}  # flags that few need


@dataclass(frozen=True)
class _ModelName:  # a base class, so that --help lists this flag first
    model: str | None = None
    """Hub id, folder or .gguf file; without it, the bundled model (train.py: a new one)."""


@dataclass(frozen=True)
class ModelArguments(LoadingOptions, _ModelName):  # simple_parsing resolves inherited annotations here
    """Which model to load, how, and onto which device."""

    model_args: str | None = None  # type: ignore[assignment]  # `loading_options` has the parsed ones
    """JSON or k=v,k=v passed to from_pretrained, such as attn_implementation=eager; v may be a dictionary."""
    output_dir: str = "./logs"
    """Folder for records; generate.py writes none."""
    threads: int | None = None
    """Threads of a CPU; without it, one for each core, and fewer while other programs use the cores."""

    def __post_init__(self) -> None:
        check(self, "seed", 0 <= self.seed < 2**32, f"must be between 0 and {2**32 - 1}")
        at_least(self, 1, "threads")
        is_adapter = (Path(self.model or "").expanduser() / "adapter_config.json").is_file()
        if self.model and not is_adapter and (why := why_no_model(self.model)):
            raise ValueError(f"model {self.model!r}: {why}")
        self.from_pretrained_args()
        if self.parallel == "pipeline" and self.device != "auto":
            raise ValueError(f"device {self.device}: must be auto with --parallel pipeline")
        for name, allowed in (("parallel", ("data", "fsdp")), ("quantization", ("none",))):
            if self.compile and (value := getattr(self, name)) not in allowed:
                raise ValueError(f"compile True: not with --{name} {value}")

    @property
    def model_name(self) -> str:
        """--model, or the bundled model."""
        return default_model() if self.model is None else self.model

    def from_pretrained_args(self) -> dict[str, Any]:
        """Parse `model_args`."""
        found = _key_values(self, "model_args")
        own_flag = "trust_remote_code" in found
        check(self, "model_args", not own_flag, "--trust_remote_code is a flag of its own")
        return found

    def loading_options(self, **changes: Any) -> LoadingOptions:
        """The library's options, with `changes` by field."""
        own = {each.name: getattr(self, each.name) for each in fields(LoadingOptions)}
        return LoadingOptions(**{**own, "model_args": self.from_pretrained_args(), **changes})


def _key_values(group: Any, name: str) -> dict[str, Any]:
    """Parse a flag of JSON or of k=v,k=v: Python literals, also true, false and none in any case, or else
    text.
    """
    text, allowed = getattr(group, name) or "", "must be a JSON object or k=v,k=v"
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name} {text!r}: {allowed}") from error
    found: dict[str, Any] = {}
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
    """A base class of those who apply the tokenizer's chat template."""

    chat_template_kwargs: str | None = None
    """Variables of the chat template, as JSON or k=v,k=v, such as enable_thinking=false. The template ignores
    unknown ones."""

    def __post_init__(self) -> None:
        name, kwargs = "chat_template_kwargs", self.template_kwargs
        try:
            check_template_kwargs(kwargs)
        except ValueError as error:
            check(self, name, False, str(error))
        check(self, name, not kwargs or getattr(self, "chat", True), "needs --chat True")

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """Parse `chat_template_kwargs`."""
        return _key_values(self, "chat_template_kwargs")


@dataclass(frozen=True)
class BatchArguments:
    """How many sequences at once."""

    batch_size: int = 1
    """Sequences decoded at a time; each comes out as it would alone."""

    def __post_init__(self) -> None:
        at_least(self, 1, "batch_size")


class _HelpFormatter(simple_parsing.SimpleHelpFormatter):
    """Shows the class name alone as a group's heading, and no default that is None."""

    def start_section(self, heading: str | None) -> None:
        super().start_section((heading or "").partition(" [")[0])

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class _StoreValue(argparse._StoreAction):
    """Requires a value after a flag. simple_parsing alone takes `--prompt` without a value as None."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("nargs") in ("?", "*"):
            kwargs["nargs"] = None if kwargs["nargs"] == "?" else "+"
        super().__init__(*args, **kwargs)


class _Parser(simple_parsing.ArgumentParser):
    """Refuses bad usage in one line."""

    def format_help(self) -> str:
        """With flags that few need in a group at the end."""
        groups, advanced = [*self._action_groups], self.add_argument_group("advanced")
        for group in groups:
            moved = [action for action in group._group_actions if action.dest.rpartition(".")[2] in _ADVANCED]
            group._group_actions = [action for action in group._group_actions if action not in moved]
            advanced._group_actions += moved
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        refuse(message)


def parse(
    description: str,
    *groups: type,
    args: Sequence[str] | None = None,
    rest: argparse.ArgumentParser | None = None,
) -> tuple[Any, ...]:
    """Parse one instance of each dataclass in `groups` from the command line; `rest` parses all other flags.

    With --resume FOLDER, the arguments of that run are the defaults. Bad usage ends the program with status 2
    and one line that names the flag, the value and what is allowed.
    """
    parser = _Parser(
        description=description.strip(),
        epilog=rest.format_help() if rest else None,
        allow_abbrev=False,
        add_option_string_dash_variants=simple_parsing.DashVariant.UNDERSCORE,
        formatter_class=_HelpFormatter,
    )
    for action in (None, "store"):  # None: the default action
        parser.register("action", action, _StoreValue)
    names = {field.name for group in groups for field in fields(group)}
    args = _normalize(args, names)
    try:
        earlier = _earlier_arguments(args) if "resume" in names else {}
        for group in groups:
            own = {field.name: earlier[field.name] for field in fields(group) if field.name in earlier}
            parser.add_arguments(group, dest=group.__name__, default=group(**own) if own else None)
        values, unknown = parser.parse_known_args(args)
    except ValueError as error:  # a dataclass refuses its own value; the message starts with the field
        refuse(f"--{error}")
    found = [getattr(values, group.__name__) for group in groups]
    if rest is not None:
        others, unknown = rest.parse_known_args(unknown)
        found.append(others)
    if unknown:
        flags = [*parser._option_string_actions, *(rest._option_string_actions if rest else ())]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], flags, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        refuse(f"unknown argument {unknown[0]!r}; {hint}--help lists the flags")
    return tuple(found)


def _earlier_arguments(args: Sequence[str]) -> dict[str, Any]:
    """The arguments of the run that --resume names, if it is given; raises ValueError if it has none."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--resume", nargs="?")
    folder = parser.parse_known_args(args)[0].resume
    try:
        return {} if folder is None else {**read_run(folder)["arguments"], "resume": None}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"resume {folder}: no run.json of a run in there") from error


def read_run(folder: str) -> dict[str, Any]:
    """`run.json` in the folder of --resume."""
    return json.loads((Path(folder).expanduser() / "run.json").read_text("utf-8"))


def given_flags(args: Sequence[str] | None, group: type) -> set[str]:
    """The fields of a dataclass that the command line names, even with their default values."""
    names = {field.name for field in fields(group)}
    flags = {arg.partition("=")[0] for arg in _normalize(args, names)}
    return {name for name in names if {f"--{name}", f"--no{name}"} & flags}


def _normalize(args: Sequence[str] | None, names: Collection[str]) -> list[str]:
    """Turn `--max-steps` into `--max_steps` and `--no_sample` into `--nosample`, which the paper's scripts
    also accept.
    """
    normalized = []
    for arg in sys.argv[1:] if args is None else args:
        flag, equals, value = arg.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and name in names:
            arg = f"--{name}{equals}{value}"
        elif flag.startswith("--no") and name.removeprefix("no_") in names:
            arg = f"--no{name.removeprefix('no_')}{equals}{value}"
        normalized.append(arg)
    return normalized


def refuse(message: str, status: int = 2) -> NoReturn:
    """End the program with one line of error; status 2 for bad usage, 1 for a failure later."""
    name = sys.argv[0].rpartition("/")[2]
    print(f"{name}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def at_least(group: Any, least: int, *names: str) -> None:
    """Refuse a field with a number below the least one. None means no limit."""
    for name in names:
        values = value if isinstance(value := getattr(group, name), list) else [value]
        ok = all(each is None or each >= least for each in values)
        check(group, name, ok, f"must be at least {least}")
