"""Speed of a strategy over a dataset, and the drafts that are accepted.

    python benchmark.py --dataset human_eval --num_samples 20 --max_steps 128 --sample False
    python benchmark.py --compare True --exit_layer 8 --num_speculations 4 --sample False
    python benchmark.py --batch_size 8 --sample False

Results are written to a folder in --output_dir as they come; --resume FOLDER continues an interrupted run.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from arguments import SELDOM, GenerationConfig, ModelArguments, RunArguments, parse, refuse
from data import DataArguments
from runs.failures import check_writable
from runs.flags import validate
from runs.program import run


@dataclass(frozen=True)
class MeasurementArguments(RunArguments):
    """What to measure and record."""

    compare: bool = False
    """Also decode each prompt without drafts, in turn, and report the speed-up."""
    answer_file: str | None = None
    """Also write the answers to spec_bench in Spec-Bench's format; with --compare True,
    write answers without drafts to a second file beside it."""
    text_quality: bool = False
    """Also compare answers with reference answers: ROUGE, BLEU, exact match and edit distance."""


def main(argv: Sequence[str] | None = None) -> int:
    groups = (ModelArguments, GenerationConfig, DataArguments, MeasurementArguments)
    model_args, config, data_args, args = parse(__doc__ or "", *groups, args=argv, without=SELDOM)
    if args.answer_file is not None:
        if data_args.dataset != "spec_bench":
            refuse(f"--answer_file {args.answer_file}: is a format of spec_bench, not of {data_args.dataset}")
        if args.batch_size > 1:
            refuse(f"--answer_file {args.answer_file}: needs --batch_size 1, it has the time of each answer")
        path = Path(args.answer_file).expanduser()
        check_writable("answer_file", path.parent)
        if path.is_dir():
            refuse(f"--answer_file {args.answer_file}: is a folder, must be a file")
    if args.compare and config.generation_strategy == "autoregressive":
        config = dataclasses.replace(config, generation_strategy="self_speculative")
    validate(model_args, config)

    from measures.benchmarking import Benchmark
    from runs.examples import run_experiment

    settings = {name: getattr(args, name) for name in ("compare", "answer_file", "text_quality")}
    return run_experiment("benchmark", Benchmark, model_args, config, data_args, args, **settings)


if __name__ == "__main__":
    run(main)
