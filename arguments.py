"""The command line of every script: one dataclass per concern, one parser.

Imports nothing heavy, so that a mistyped flag is answered at once.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import json
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
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

_WORDS = {"true": True, "false": False, "none": None}  # values of k=v, in any case

# What is about drafts alone; an exit layer means something to autoregressive decoding too.
_ABOUT_DRAFTS = ("num_speculations", "draft_weights", "draft_confidence", "draft_vocabulary", "prompt_lookup")

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
    output_dir: str = "./logs"
    """Folder for records; generate.py writes none."""
    dtype: DtypeName = "auto"
    """Number format of the weights; auto: float32 on a CPU, the checkpoint's own elsewhere; half: bfloat16
    where the device computes in it, else float16."""
    device: str = "auto"
    """cpu, cuda, cuda:N or mps; auto: a GPU if there is one."""
    parallel: Parallel = "data"
    """Several GPUs: a copy of the model on each (data) or a share of every layer (tensor), both by torchrun;
    or some layers on each, with the rest in memory (pipeline), in one process."""
    quantization: Quantization = "none"
    """Hold the layers' weights in this many bits, by torchao (int8) or bitsandbytes (int4, as NF4)."""
    fuse: bool = True
    """Decode by fewer and faster kernels over the same weights; False: by the layers of transformers. On a
    CPU in fp32, models of 128 MiB and more may keep a second copy of weights, if it fits into a third of the
    free memory."""
    compile: bool = False
    """Compile the passes of decoding (torch.compile, CUDA graphs): a minute first, then less per token."""

    def __post_init__(self) -> None:
        _check_seeds(self, "seed")
        self.from_pretrained_args()
        if self.parallel != "data" and self.device != "auto":
            raise ValueError(f"device {self.device}: must be auto with --parallel {self.parallel}")
        for name, default in (("parallel", "data"), ("quantization", "none")):
            if self.compile and (value := getattr(self, name)) != default:
                raise ValueError(f"compile True: not with --{name} {value}")

    def from_pretrained_args(self) -> dict[str, Any]:
        """`model_args` as a dictionary, see `simple_parse_args_string`."""
        try:
            parsed = simple_parse_args_string(self.model_args)
        except ValueError as error:
            raise ValueError(f"model_args {error}") from error
        if "trust_remote_code" in parsed:
            raise ValueError(f"model_args {self.model_args!r}: --trust_remote_code is a flag of its own")
        return parsed

    def loading_options(self, **changes: Any) -> LoadingOptions:
        """What the library is told, with changes by field."""
        own = {field.name: getattr(self, field.name) for field in fields(LoadingOptions)}
        return LoadingOptions(**{**own, "model_args": self.from_pretrained_args(), **changes})


@dataclass(frozen=True)
class GenerateArguments:
    """How generate.py takes prompts and shows answers."""

    streamer: Literal["standard", "none", "speculative"] = "standard"
    """Show the answer as it is decided, at the end, or with its drafts as they come and go."""
    prompt: str | None = None
    """Answer this and end; without it, a pipe is one prompt, and at a terminal there is a conversation. An
    empty text stands for the BOS token alone."""
    chat: bool = False
    """Apply the tokenizer's chat template and keep the conversation."""
    compare: bool = False
    """Then decode the prompt by autoregressive decoding too, in three turns, and say how fast both are."""


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

    def __post_init__(self) -> None:
        _check(self, "num_samples", self.num_samples is None or self.num_samples >= 1, "must be at least 1")
        _check(self, "n_shot", self.n_shot >= 0, "must be 0 or more")
        names = get_args(DatasetName)
        _check(self, "dataset", self.dataset in names, f"must be one of {', '.join(names)}")
        templated = self.template is None or "{message}" in self.template
        _check(self, "template", templated, "must contain {message}")


@dataclass(frozen=True)
class MeasurementArguments:
    """What to measure and to record."""

    compare: bool = False
    """Decode each prompt self-speculatively and autoregressively, in turn, and report the speed-up."""
    execute_code: bool = False
    """For pass@1, run the programs that the model wrote for human_eval: code that nobody has checked."""
    resume: str | None = None
    """Folder of an interrupted run to go on with."""
    verbose: bool = False
    """Print prompts and answers."""


