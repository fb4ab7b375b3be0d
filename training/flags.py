"""The flags of train.py besides those of the model. Light: a mistyped flag is answered at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from arguments import MAY_DIFFER, ModelArguments, at_least, check

# What was done before is the beginning of what is done then.
MAY_GROW = {
    "resume": lambda run, was, now: None if isinstance(was, int) and now > was else "it may only grow"
}


@dataclass(frozen=True)
class TrainingDataArguments:
    """What to learn from."""

    data: str = "python_stdlib"
    """python_stdlib: the sources of the running interpreter; else a dataset of the hub, or its folder."""
    data_path: str | None = None
    """Local files instead, as a glob pattern: .jsonl, .csv, .parquet; any other file is one text."""
    text_column: str = "text"
    """Column of the text, unless there are columns prompt and response."""
    eval_fraction: float = 0.05
    """Share of the texts that is held out for evaluation."""
    sequence_length: int = 768
    """Tokens of a sample; the context of a new model."""
    streaming: bool = False
    """Read the dataset of the hub while training, for one that does not fit on the disk."""

    def __post_init__(self) -> None:
        of_hub = self.data_path is None and self.data != "python_stdlib"
        check(self, "streaming", of_hub or not self.streaming, "is for a dataset of the hub, by --data")
        check(self, "eval_fraction", 0 < self.eval_fraction < 1, "must be between 0 and 1")
        at_least(self, 2, "sequence_length")


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
        at_least(self, 257, "vocabulary_size")  # each byte, and the end of a text
        at_least(self, 2, "num_layers")
        at_least(self, 1, "hidden_size", "intermediate_size", "num_heads", "num_kv_heads")
        even = self.hidden_size % (2 * self.num_heads) == 0
        check(self, "hidden_size", even, "must be a multiple of 2 x num_heads")
        shared = self.num_heads % self.num_kv_heads == 0
        check(self, "num_kv_heads", shared, f"must divide --num_heads {self.num_heads}")


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
        check(self, "layer_dropout", 0 <= self.layer_dropout <= 1, "must be between 0 and 1")
        check(self, "early_exit_scale", self.early_exit_scale >= 0, "must be 0 or more")
        at_least(self, 1, "rotation")

    def exit_layers(self, num_layers: int) -> list[int]:
        """Those that learn; raises ValueError where the model has no such exit."""
        if self.early_exit_scale == 0:
            return []
        exits = self.exits or range(1, num_layers)
        known = all(1 <= exit < num_layers for exit in exits)
        allowed = f"must be between 1 and {num_layers - 1}, the last layer learns anyway"
        check(self, "exits", known, allowed)
        return sorted(set(exits))


@dataclass(frozen=True)
class OptimizationArguments:
    """How long and how fast to train, and how often to log, evaluate and save."""

    num_steps: int = field(default=1000, metadata=MAY_GROW)
    """Optimizer steps."""
    batch_size: int = field(default=4, metadata=MAY_DIFFER)
    """Samples per pass and rank."""
    gradient_accumulation: int = field(default=1, metadata=MAY_DIFFER)
    """Passes per step."""
    learning_rate: float = 8e-4
    """The highest; it falls along a cosine to a tenth."""
    warmup_steps: int = 100
    """Steps in which the learning rate rises from 0."""
    weight_decay: float = 0.1
    """Weight decay of AdamW."""
    gradient_checkpointing: bool = field(default=False, metadata=MAY_DIFFER)
    """Recompute activations in the backward pass: less memory, a third more time."""
    offload: bool = field(default=False, metadata=MAY_DIFFER)
    """With --parallel fsdp, keep weights and optimizer in the memory of the CPU between their uses."""
    lora_rank: int = 0
    """Train an adapter (LoRA) of this rank instead of all weights; it is merged into the model in the end."""
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
        at_least(self, 1, "num_steps", "batch_size", "gradient_accumulation")
        at_least(self, 1, "log_steps", "eval_steps", "save_steps", "eval_samples")
        at_least(self, 0, "warmup_steps", "weight_decay", "lora_rank")
        short = self.warmup_steps < self.num_steps
        check(self, "warmup_steps", short, f"must be below --num_steps {self.num_steps}")
        check(self, "learning_rate", self.learning_rate > 0, "must be above 0")


class Flags(NamedTuple):
    """Everything that train.py is told."""

    model: ModelArguments
    shape: NewModelArguments
    data: TrainingDataArguments
    recipe: RecipeArguments
    optimization: OptimizationArguments
