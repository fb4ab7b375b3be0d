"""The flags of train.py besides the model's. Imports nothing heavy: a mistyped flag fails at once."""

import os
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Literal, NamedTuple

from arguments import ModelArguments, at_least, check


@dataclass(frozen=True)
class TrainingDataArguments:
    """Training data."""

    data_path: str | None = None
    """Files, as a glob pattern: .jsonl, .csv or .parquet; any other file is one text. Without it, the sources
    of the running interpreter's standard library."""
    text_column: str = "text"
    """Column of the text; ignored if there are columns prompt and response."""
    eval_fraction: float = 0.05
    """Share of the texts that is held out for evaluation."""
    sequence_length: int = 768
    """Tokens of a sample; the context of a new model."""

    def __post_init__(self) -> None:
        check(self, "eval_fraction", 0 < self.eval_fraction < 1, "must be between 0 and 1")
        at_least(self, 2, "sequence_length")
        self.paths()

    def paths(self) -> list[Path]:
        """The files of `data_path`, none without it. Raises ValueError if there are no such files."""
        pattern = os.path.expanduser(self.data_path or "")
        where = f"is a folder; name its files, such as {os.path.join(pattern, '**/*.jsonl')}"
        check(self, "data_path", not os.path.isdir(pattern), where)
        found = [Path(name) for name in sorted(glob(pattern, recursive=True)) if os.path.isfile(name)]
        check(self, "data_path", bool(found) or self.data_path is None, "no such files")
        return found


@dataclass(frozen=True)
class RecipeArguments:
    """Layer dropout and early-exit loss; 0 disables layer_dropout or early_exit_scale."""

    layer_dropout: float = 0.1
    """Probability that a sample skips the last layer; it falls to 0 at the first layer."""
    dropout_schedule: Literal["constant", "exponential"] = "constant"
    """exponential: the probability rises from 0 over the training, for a new model."""
    early_exit_scale: float = 0.2
    """Weight of the losses of early exits; 0: train the last layer only."""
    exit_loss: Literal["label", "distill"] = "label"
    """label: early exits learn the next token, by the paper's weights, which are very small for the first;
    distill: they learn the distribution of the last layer, and early_exit_scale is divided evenly."""
    curriculum: Literal["rotational", "gradual"] = "rotational"
    """Exits that learn at a step: every --rotation-th, or more and more from the last down."""
    rotation: int = 8
    """Rotational curriculum: one of this many exits learns at a step; 1: all learn."""
    exits: list[int] | None = None
    """Exit layers that learn (default: all)."""

    def __post_init__(self) -> None:
        check(self, "layer_dropout", 0 <= self.layer_dropout <= 1, "must be between 0 and 1")
        check(self, "early_exit_scale", self.early_exit_scale >= 0, "must be 0 or more")
        at_least(self, 1, "rotation")

    def exit_layers(self, num_layers: int) -> list[int]:
        """The exits that learn; raises ValueError if the model lacks one of them, or has one layer."""
        if num_layers < 2:
            raise ValueError("model: has no layer to exit from before the last")
        if self.early_exit_scale == 0:
            return []
        exits = self.exits or range(1, num_layers)
        known = all(1 <= exit < num_layers for exit in exits)
        allowed = f"must be between 1 and {num_layers - 1}, the last layer learns anyway"
        check(self, "exits", known, allowed)
        return sorted(set(exits))


@dataclass(frozen=True)
class OptimizationArguments:
    """How long and how fast to train, and how often to evaluate and save."""

    num_steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 4
    """Samples per pass and rank."""
    gradient_accumulation: int = 1
    """Passes per step."""
    learning_rate: float = 8e-4
    """The highest learning rate; it falls along a cosine to a tenth."""
    warmup_steps: int = 100
    """Steps in which the learning rate rises from 0."""
    weight_decay: float = 0.1
    """Weight decay of AdamW."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    lora_rank: int = 0
    """Train a LoRA adapter of this rank instead of all weights, and merge it at the end (0: all weights)."""
    eval_steps: int = 250
    """Steps between evaluations; there are two more, before the first step and after the last one."""
    eval_samples: int = 64
    """Held-out samples of each evaluation at most."""
    save_steps: int = 250
    """Steps between checkpoints; the last two are kept."""
    resume: str | None = None
    """Folder of an interrupted training to resume."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_steps", "batch_size", "gradient_accumulation")
        at_least(self, 1, "eval_steps", "eval_samples", "save_steps")
        at_least(self, 0, "warmup_steps", "weight_decay", "lora_rank")
        short = self.warmup_steps < self.num_steps
        check(self, "warmup_steps", short, f"must be below --num_steps {self.num_steps}")
        check(self, "learning_rate", self.learning_rate > 0, "must be above 0")


def is_sharded() -> bool:
    """Whether accelerate's config has FSDP; `accelerate launch` sets this variable."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


class Flags(NamedTuple):
    """All flags of train.py."""

    model: ModelArguments
    data: TrainingDataArguments
    recipe: RecipeArguments
    optimization: OptimizationArguments
