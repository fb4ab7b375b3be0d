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

from arguments import SELDOM, GenerationConfig, ModelArguments, RunArguments, at_least, parse, refuse
from data import DataArguments
from runs.failures import check_writable
from runs.flags import read_examples, validate
from runs.program import run

_SETTINGS = ("compare", "answer_file", "text_quality", "repeats", "rejection_sampling")


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
    repeats: int = 1
    """How often each example is decoded, every time with another seed; then also report the spread."""
    rejection_sampling: bool = False
    """Also report what rejection sampling would have accepted, from the distributions of draft and model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "repeats")


def main(argv: Sequence[str] | None = None) -> int:
    groups = (ModelArguments, GenerationConfig, DataArguments, MeasurementArguments)
    model_args, config, data_args, args = parse(__doc__ or "", *groups, args=argv, without=SELDOM)
    if args.answer_file is not None:
        if data_args.dataset != "spec_bench":
            refuse(f"--answer_file {args.answer_file}: is a format of spec_bench, not of {data_args.dataset}")
        if args.batch_size > 1 or args.repeats > 1:
            needs = "needs --batch_size 1 and --repeats 1, it has the time of each answer"
            refuse(f"--answer_file {args.answer_file}: {needs}")
        path = Path(args.answer_file).expanduser()
        check_writable("answer_file", path.parent)
        if path.is_dir():
            refuse(f"--answer_file {args.answer_file}: is a folder, must be a file")
    if args.compare and config.generation_strategy == "autoregressive":
        config = dataclasses.replace(config, generation_strategy="self_speculative")
    sources = [each for each in dataclasses.fields(config) if each.metadata.get("is_source")]
    drafting = {each.name for each in sources if getattr(config, each.name) != each.default}
    is_fixed = config.generation_strategy == "self_speculative" and drafting == {"exit_layer"}
    if args.rejection_sampling and (config.greedy or not is_fixed):
        needs = "needs --generation_strategy self_speculative with drafts of --exit_layer alone"
        refuse(f"--rejection_sampling True: {needs}, and --sample True")
    validate(model_args, config)
    examples = read_examples(model_args, data_args, args)

    from measures.benchmarking import Benchmark
    from runs.examples import run_experiment

    settings = {name: getattr(args, name) for name in _SETTINGS}
    return run_experiment("benchmark", Benchmark, model_args, config, data_args, args, examples, **settings)


if __name__ == "__main__":
    run(main)
