"""What benchmark.py does with its examples: decode them, and print one table of speed, drafts and text."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from measures import metrics, remarks
from measures.text_quality import pass_at_1, text_quality
from measures.timed_runs import BASELINE, TimedSide, measure_examples, warm_up
from runs import ranks
from runs.examples import Job, longest_prompt
from runs.heading import heading
from runs.records import Record, Run
from runs.startup import autoregressive
from runs.status import busy_processor, says_if_slow
from self_speculation.drafts.costs import Costs
from self_speculation.model.traced_runner import trace_at_once


@dataclass
class Benchmark(Job):
    """Decodes examples, and sums up speed, acceptance and text quality.

    Args:
        compare: decode each example autoregressively as well, in turn.
        execute_code: run the answers, which are programs for HumanEval, for pass@1.
        verbose: print prompts and answers.
    """

    compare: bool
    execute_code: bool
    verbose: bool

    def __post_init__(self) -> None:
        self._sides: list[TimedSide] = [("", self.generator, self.config)]
        if self.compare:
            self._sides.append((BASELINE, *autoregressive(self.generator, self.config)))

    def warm_up(self) -> None:
        trace_at_once(self.generator.model)
        with says_if_slow("warming up"):
            warm_up(self._sides, longest_prompt(self.examples), self.batch_size)

    def records(self, indices: Sequence[int]) -> Iterator[tuple[int, Record | Exception]]:
        for index, measured in measure_examples(self._sides, self.requests(indices), self.batch_size):
            yield index, measured if isinstance(measured, Exception) else self._record(index, measured)

    def _record(self, index: int, measured: Record) -> Record:
        example = self.examples[index]
        record = {"prompt": example.prompt, "reference": example.reference, **measured}
        if self.verbose:
            tqdm.write(f"--- {index}\n{example.prompt}\n--> {record['prediction']}\n", file=sys.stdout)
        return record

    def progress(self, records: Sequence[Record]) -> str:
        own = [record for record in records if record["rank"] == ranks.rank()]
        text = f"{metrics.speed(own)['tokens_per_second']:.1f} tokens/s{ranks.alone()}"
        if "num_verifications" in records[-1]:
            text += f", acceptance {_number(metrics.acceptance(own)['acceptance_rate'], '.1%')}"
        return text

    def conclude(self, run: Run, records: list[Record]) -> int:
        summary: Record = {
            "num_examples": len(records),
            "batch_sizes": sorted({record["batch_size"] for record in records}),
            "num_ranks": len({record["rank"] for record in records}),
            "remarks": [],
        }
        for prefix, *_ in self._sides:
            summary[f"{prefix}speed"] = metrics.speed(records, prefix)
        if "num_verifications" in records[0]:
            summary["acceptance"] = metrics.acceptance(records)
        if self.compare:
            summary["comparison"] = metrics.speedup(records, BASELINE) | self._predicted_speedup(records)
            if not self.config.greedy:  # two draws: equal ones would say nothing
                summary["comparison"]["identical_outputs"] = None
            summary["remarks"] = remarks.on_speedup(summary["comparison"], _unit(summary))
        model = self.generator.model
        times = [
            sum(
                record.get(f"{prefix}{name}_time", math.inf)
                for record in records
                for prefix, *_ in self._sides
            )
            for name in ("processor", "wall")
        ]
        if (busy := busy_processor(model, *times)) is not None:
            summary["remarks"].append(busy)
        sources = summary.get("acceptance", {}).get("drafts_by_source") or {}
        if self.config.is_adaptive and sources.keys() <= {"none"}:
            sizes = " and ".join(map(str, summary["batch_sizes"]))
            summary["remarks"].append(
                f"adaptive decoding made no drafts: none promised a gain at batch size {sizes}"
            )
        predictions = [record["prediction"] for record in records]
        summary["text"] = text_quality(predictions, [record["reference"] for record in records])
        if self.execute_code:
            print("running the programs that the model wrote, each in a process of its own", file=sys.stderr)
            summary["text"]["pass_at_1"] = pass_at_1([example.row for example in self.examples], predictions)
        summary["peak_memory_mib"] = metrics.peak_memory_mib(self.generator.model.device)
        run.finish(records, summary)
        print(f"{heading(run.description)}\n")
        print("\n".join([*_table(summary), *remarks.lines(summary["remarks"])]))
        print(f"\n{run.folder}/: run.json, records.jsonl")
        return 0

    def _predicted_speedup(self, records: Sequence[Record]) -> Record:
        """By the formula, which is about single sequences that draft with one exit layer and one length."""
        alpha = metrics.token_acceptance(records)
        if self.batch_size > 1 or self.config.generation_strategy == "adaptive":
            return {"token_acceptance": alpha, "predicted_decode_speedup": None}
        exit_layer, k = self.config.exit_layer, self.config.num_speculations
        drafts = (exit_layer, self.config.draft_weights, self.config.draft_vocabulary)
        costs = Costs.estimated(self.generator.model, *drafts)
        return {
            "token_acceptance": alpha,
            "draft_cost_ratio": costs.draft_ratio(exit_layer),
            "predicted_decode_speedup": alpha and metrics.predicted_speedup(alpha, k, exit_layer, costs),
        }


def _unit(summary: Record) -> str:
    """What a window is."""
    return "examples" if summary["batch_sizes"] == [1] else "windows"


def _table(summary: Record) -> list[str]:
    """The summary in lines of 68 columns, with one column of figures for each strategy."""

    def row(name: str, *values: Any, style: str = ".2f") -> str:
        return f"{name:<36}" + "".join(f"{_number(value, style):>16}" for value in values)

    unit, num_ranks = _unit(summary), summary["num_ranks"]
    sides = [prefix for prefix in ("", BASELINE) if f"{prefix}speed" in summary]
    several, batches = num_ranks > 1, ", ".join(map(str, summary["batch_sizes"]))
    # A run that went on with another batch size has several, of which the heading knows the last.
    title = f"{summary['num_examples']} examples" + (f", batches of {batches}" if "," in batches else "")
    rows = [row(title, *["this strategy", "autoregressive"][: len(sides)])]
    if compared := summary.get("comparison"):
        middle_half = "-".join(f"{quartile:.2f}" for quartile in compared["speedup_quartiles"][::2])
        rows += [
            row(f"speed-up, median of {unit}", compared["speedup"]),
            row(f"  middle half of {unit}", middle_half or None),
            row("  faster on", f"{compared['speedup_faster']} of {compared['speedup_windows']}"),
            row("  of totals", compared["speedup_of_totals"]),
        ]
        if unit == "examples":
            rows.append(row("speed-up, decode, median", compared["decode_speedup"]))
            rows.append(row("  what the formula allows", compared["predicted_decode_speedup"]))
        if (identical := compared["identical_outputs"]) is not None:
            rows.append(row("identical outputs", f"{identical} of {summary['num_examples']}"))
    by_whom = f"{num_ranks} ranks together" if several else "all tokens by wall time"
    alone = "median answer" if unit == "examples" else "beside other rows"
    for name, key, style in (
        (f"tokens/s, {by_whom}", "tokens_per_second", ".2f"),
        (f"  median of {unit}" + (", of one rank" if several else ""), "tokens_per_second_median", ".2f"),
        (f"tokens/s, decode, {alone}", "decode_tokens_per_second_median", ".2f"),
        ("ms to first token, median", "time_to_first_token_ms", ".1f"),
        ("seconds" + (", the slowest rank" if several else ""), "total_time", ".1f"),
        ("tokens", "num_tokens", "d"),
        ("empty answers", "empty_answers", "d"),
    ):
        rows.append(row(name, *(summary[f"{prefix}speed"][key] for prefix in sides), style=style))
    if accepted := summary.get("acceptance"):
        rows.append(row("acceptance rate", accepted["acceptance_rate"], style=".1%"))
        rows.append(row("mean accepted length", accepted["mean_accepted_length"]))
        shares = " ".join(f"{share:.0%}" for share in accepted["rounds_by_accepted"][:8])
        rows.append(f"{'  rounds that accept 1, 2, ... tokens':<36} {shares:>15}")
        for source, counts in accepted["drafts_by_source"].items():
            share = f"{counts['accepted']} of {counts['drafted']}"
            rows.append(row(f"  {source}, {counts['rounds']} rounds: accepted", share))
    rows += [row(name.replace("_", " "), value) for name, value in summary["text"].items()]
    memory = "peak memory, MiB" + (", of rank 0" if several else "")
    rows.append(row(memory, summary["peak_memory_mib"], style=".0f"))
    return rows


def _number(value: Any, style: str) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else format(value, style)
