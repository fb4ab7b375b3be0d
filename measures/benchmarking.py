"""The work of benchmark.py: decode examples, then print one table of speed, drafts and text quality."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measures import metrics, spec_bench
from measures.plots import paired_ratios
from measures.timed_runs import BASELINE, TimedSide, measure_examples, warm_up
from runs.description import Record, counted, heading, note
from runs.examples import Experiment
from runs.records import Run
from runs.startup import autoregressive
from runs.status import log_if_slow
from self_speculation import Request
from self_speculation.families import context_length

_NAMES = {"": "this strategy", BASELINE: "without drafts"}
_TOTALS_DISAGREE = 1.1  # ratio of the median speed-up and that of totals


@dataclass
class Benchmark(Experiment):
    """Decodes examples, and sums up speed, acceptance and text quality."""

    compare: bool
    answer_file: str | None
    text_quality: bool

    def __post_init__(self) -> None:
        self._sides: list[TimedSide] = [("", self.generator, self.config)]
        if self.compare:
            self._sides.append((BASELINE, *autoregressive(self.generator, self.config)))

    def warm_up(self) -> None:
        with log_if_slow("warming up"):
            prompt = self.longest_prompt
            # Later turns read the answers to earlier ones.
            earlier = max(len(example.later_turns) for example in self.examples) * self.config.max_steps
            warm_up(self._sides, [*prompt, *prompt[:1] * earlier], self.batch_size)

    def next_turn(self, index: int, answers: Sequence[str]) -> Request | None:
        """The next turn of a conversation; None if there is none, or no room for it in the context."""
        request = self.examples[index].next_turn(answers, self.seed + index)
        room = context_length(self.generator.model.config)
        return request if request is not None and len(request.ids) < room else None

    def records(self, indices: Sequence[int]) -> Iterator[tuple[int, Record | Exception]]:
        requests = self.requests(indices)
        for index, record in measure_examples(self._sides, requests, self.batch_size, self.next_turn):
            example = self.examples[index]
            if not isinstance(record, Exception):
                record = {"prompt": example.prompt, "reference": example.reference, **record}
            yield index, record

    def report(self, run: Run, records: list[Record]) -> int:
        summary, title = self._summary(records), heading(run.description)
        summary["remarks"] = self._remarks(summary, records)
        lines = [title, "", *_table(summary)]
        if self.answer_file is not None:
            self._write_answers(run, records, Path(self.answer_file).expanduser().absolute())
        if self.compare and len(ratios := metrics.ratios(records, "", BASELINE)):
            unit, interval = _unit(summary)[:-1], summary["comparison"]["speedup_interval"]
            label = f"speed-up over decoding without drafts: a point for each {unit}"
            paired_ratios(ratios, interval, label, title, run.folder / "benchmark")
        run.finish(records, summary)
        print("\n".join([*lines, *(f"\n{note(remark)}" for remark in summary["remarks"])]))
        print(f"\n{run.listing()}")
        return 0

    def _summary(self, records: list[Record]) -> Record:
        """The figures of `run.json`."""
        summary: Record = {
            "num_examples": len(records),
            "batch_sizes": sorted({record["batch_size"] for record in records}),
            "num_ranks": len({record["rank"] for record in records}),
            "remarks": [],
        }
        for prefix, *_ in self._sides:
            summary[f"{prefix}speed"] = metrics.speed(records, prefix)
        if "drafts" in records[0]:
            summary["acceptance"] = metrics.acceptance(records)
        if self.compare:
            summary["comparison"] = metrics.speedup(records, BASELINE)
        texts = [[record[of] for record in records] for of in ("prediction", "reference")]
        has_references = self.text_quality and any(texts[1])
        summary["text"] = metrics.text_quality(*texts) if has_references else {}
        return summary

    def _remarks(self, summary: Record, records: list[Record]) -> list[str]:
        """Warnings about the figures."""
        found = remarks(summary["comparison"], _unit(summary)) if self.compare else []
        if self.config.is_adaptive and {*summary["acceptance"]["drafts_by_source"]} <= {"none"}:
            found.append("adaptive decoding made no drafts: none was expected to be faster")
        pairs = zip(self.examples, records, strict=True)
        if cut := sum(len(record.get("turns", "1")) <= len(example.later_turns) for example, record in pairs):
            found.append(f"the context has no room for the later turns of {counted(cut, 'conversation')}")
        return found

    def _write_answers(self, run: Run, records: list[Record], path: Path) -> None:
        """Write the answers of each strategy in the format of Spec-Bench."""
        rows = [example.row for example in self.examples]
        for prefix, _, config in self._sides:
            name = path.with_stem(f"{path.stem}-autoregressive") if prefix else path
            model_id = f"{Path(run.description['model']).name}-{config.generation_strategy}"
            run.replace(str(name), spec_bench.answers(rows, records, model_id, prefix))


def remarks(compared: Record, unit: str) -> list[str]:
    """Warnings about a speed-up of `metrics.speedup` that may be noise; `unit` names its windows."""
    median, totals, interval = (compared[f"speedup{of}"] for of in ("", "_of_totals", "_interval"))
    if median is None:
        return ["there is nothing to compare: no example has an answer by both strategies"]
    found = metrics.undecided(interval, unit)
    if max(median / totals, totals / median) > _TOTALS_DISAGREE:
        found.append(f"a few slow or long {unit} dominate the speed-up of totals")
    return found


def _unit(summary: Record) -> str:
    return "examples" if summary["batch_sizes"] == [1] else "windows"


def _table(summary: Record) -> list[str]:
    """The summary in lines of 68 columns, with a column of figures for each strategy."""
    sides = {prefix: summary[f"{prefix}speed"] for prefix in _NAMES if f"{prefix}speed" in summary}
    title, sizes = counted(summary["num_examples"], "example"), summary["batch_sizes"]
    if len(sizes) > 1:  # of a resumed run; the heading has its last one
        title += f", batches of {', '.join(map(str, sizes))}"
    lines = [_line(title, *(_NAMES[prefix] for prefix in sides))]
    if compared := summary.get("comparison"):
        lines += _comparison(compared, summary["num_examples"], _unit(summary))
    several = summary["num_ranks"] > 1
    by_whom = f"{summary['num_ranks']} ranks together" if several else "all tokens by wall time"
    alone = "median answer" if _unit(summary) == "examples" else "beside other rows"
    for name, key, style in (
        (f"tokens/s, {by_whom}", "tokens_per_second", ".2f"),
        (f"  median of {_unit(summary)}" + ", of one rank" * several, "tokens_per_second_median", ".2f"),
        (f"tokens/s, decode, {alone}", "decode_tokens_per_second_median", ".2f"),
        ("ms to first token, median", "time_to_first_token_ms", ".1f"),
        ("seconds" + ", the slowest rank" * several, "total_time", ".1f"),
        ("tokens", "num_tokens", "d"),
        ("empty answers", "empty_answers", "d"),
    ):
        lines.append(_line(name, *(speed[key] for speed in sides.values()), style=style))
    if accepted := summary.get("acceptance"):
        lines += _drafts(accepted)
    return lines + [_line(name.replace("_", " "), value) for name, value in summary["text"].items()]


def _line(name: str, *values: Any, style: str = ".2f") -> str:
    shown = ("-" if v is None else v if isinstance(v, str) else format(v, style) for v in values)
    return f"{name:<36}" + "".join(f"{value:>16}" for value in shown)


def _comparison(compared: Record, num_examples: int, unit: str) -> list[str]:
    lines = [_line(f"speed-up, median of {unit}", compared["speedup"])]
    if compared["speedup_windows"] > 1:
        low, _, high = compared["speedup_quartiles"]
        lines.append(_line(f"  middle half of {unit}", f"{low:.2f}-{high:.2f}"))
    lines.append(_line("  faster on", f"{compared['speedup_faster']} of {compared['speedup_windows']}"))
    lines.append(_line("  of totals", compared["speedup_of_totals"]))
    if unit == "examples":
        lines.append(_line("speed-up, decode, median", compared["decode_speedup"]))
    return [*lines, _line("identical outputs", f"{compared['identical_outputs']} of {num_examples}")]


def _drafts(accepted: Record) -> list[str]:
    shares = " ".join(f"{share:.0%}" for share in accepted["rounds_by_accepted"][:8])
    lines = [
        _line("acceptance rate", accepted["acceptance_rate"], style=".1%"),
        _line("  mean of examples", accepted["acceptance_rate_mean"], style=".1%"),
        _line("mean accepted length", accepted["mean_accepted_length"]),
        f"{'  rounds that accept 1, 2, ... tokens':<36} {shares:>15}",
    ]
    for source, counts in accepted["drafts_by_source"].items():
        if counts["drafted"]:
            name = f"  {source}, {counted(counts['rounds'], 'round')}: accepted"
            lines.append(_line(name, f"{counts['accepted']} of {counts['drafted']}"))
        else:
            lines.append(_line("  rounds without drafts", str(counts["rounds"])))
    return lines
