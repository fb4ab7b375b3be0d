"""Compare decoding with drafts and decoding without drafts, token by token.

    python correctness.py --sample False --exit_layer 8 --num_speculations 4 --num_samples 50

With --batch_size N, also compare a batch with its prompts alone. With --sample True, compare distributions of
the first drafted token. The exit status is 1 for a difference that rounding cannot explain.
"""

from __future__ import annotations

if __name__ == "__main__":
    import runs.early  # noqa: F401

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from arguments import NOT_MEASURED, BatchArguments, GenerationConfig, ModelArguments, at_least, parse, refuse
from data import DataArguments
from runs.flags import validate
from runs.program import run


@dataclass(frozen=True)
class CorrectnessArguments:
    """The reference, and the number of samples."""

    resume: str | None = None
    """Folder of an interrupted run to continue."""
    reference: Literal["autoregressive", "transformers"] = "autoregressive"
    """transformers: also compare with its `generate`."""
    sampled_prompts: int = 4
    """With --sample True: prompts for the comparison of distributions."""
    samples_per_prompt: int = 200
    """With --sample True: samples of each strategy for each prompt."""

    def __post_init__(self) -> None:
        at_least(self, 1, "sampled_prompts")
        at_least(self, 20, "samples_per_prompt")


def main(argv: Sequence[str] | None = None) -> int:
    groups = (ModelArguments, GenerationConfig, DataArguments, CorrectnessArguments, BatchArguments)
    model_args, config, data_args, args, batch = parse(
        __doc__ or "", *groups, args=argv, without=NOT_MEASURED
    )
    if args.reference == "transformers" and not config.greedy:
        refuse("--reference transformers: compares ids, so it needs --sample False")
    # Batches may be compared without drafts.
    no_drafts = batch.batch_size > 1 and config.exit_layer == config.num_speculations == -1
    if config.generation_strategy == "autoregressive" and not no_drafts:
        config = dataclasses.replace(config, generation_strategy="self_speculative")
    validate(model_args, config, data_args.chat)

    from measures.correctness import CompareDistributions, CompareIds
    from runs.examples import Experiment, run_experiment
    from runs.status import print_status

    make: Callable[..., Experiment] = partial(CompareIds, reference=args.reference)
    if not config.greedy:
        print_status("--sample True: ids differ from run to run, so distributions are compared")
        numbers = {"num_prompts": args.sampled_prompts, "num_samples": args.samples_per_prompt}
        make = partial(CompareDistributions, **numbers)
    return run_experiment("correctness", make, model_args, config, data_args, args, batch)


if __name__ == "__main__":
    run(main)
