"""Compare decoding with drafts and decoding without drafts, token by token.

    python correctness.py --exit_layer 8 --num_speculations 4 --num_samples 50

Each prompt has a greedy output and, unless --sample False, sampled ones from seeds. With --batch_size N, also
compare a batch with its prompts alone. On a CPU with operators the logits are compared, too, bit by bit. The
exit status is 1 for a difference that rounding cannot explain.
"""

from __future__ import annotations

if __name__ == "__main__":
    import runs.early  # noqa: F401

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from arguments import NOT_MEASURED, BatchArguments, GenerationConfig, ModelArguments, at_least, parse
from data import DataArguments
from runs.flags import validate
from runs.program import run


@dataclass(frozen=True)
class CorrectnessArguments:
    """The reference, and the number of sampled outputs."""

    resume: str | None = None
    """Folder of an interrupted run to continue."""
    reference: Literal["autoregressive", "transformers"] = "autoregressive"
    """transformers: also compare greedy outputs with its `generate`."""
    samples_per_prompt: int = 3
    """With --sample True: sampled outputs of each prompt, each by a seed of its own."""

    def __post_init__(self) -> None:
        at_least(self, 1, "samples_per_prompt")


def main(argv: Sequence[str] | None = None) -> int:
    groups = (ModelArguments, GenerationConfig, DataArguments, CorrectnessArguments, BatchArguments)
    model_args, config, data_args, args, batch = parse(
        __doc__ or "", *groups, args=argv, without=NOT_MEASURED
    )
    # Batches may be compared without drafts.
    no_drafts = batch.batch_size > 1 and config.exit_layer == config.num_speculations == -1
    if config.generation_strategy == "autoregressive" and not no_drafts:
        config = dataclasses.replace(config, generation_strategy="self_speculative")
    validate(model_args, config, data_args.chat)

    from measures.correctness import CompareIds
    from runs.examples import run_experiment

    num_seeds = 0 if config.greedy else args.samples_per_prompt
    make = partial(CompareIds, reference=args.reference, num_seeds=num_seeds)
    return run_experiment("correctness", make, model_args, config, data_args, args, batch)


if __name__ == "__main__":
    run(main)