@dataclass(frozen=True)
class BatchArguments:
    """How many sequences at once."""

    batch_size: int = 1
    """Sequences decoded at a time; each comes out as it would alone."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "batch_size")


@dataclass(frozen=True)
class CorrectnessArguments:
    """What to compare with, and how much of it."""

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
        _at_least(self, 1, "sampled_prompts")
        _at_least(self, 20, "samples_per_prompt")
        _at_least(self, 2, "sampled_tokens")


@dataclass(frozen=True)
class SweepArguments:
    """Which exit layers and draft lengths, and how they are timed."""

    mode: Literal["predicted", "measured"] = "predicted"
    """predicted: read the whole grid off one pass over each example; measured: run every cell."""
    exit_layer_first: int = 1
    """First exit layer of the grid."""
    exit_layer_last: int = 15
    """Last exit layer; at most the model's last but one, and with --draft_weights its last, which is then in
    the grid where this flag is left out."""
    exit_layer_step: int = 1
    """From one exit layer of the grid to the next."""
    num_speculations_first: int = 1
    """First draft length of the grid."""
    num_speculations_last: int = 6
    """Last draft length."""
    num_speculations_step: int = 1
    """From one draft length to the next."""
    verify_top: int = 0
    """Measure this many of the best predicted cells for real."""
    resume: str | None = None
    """Folder of an interrupted sweep to go on with."""

    def __post_init__(self) -> None:
        for axis in ("exit_layer", "num_speculations"):
            first, last, step = (getattr(self, f"{axis}_{end}") for end in ("first", "last", "step"))
            if first < 1 or step < 1:
                raise ValueError(f"{axis}_first {first}, --{axis}_step {step}: must be at least 1")
            if first > last:
                raise ValueError(f"{axis}_first {first}: beyond --{axis}_last {last}, the grid is empty")
        _check(self, "verify_top", self.verify_top >= 0, "must be 0 or more")

    def exit_layers(self, last: int) -> range:
        """Those of the grid that the model has: up to `last`."""
        return range(self.exit_layer_first, min(self.exit_layer_last, last) + 1, self.exit_layer_step)

    def draft_lengths(self) -> range:
        return range(self.num_speculations_first, self.num_speculations_last + 1, self.num_speculations_step)


@dataclass(frozen=True)
class TuningArguments:
    """Settings that were found by a sweep."""

    tuned: str | None = None
    """Folder or CSV of a sweep, or their --output_dir: use the best exit layer and draft length."""


@dataclass(frozen=True)
class TrainingDataArguments:
    """What to learn from."""

    data: str = "python_stdlib"
    """python_stdlib: the sources of the running interpreter; else a dataset of the hub."""
    data_path: str | None = None
    """Local files instead, as a glob pattern: .jsonl, .csv, .parquet; any other file is one text."""
    text_column: str = "text"
    """Column of the text, unless there are columns prompt and response."""
    eval_fraction: float = 0.05
    """Share of the texts that is held out for evaluation."""
    sequence_length: int = 768
    """Tokens of a sample; the context of a new model."""

    def __post_init__(self) -> None:
        _check(self, "eval_fraction", 0 < self.eval_fraction < 1, "must be between 0 and 1")
        _at_least(self, 2, "sequence_length")


@dataclass(frozen=True)
class NewModelArguments:
    """Shape of the new Llama that is trained where --model names none."""

    vocabulary_size: int = 2048
    """Tokens of its tokenizer, which is trained on the same text."""
    num_layers: int = 16
    """Decoder layers."""
    hidden_size: int = 256
    """Width of the hidden states."""
    intermediate_size: int = 704
    """Width inside the MLP."""
    num_heads: int = 4
    """Attention heads."""
    num_kv_heads: int = 2
    """Heads of keys and values."""

    def __post_init__(self) -> None:
        _at_least(self, 257, "vocabulary_size")  # each byte, and the end of a text
        _at_least(self, 2, "num_layers")
        _at_least(self, 1, "hidden_size", "intermediate_size", "num_heads", "num_kv_heads")
        even = self.hidden_size % (2 * self.num_heads) == 0
        _check(self, "hidden_size", even, "must be a multiple of 2 x num_heads")
        shared = self.num_heads % self.num_kv_heads == 0
        _check(self, "num_kv_heads", shared, f"must divide --num_heads {self.num_heads}")


@dataclass(frozen=True)
class RecipeArguments:
    """Layer dropout and early-exit loss; 0 as layer_dropout or early_exit_scale switches that one off."""

    layer_dropout: float = 0.1
    """Probability that a sample skips the last layer; lower for earlier layers, 0 for the first."""
    dropout_schedule: Literal["constant", "exponential"] = "constant"
    """exponential: the probability rises from 0 during the training, for a new model."""
    early_exit_scale: float = 0.2
    """Weight of the early exits' losses; 0: only the last layer's loss counts."""
    exit_loss: Literal["label", "distill"] = "label"
    """Early exits learn the data's next token, or the distribution of the last layer."""
    exit_weighting: Literal["depth", "equal"] = "depth"
    """depth: the paper's, by which early exits hardly count; equal: alike, and together early_exit_scale."""
    curriculum: Literal["rotational", "gradual", "all"] = "rotational"
    """Which exits learn at a step: every --rotation-th, more and more from the last down, or all."""
    rotation: int = 8
    """With the rotational curriculum: of this many exits, one learns at a step."""
    exits: list[int] | None = None
    """Exit layers that learn; without it, all."""

    def __post_init__(self) -> None:
        _check(self, "layer_dropout", 0 <= self.layer_dropout <= 1, "must be between 0 and 1")
        _check(self, "early_exit_scale", self.early_exit_scale >= 0, "must be 0 or more")
        _at_least(self, 1, "rotation")

    def exit_layers(self, num_layers: int) -> tuple[int, ...]:
        """Those that learn; raises ValueError where the model has no such exit."""
        if self.early_exit_scale == 0:
            return ()
        exits = self.exits or range(1, num_layers)
        known = all(1 <= exit < num_layers for exit in exits)
        allowed = f"must be between 1 and {num_layers - 1}, the last layer learns anyway"
        _check(self, "exits", known, allowed)
        return tuple(sorted(set(exits)))


