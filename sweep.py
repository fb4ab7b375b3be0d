"""Compare exit layers x draft lengths: count the drafts of every cell, and measure the best ones.

    python sweep.py --num_samples 40 --max_steps 64 --exit_layer_first 2 --exit_layer_last 12
    python sweep.py --mode measured --num_samples 10 --max_steps 64 --num_speculations_step 2

Each example is generated once, greedily. One more pass over it tells what every exit layer would have
guessed, which gives exact counts of drafted and accepted tokens for every cell. Every other prompt chooses
three cells by the counts, and the other prompts measure the cells. The last line has the flags of the
fastest cell, if the prompts can tell. --mode measured measures all cells, and can sample.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from arguments import (
    SELDOM,
    GenerationConfig,
    ModelArguments,
    RunArguments,
    at_least,
    check,
    given_flags,
    parse,
    refuse,
)
from data import DataArguments
from runs.flags import read_examples, validate
from runs.program import run
from runs.status import print_status

# Flags of drafts that counts can follow: drafts of one exit, of one length.
_COUNTED = {"exit_layer", "num_speculations", "draft_weights"}


@dataclass(frozen=True)
class SweepArguments(RunArguments):
    """Exit layers, draft lengths, and how they are timed."""

    mode: Literal["counted", "measured"] = "counted"
    """counted: count the drafts of every cell, then measure the three that should be fastest; measured: run
    every cell."""
    exit_layer_first: int = 1
    """First exit layer of the grid."""
    exit_layer_last: int = 15
    """Last exit layer; at most the model's last but one. With --draft_weights the last layer is in the grid,
    too."""
    exit_layer_step: int = 1
    """Step between exit layers."""
    num_speculations_first: int = 1
    """First draft length of the grid."""
    num_speculations_last: int = 6
    """Last draft length."""
    num_speculations_step: int = 1
    """Step between draft lengths."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for axis in ("exit_layer", "num_speculations"):
            first, last = (getattr(self, f"{axis}_{end}") for end in ("first", "last"))
            at_least(self, 1, f"{axis}_first", f"{axis}_last", f"{axis}_step")
            check(self, f"{axis}_first", first <= last, f"beyond --{axis}_last {last}, the grid is empty")


def main(argv: Sequence[str] | None = None) -> int:
    groups = (ModelArguments, GenerationConfig, DataArguments, SweepArguments)
    model_args, config, data_args, args = parse(__doc__ or "", *groups, args=argv, without=SELDOM)
    if config.generation_strategy == "adaptive":
        refuse("--generation_strategy adaptive: cells are self_speculative, leave it out")
    cell = {"generation_strategy": "self_speculative", "exit_layer": 1, "num_speculations": 1}
    config = dataclasses.replace(config, **cell)
    validate(model_args, config)
    drafting = (each for each in dataclasses.fields(config) if "used_by" in each.metadata)
    changed = {each.name for each in drafting if getattr(config, each.name) != each.default}
    if args.mode == "counted" and changed - _COUNTED:
        refuse("--mode counted: needs drafts of layers and of one length; use --mode measured")
    examples = read_examples(model_args, data_args, args)

    from measures.sweeping import Counted, Measured
    from runs.examples import run_experiment
    from runs.startup import read_config

    num_layers = read_config(model_args).num_hidden_layers
    is_copy = config.draft_weights != "exact"
    last = num_layers if is_copy else num_layers - 1
    if args.exit_layer_first > last:
        refuse(f"--exit_layer_first {args.exit_layer_first}: must be between 1 and {last}, the grid is empty")
    exit_layers = [*range(args.exit_layer_first, min(args.exit_layer_last, last) + 1, args.exit_layer_step)]
    if is_copy and last not in exit_layers:
        exit_layers.append(last)  # a copy of all layers guesses best
    if args.mode == "counted" and not config.greedy:
        print_status("--mode counted decodes greedily, as with --sample False; --mode measured can sample")
        config = dataclasses.replace(config, sample=False)
    if unused := sorted(given_flags(argv, GenerationConfig) & {"exit_layer", "num_speculations"}):
        print_status(f"--{' and --'.join(unused)}: not used, cells are on the grid of the flags of sweeps")
    if args.exit_layer_last > last:
        cut = f"cut to {last}, the model has {num_layers} layers"
        print_status(f"--exit_layer_last {args.exit_layer_last}: {cut}")
    lengths = range(args.num_speculations_first, args.num_speculations_last + 1, args.num_speculations_step)
    grid = [(layer, k) for layer in exit_layers for k in lengths]
    make = Measured if args.mode == "measured" else Counted
    return run_experiment("sweep", make, model_args, config, data_args, args, examples, grid=grid)


if __name__ == "__main__":
    run(main)
