"""Compare decoding with drafts and decoding without drafts, token by token.

    python correctness.py --exit_layer 8 --num_speculations 4 --num_samples 50

Each prompt has a greedy output and, unless --sample False, sampled ones from seeds. With --batch_size N, also
compare a batch with the prompts alone. On a CPU with operators the logits are compared, too, bit by bit. The
exit status is 1 for a difference that rounding cannot explain.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from arguments import SELDOM, GenerationConfig, ModelArguments, RunArguments, parse
from data import DataArguments
from runs.flags import read_examples, validate
from runs.program import run

_SAMPLED = 3  # outputs of each prompt, by different seeds


@dataclass(frozen=True)
class CorrectnessArguments(RunArguments):
    """The reference."""

    reference: Literal["autoregressive", "transformers"] = "autoregressive"
    """transformers: also compare greedy outputs with transformers' `generate`."""


def main(argv: Sequence[str] | None = None) -> int:
    groups = (ModelArguments, GenerationConfig, DataArguments, CorrectnessArguments)
    model_args, config, data_args, args = parse(__doc__ or "", *groups, args=argv, without=SELDOM)
    # Batches may be compared without drafts.
    no_drafts = args.batch_size > 1 and config.exit_layer == config.num_speculations == -1
    if config.generation_strategy == "autoregressive" and not no_drafts:
        config = dataclasses.replace(config, generation_strategy="self_speculative")
    validate(model_args, config)
    examples = read_examples(model_args, data_args, args)

    from measures.correctness import CompareIds
    from runs.examples import run_experiment

    settings = {"reference": args.reference, "num_seeds": 0 if config.greedy else _SAMPLED}
    return run_experiment(
        "correctness", CompareIds, model_args, config, data_args, args, examples, **settings
    )


if __name__ == "__main__":
    run(main)
