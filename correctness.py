"""Does self-speculative decoding give what autoregressive decoding gives, token by token?

    python correctness.py --sample False --exit_layer 8 --num_speculations 4 --num_samples 50

With --batch_size N, so does a batch what its rows give alone? With --sample True it compares how the first
drafted token is distributed. Exit status 1 where there is a difference that rounding cannot explain.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from arguments import BatchArguments, DataArguments, GenerationConfig, ModelArguments, at_least, parse, refuse
from data import mismatch


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
    """With --sample True: answers drawn by each strategy on each prompt."""

    def __post_init__(self) -> None:
        at_least(self, 1, "sampled_prompts")
        at_least(self, 20, "samples_per_prompt")


def main(argv: Sequence[str] | None = None) -> int:
    groups = (ModelArguments, GenerationConfig, DataArguments, CorrectnessArguments, BatchArguments)
    model_args, config, data_args, args, batch = parse(__doc__ or "", *groups, args=argv)
    if args.reference == "transformers" and not config.greedy:
        refuse("--reference transformers: compares ids, so it needs --sample False")
    if wrong := mismatch(data_args):
        refuse(wrong)
    # A batch may also be compared without drafts.
    no_drafts = batch.batch_size > 1 and config.exit_layer == config.num_speculations == -1
    if config.generation_strategy == "autoregressive" and not no_drafts:
        config = dataclasses.replace(config, generation_strategy="self_speculative")

    from measures.correctness import Distributions, Ids
    from runs.examples import prepare, run_examples

    generator, examples, open_run = prepare("correctness", model_args, config, data_args, args, batch)
    if config.greedy:
        job = Ids(generator, config, examples, model_args.seed, batch.batch_size, args.reference)
        return run_examples(job, open_run)
    print("--sample True: ids differ from run to run, so distributions are compared", file=sys.stderr)
    of_run = (generator, config, examples[: args.sampled_prompts], model_args.seed, batch.batch_size)
    return run_examples(Distributions(*of_run, args.samples_per_prompt), open_run)


if __name__ == "__main__":
    from runs.program import run

    run(main)
