"""Speed and text quality of a strategy over a dataset.

    python benchmark.py --dataset human_eval --num_samples 20 --max_steps 128 --sample False
    python benchmark.py --compare True --exit_layer 8 --num_speculations 4 --sample False
    python benchmark.py --batch_size 8 --sample False

Results go to a folder of --output_dir as they come; an interrupted run goes on with --resume FOLDER.
"""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable, Iterator, Sequence

from arguments import (
    BatchArguments,
    DataArguments,
    GenerationConfig,
    MeasurementArguments,
    ModelArguments,
    names_in_compat,
    parse,
    refuse,
    refuse_idle_drafts,
)
from data import Example, mismatch
from runs.tuning import TuningArguments, tuned

Flags = tuple[
    ModelArguments, GenerationConfig, DataArguments, MeasurementArguments, BatchArguments, TuningArguments
]


def flags(argv: Sequence[str] | None = None) -> Flags:
    """The command line; a mistake that can be seen without the model ends the program."""
    groups = (ModelArguments, GenerationConfig, DataArguments, MeasurementArguments, BatchArguments)
    *rest, tuning = parse(__doc__ or "", *groups, TuningArguments, args=argv)
    model_args, config, data_args, args, batch = rest
    config = tuned(config, tuning, argv)
    if args.execute_code and data_args.dataset != "human_eval":
        refuse(f"--execute_code True: only human_eval has programs to run, {data_args.dataset} has none")
    if wrong := mismatch(data_args):
        refuse(wrong)
    if args.compare and config.generation_strategy == "autoregressive":
        config = dataclasses.replace(config, generation_strategy="self_speculative")
    refuse_idle_drafts(config)
    return model_args, config, data_args, args, batch, tuning


if __name__ == "__main__":  # before the imports below, which take seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    flags()

import sys
from typing import Any

from tqdm import tqdm

from measures import metrics
from measures.remarks import lines, on_batch_sizes, on_speedup, on_text, on_throughput
from measures.text_quality import pass_at_1, text_quality
from measures.timed_runs import BASELINE, Question, measure_examples, warm_up
from runs import ranks
from runs.examples import Job, longest_prompt, prepare, run_examples
from runs.records import Record, Run
from runs.startup import autoregressive, know_what_was_written, run
from runs.status import says_if_slow
from self_speculation import HuggingfaceLlamaGenerator
from self_speculation.drafts.costs import Costs


def main(argv: Sequence[str] | None = None) -> int:
    model_args, config, data_args, args, batch, tuning = flags(argv)
    generator, examples, open_run = prepare("benchmark", model_args, config, data_args, args, batch)
    know_what_was_written(generator, tuning)
    bench = Benchmark(generator, config, examples, args, model_args.seed, batch.batch_size)
    bench.warm_up()
    return run_examples(bench, open_run)


