"""Speed and text quality of a strategy over a dataset.

    python benchmark.py --dataset human_eval --num_samples 20 --max_steps 128 --sample False
    python benchmark.py --compare True --exit_layer 8 --num_speculations 4 --sample False
    python benchmark.py --batch_size 8 --sample False

Results go to a folder of --output_dir as they come; an interrupted run goes on with --resume FOLDER.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

from arguments import (
    MAY_DIFFER,
    BatchArguments,
    DataArguments,
    GenerationConfig,
    ModelArguments,
    parse,
    refuse,
    refuse_idle_drafts,
)
from data import mismatch
from runs.tuning import TuningArguments, counts, tuned


@dataclass(frozen=True)
class MeasurementArguments:
    """What to measure and to record."""

    compare: bool = False
    """Decode each prompt self-speculatively and autoregressively, in turn, and report the speed-up."""
    execute_code: bool = field(default=False, metadata=MAY_DIFFER)
    """For pass@1, run the programs that the model wrote for human_eval: code that nobody has checked."""
    resume: str | None = None
    """Folder of an interrupted run to go on with."""
    verbose: bool = field(default=False, metadata=MAY_DIFFER)
    """Print prompts and answers."""


def main(argv: Sequence[str] | None = None) -> int:
    groups = (ModelArguments, GenerationConfig, DataArguments, MeasurementArguments, BatchArguments)
    *rest, tuning = parse(__doc__ or "", *groups, TuningArguments, args=argv)
    model_args, config, data_args, args, batch = rest
    config = tuned(config, tuning, model_args, argv)
    if args.execute_code and data_args.dataset != "human_eval":
        refuse(f"--execute_code True: only human_eval has programs to run, {data_args.dataset} has none")
    if args.execute_code and data_args.chat:
        refuse("--execute_code True: runs what goes on from a prompt, not what answers it; leave --chat out")
    if wrong := mismatch(data_args):
        refuse(wrong)
    if args.compare and config.generation_strategy == "autoregressive":
        config = dataclasses.replace(config, generation_strategy="self_speculative")
    refuse_idle_drafts(config)

    from measures.benchmarking import Benchmark
    from runs.examples import prepare, run_examples

    generator, examples, open_run = prepare(
        "benchmark", model_args, config, data_args, args, batch, counted=counts(tuning.tuned, model_args)
    )
    of_run = (generator, config, examples, model_args.seed, batch.batch_size)
    bench = Benchmark(*of_run, args.compare, args.execute_code, args.verbose)
    bench.warm_up()
    return run_examples(bench, open_run)


if __name__ == "__main__":
    from runs.program import run

    run(main)