@dataclass(frozen=True)
class OptimizationArguments:
    """How long and how fast to train, and how often to log, evaluate and save."""

    num_steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 4
    """Samples per pass and rank."""
    gradient_accumulation: int = 1
    """Passes per step."""
    learning_rate: float = 8e-4
    """The highest; it falls along a cosine to a tenth."""
    warmup_steps: int = 100
    """Steps in which the learning rate rises from 0."""
    weight_decay: float = 0.1
    """Weight decay of AdamW."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    log_steps: int = 10
    """Steps between rows of log.csv."""
    eval_steps: int = 250
    """Steps between evaluations."""
    eval_samples: int = 64
    """Held-out samples of an evaluation; the last one takes all."""
    save_steps: int = 250
    """Steps between checkpoints to resume from; the last two are kept."""
    resume: str | None = None
    """Folder of an interrupted training to go on with."""

    def __post_init__(self) -> None:
        _at_least(self, 1, "num_steps", "batch_size", "gradient_accumulation")
        _at_least(self, 1, "log_steps", "eval_steps", "save_steps", "eval_samples")
        _at_least(self, 0, "warmup_steps", "weight_decay")
        short = self.warmup_steps < self.num_steps
        _check(self, "warmup_steps", short, f"must be below --num_steps {self.num_steps}")
        _check(self, "learning_rate", self.learning_rate > 0, "must be above 0")


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
    found = [getattr(values, group.__name__) for group in groups]
    actions = list(parser._actions)
    if rest is not None:
        others, unknown = rest.parse_known_args(unknown)
        found.append(others)
        actions += rest._actions
    if unknown:
        flags = [flag for action in actions for flag in action.option_strings]
        near = difflib.get_close_matches(unknown[0].partition("=")[0], flags, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        parser.error(f"unknown argument {unknown[0]!r}; {hint}--help lists the flags")
    return tuple(found)


def refuse_idle_drafts(config: GenerationConfig) -> None:
    """End the program where flags are about drafts, and the strategy makes none."""
    if config.generation_strategy != "autoregressive":
        return
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in _ABOUT_DRAFTS and value != field.default:
            # Adaptive asks for nothing more, but chooses these for itself.
            is_chosen = field.name in ("num_speculations", "draft_confidence")
            strategy = "self_speculative" if is_chosen else "adaptive"
            refuse(
                f"--{field.name} {value}: autoregressive decoding drafts nothing, add --generation_strategy "
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
    """Copies for drafts are made of lean layers of one device, and passes over them are not compiled."""
    model_args = getattr(values, ModelArguments.__name__, None)
    config = getattr(values, GenerationConfig.__name__, None)
    if model_args is None or config is None or config.draft_weights == "exact":
        return
    for name, needed in (("fuse", True), ("compile", False), ("quantization", "none"), ("parallel", "data")):
        if (value := getattr(model_args, name)) != needed:
            parser.error(f"--draft_weights {config.draft_weights}: not with --{name} {value}")
    if config.draft_weights == "float16" and model_args.dtype not in ("auto", "float32"):
        parser.error(
            f"--draft_weights float16: is for a model in float32, not with --dtype {model_args.dtype}; int8, "
            "int4 and auto are for all"
        )


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


def _check(group: Any, name: str, ok: bool, allowed: str) -> None:
    """Raises ValueError unless `ok`: the field's name and value, and what is allowed."""
    if not ok:
        raise ValueError(f"{name} {getattr(group, name)!r}: {allowed}")


def _at_least(group: Any, least: int, *names: str) -> None:
    for name in names:
        _check(group, name, getattr(group, name) >= least, f"must be at least {least}")


def _check_seeds(group: Any, *names: str) -> None:
    for name in names:
        _check(group, name, 0 <= getattr(group, name) < 2**32, f"must be between 0 and {2**32 - 1}")


def simple_parse_args_string(args_string: str | dict[str, Any] | None) -> dict[str, Any]:
    """`k=v,k=v` as a dictionary; values that read as Python numbers, booleans or None become those, the
    latter in any case. A dictionary is one already.

    Raises:
        ValueError: it is none.
    """
    if isinstance(args_string, dict):
        return args_string
    pairs = [pair.partition("=") for pair in (args_string or "").split(",") if pair.strip()]
    if not all(key.strip().isidentifier() and equals for key, equals, _ in pairs):
        raise ValueError(f"{args_string!r}: must be k=v,k=v")
    return {key.strip(): _literal(value.strip()) for key, _, value in pairs}


def _literal(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def names_in_compat(module: str) -> Callable[[str], Any]:
    """`__getattr__` of a module of which scripts for the paper's code base import names that stand in
    `measures/compat.py`.
    """

    def find(name: str) -> Any:
        if name.startswith("_"):  # Python's own, which it asks for at every import
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return importlib.import_module("measures.compat").lookup(module, name)

    return find


__getattr__ = names_in_compat(__name__)