class Benchmark(Job):
    """Decodes examples, and sums up speed, acceptance and text quality."""

    def __init__(
        self,
        generator: HuggingfaceLlamaGenerator,
        config: GenerationConfig,
        examples: list[Example],
        args: MeasurementArguments,
        seed: int,
        batch_size: int = 1,
    ) -> None:
        self._examples, self._config, self._args, self._seed = examples, config, args, seed
        self._model, self._tokenizer = generator.model, generator.tokenizer
        self.num_steps, self.batch_size = len(examples), batch_size
        self._sides = [("", generator, config)]
        if args.compare:
            self._sides.append((BASELINE, *autoregressive(generator, config)))

    def warm_up(self) -> None:
        with says_if_slow("warming up"):
            warm_up(self._sides, longest_prompt(self._examples), self.batch_size)

    def records(self, indices: Sequence[int]) -> Iterator[tuple[int, Record]]:
        questions = [Question(index, self._examples[index].prompt, self._seed + index) for index in indices]
        for index, measured in measure_examples(self._sides, questions, self.batch_size):
            yield index, self._record(index, measured)

    def _record(self, index: int, measured: Record) -> Record:
        example = self._examples[index]
        record = {"prompt": example.prompt, "reference": example.reference, **measured}
        if self._args.verbose:
            tqdm.write(f"--- {index}\n{example.prompt}\n--> {record['prediction']}\n", file=sys.stdout)
        return record

    def progress(self, records: Sequence[Record]) -> str:
        if self.batch_size == 1:
            text = f"{metrics.speed(records)['tokens_per_second_median']:.1f} tokens/s"
        else:
            text = f"{metrics.throughput(records)['tokens_per_second']:.1f} tokens/s, all together"
        if "num_verifications" in records[-1]:
            rate = metrics.acceptance(records)["acceptance_rate"]
            text += f", acceptance {_number(rate, '.1%')}"
        return text

    def conclude(self, run: Run, records: list[Record]) -> int:
        summary: Record = {"num_examples": len(records), "batch_size": self.batch_size, "remarks": []}
        for prefix, *_ in self._sides:
            summary |= metrics.speeds(records, self.batch_size, prefix)
        if "num_verifications" in records[0]:
            summary["acceptance"] = metrics.acceptance(records)
        if self._args.compare and self.batch_size == 1:
            summary["comparison"] = metrics.speedup(records, BASELINE) | self._predicted_speedup(records)
            summary["remarks"] += on_speedup(records, BASELINE, summary["comparison"])
        elif self._args.compare:
            summary["comparison"] = metrics.throughput_ratio(records, BASELINE)
            summary["remarks"] += on_throughput(summary["comparison"])
        summary["remarks"] += on_batch_sizes(records)
        predictions = [record["prediction"] for record in records]
        summary["text"] = text_quality(predictions, [record["reference"] for record in records])
        prompts = [record["prompt"] for record in records]
        summary["remarks"] += on_text(predictions, prompts, self._tokenizer)
        if self._args.execute_code and ranks.is_first():
            print("running the programs that the model wrote, each in a process of its own", file=sys.stderr)
            problems = [example.row for example in self._examples]
            summary["text"]["pass_at_1"] = pass_at_1(problems, predictions)
        summary["peak_memory_mib"] = metrics.peak_memory_mib(self._model.device)
        run.finish(records, summary)
        print("\n".join([*_rows(summary), *lines(summary["remarks"])]))
        print(f"\n{run.folder}/: run.json, records.jsonl")
        return 0

    def _predicted_speedup(self, records: Sequence[Record]) -> Record:
        alpha = metrics.token_acceptance(records)
        if self._config.generation_strategy == "adaptive":  # the formula is about one exit and one length
            return {"token_acceptance": alpha, "predicted_decode_speedup": None}
        exit_layer, k = self._config.exit_layer, self._config.num_speculations
        costs = Costs.estimated(
            self._model, exit_layer, self._config.draft_weights, self._config.draft_vocabulary
        )
        return {
            "token_acceptance": alpha,
            "draft_cost_ratio": costs.draft_ratio(exit_layer),
            "predicted_decode_speedup": alpha and metrics.predicted_speedup(alpha, k, exit_layer, costs),
        }


def _rows(summary: Record) -> list[str]:
    """The summary as a table of 68 columns, one column for each strategy."""
    sides = [prefix for prefix in ("", BASELINE) if f"{prefix}throughput" in summary]

    def row(name: str, *values: Any, style: str = ".2f") -> str:
        return f"{name:<36}" + "".join(f"{_number(value, style):>16}" for value in values)

    alone = summary["batch_size"] == 1
    title = f"{summary['num_examples']} examples" + ("" if alone else f", batches of {summary['batch_size']}")
    rows = [row(title, *["this strategy", "autoregressive"][: len(sides)])]
    if "comparison" in summary:
        compared = _comparison_rows if alone else _comparison_rows_of_batches
        rows += compared(summary["comparison"], summary["num_examples"], row)
    for name, of, key, style in _SPEED_ROWS if alone else _SPEED_ROWS_OF_BATCHES:
        rows.append(row(name, *(summary[f"{prefix}{of}"][key] for prefix in sides), style=style))
    if "acceptance" in summary:
        accepted = summary["acceptance"]
        rows.append(row("acceptance rate", accepted["acceptance_rate"], style=".1%"))
        rows.append(row("mean accepted length", accepted["mean_accepted_length"]))
        shares = " ".join(f"{share:.0%}" for share in accepted["rounds_by_accepted"][:8])
        rows.append(f"{'  rounds that accept 1, 2, ... tokens':<36} {shares:>15}")
        for source, counts in accepted["drafts_by_source"].items():
            share = f"{counts['accepted']} of {counts['drafted']}"
            rows.append(row(f"  {source}, {counts['rounds']} rounds: accepted", share))
    for name, value in summary["text"].items():
        rows.append(row(name.replace("_", " "), value))
    rows.append(row("peak memory, MiB", summary["peak_memory_mib"], style=".0f"))
    return rows


# What is said of each strategy, out of which figures of the summary, how.
_SPEED_ROWS = [
    ("tokens/s, prefill included, median", "speed", "tokens_per_second_median", ".2f"),
    ("  all tokens by all time", "speed", "tokens_per_second", ".2f"),
    ("tokens/s, decode, median", "speed", "decode_tokens_per_second_median", ".2f"),
    ("  all tokens by all time", "speed", "decode_tokens_per_second", ".2f"),
    ("ms to first token, median", "speed", "time_to_first_token_ms", ".1f"),
    ("tokens", "speed", "num_tokens", "d"),
    ("empty answers", "speed", "empty_answers", "d"),
]
_SHARED = "speed_shared_with_the_batch"
_SPEED_ROWS_OF_BATCHES = [
    ("tokens/s, all tokens by wall time", "throughput", "tokens_per_second", ".2f"),
    ("of one answer, shared with the batch", _SHARED, "decode_tokens_per_second_median", ".2f"),
    ("ms of a prompt's own pass, median", _SHARED, "time_to_first_token_ms", ".1f"),
    ("seconds, all together", "throughput", "wall_time", ".1f"),
    ("tokens", "throughput", "num_tokens", "d"),
    ("empty answers", "throughput", "empty_answers", "d"),
]


def _comparison_rows(compared: Record, num_examples: int, row: Callable[..., str]) -> list[str]:
    rows = []
    for name, key in (("speed-up, prefill included", "speedup"), ("speed-up, decode", "decode_speedup")):
        rows += _ratio_rows(name, key, compared, row)
    rows.append(row("  what the formula allows, decode", compared["predicted_decode_speedup"]))
    rows.append(row("identical outputs", f"{compared['identical_outputs']} of {num_examples}"))
    return rows


def _comparison_rows_of_batches(compared: Record, num_examples: int, row: Callable[..., str]) -> list[str]:
    rows = _ratio_rows("ratio of throughputs", "throughput_ratio", compared, row, "windows")
    rows.append(row("identical outputs", f"{compared['identical_outputs']} of {num_examples}"))
    return rows


def _ratio_rows(
    name: str, key: str, compared: Record, row: Callable[..., str], parts: str = "examples"
) -> list[str]:
    """A median of paired ratios, and how far it is to be trusted."""
    middle_half = "-".join(f"{q:.2f}" for q in compared[f"{key}_quartiles"][::2])
    return [
        row(f"{name}, median", compared[key]),
        row(f"  middle half of {parts}", middle_half or None),
        row("  faster on", f"{compared[f'{key}_faster']} of {compared[f'{key}_examples']}"),
        row("  of totals", compared[f"{key}_of_totals"]),
    ]


def _number(value: Any, style: str) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else format(value, style)


__getattr__ = names_in_compat(__name__)


if __name__ == "__main__":
    run(main)
