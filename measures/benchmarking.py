"""The work of benchmark.py: decode examples, then print one table of speed, drafts and text quality."""

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path

from measures import metrics, rejection, spec_bench
from measures.plots import paired_ratios
from measures.timed_runs import BASELINE, TimedSide, measure_examples, warm_up
from runs.description import Record, counted, heading
from runs.examples import Experiment
from runs.records import Run, write_atomically
from runs.startup import autoregressive
from runs.status import log_if_slow
from self_speculation import Request
from self_speculation.models.families import context_length

# Fields of a record that add up over the turns of a conversation.
_ADD_UP = (
    "prediction",
    "tokens",
    "num_tokens",
    "wall_time",
    "num_decode_tokens",
    "prefill_time",
    "drafts",
    "rejection",
)
_NAMES = {"": "this strategy", BASELINE: "without drafts"}
_ABOUT_SPEEDUPS = """The speed-up is the median over {unit} of the ratio of tokens/s of whole answers.
Other lines have other ratios: in sums long answers count more, a median of each
side is not of pairs, and decoding leaves out the first token with the prompt."""


@dataclass
class Benchmark(Experiment):
    """Decodes examples, and sums up speed, acceptance and text quality."""

    compare: bool
    answer_file: str | None
    text_quality: bool
    repeats: int
    rejection_sampling: bool

    def __post_init__(self) -> None:
        self.examples = self.examples * self.repeats  # a repeat's seeds begin where those of the last one end
        self._unit = "examples" if self.batch_size == 1 else "windows"  # of medians
        self._sides: list[TimedSide] = [("", self.generator, self.config)]
        if self.compare:
            self._sides.append((BASELINE, *autoregressive(self.generator, self.config)))

    def records(self, indices: Sequence[int]) -> Iterator[tuple[int, Record | Exception]]:
        if indices:
            prompt = max((example.ids for example in self.examples), key=len)
            # Later turns read the answers to earlier ones.
            earlier = max(len(example.later_turns) for example in self.examples) * self.config.max_steps
            with log_if_slow("warming up"):
                warm_up(self._sides, [*prompt, *prompt[:1] * earlier], self.batch_size)
        requests = deque((index, self.request(index)) for index in indices)
        asked = dict(requests)
        turns = defaultdict[int, list[Record]](list)
        for index, turn in measure_examples(self._sides, requests, self.batch_size):
            if isinstance(turn, Exception):
                yield index, turn
                continue
            if self.rejection_sampling:
                turn["rejection"] = [self._replayed(asked[index], turn)]
            turns[index].append(turn)
            if (request := self._next_turn(index, turns[index])) is not None:
                asked[index] = request
                requests.appendleft((index, request))  # a conversation ends before the next one begins
            else:
                about = {name: getattr(self.examples[index], name) for name in ("prompt", "reference")}
                yield index, {**about, **_joined(turns[index])}

    def _replayed(self, request: Request, answer: Record) -> Record:
        """See `rejection.replay`."""
        tokens = answer["tokens"] + [answer[end] for end in ("end_token_id",) if end in answer]
        model = self.generator.model
        room = context_length(model.config) - len(request.prompt)
        return rejection.replay(model, self.config, request, tokens, min(self.config.max_steps, room))

    def _next_turn(self, index: int, turns: Sequence[Record]) -> Request | None:
        """The next turn of a conversation; None if there is none, or no room for it in the context."""
        example = self.examples[index]
        if len(turns) > len(example.later_turns):
            return None
        ids, thinking = example.encode([turn["prediction"] for turn in turns])
        room = context_length(self.generator.model.config)
        return replace(self.request(index), prompt=ids, thinking=thinking) if len(ids) < room else None

    def report(self, run: Run, records: list[Record]) -> int:
        summary = self._summary(records)
        title = heading(run.description)
        lines = [title, "", *_table(summary, self._unit)]
        if self.answer_file is not None:
            path = Path(self.answer_file).expanduser().absolute()
            rows = [example.row for example in self.examples]
            for prefix, _, config in self._sides:
                model_id = f"{Path(run.description['model']).name}-{config.generation_strategy}"
                answers_path = path.with_stem(f"{path.stem}-autoregressive") if prefix else path
                write_atomically(answers_path, spec_bench.answers(rows, records, model_id, prefix))
        if self.compare and len(ratios := metrics.ratios(records, "", BASELINE)):
            label = f"speed-up over decoding without drafts: a point for each {self._unit[:-1]}"
            interval = summary["comparison"]["speedup_interval"]
            paired_ratios(ratios, interval, label, title, run.folder / "benchmark")
        run.finish(records, summary)
        if self.compare:
            lines += ["", _ABOUT_SPEEDUPS.format(unit=self._unit)]
        print("\n".join([*lines, *(f"\nnote: {remark}" for remark in summary["remarks"])]))
        print(f"\n{run.listing()}")
        return 0

    def _figures(self, records: list[Record]) -> Record:
        """Speed, drafts and speed-up of records."""
        figures = {f"{prefix}speed": metrics.speed(records, prefix) for prefix, *_ in self._sides}
        if "drafts" in records[0]:
            figures["acceptance"] = metrics.acceptance(records)
        if self.compare:
            figures["comparison"] = metrics.speedup(records, BASELINE)
        return figures

    def _summary(self, records: list[Record]) -> Record:
        """The figures of `run.json`, and warnings about them."""
        remarks: list[str] = []
        sizes = sorted({record["batch_size"] for record in records})  # of a resumed run, several
        summary: Record = {"num_examples": len(records), "batch_sizes": sizes, "remarks": remarks}
        summary |= self._figures(records)
        if self.compare:
            remarks += metrics.undecided(summary["comparison"]["speedup_interval"], self._unit)
        if self.repeats > 1:
            size = len(records) // self.repeats
            repeats = (records[start : start + size] for start in range(0, len(records), size))
            summary["repeats"] = [self._figures(repeat) for repeat in repeats]
        if self.text_quality and any(record["reference"] for record in records):
            texts = ([record[of] for record in records] for of in ("prediction", "reference"))
            summary["text"] = metrics.text_quality(*texts)
        pairs = zip(self.examples, records, strict=True)
        if cut := sum(len(record.get("turns", "1")) <= len(example.later_turns) for example, record in pairs):
            remarks.append(f"the context has no room for the later turns of {counted(cut, 'conversation')}")
        return summary


def _joined(turns: Sequence[Record]) -> Record:
    """The record of a conversation; one of several turns has their records as `turns`."""
    if len(turns) == 1:
        return turns[0]
    names = [name for name in turns[0] if name.removeprefix(BASELINE) in _ADD_UP]
    sums = {name: reduce(add, (turn[name] for turn in turns)) for name in names}
    return {**turns[-1], **sums, "turns": turns}


def _table(summary: Record, unit: str) -> list[str]:
    """The summary in lines of 68 columns, with a column of figures for each strategy; `unit`: of medians."""
    sides = {prefix: summary[f"{prefix}speed"] for prefix in _NAMES if f"{prefix}speed" in summary}
    examples = summary["num_examples"]
    repeats = len(summary.get("repeats", [0]))
    title = counted(examples // repeats, "example")
    if repeats > 1:
        title += f", {repeats} times each"
    sizes = summary["batch_sizes"]
    if len(sizes) > 1:  # the heading has the last one
        title += f", batches of {', '.join(map(str, sizes))}"
    lines = [_line(title, *(_NAMES[prefix] for prefix in sides))]
    if compared := summary.get("comparison"):
        lines.append(_line(f"speed-up, median of {unit}", compared["speedup"]))
        if compared["speedup_windows"] > 1:
            low, _, high = compared["speedup_quartiles"]
            lines.append(_line(f"  middle half of {unit}", f"{low:.2f}-{high:.2f}"))
        lines.append(_line("  faster on", f"{compared['speedup_faster']} of {compared['speedup_windows']}"))
        lines.append(_line("identical outputs", f"{compared['identical_outputs']} of {examples}"))
    for name, key in (
        ("tokens/s, all tokens by wall time", "tokens_per_second"),
        (f"  median of {unit}", "tokens_per_second_median"),
        ("tokens/s, decode, median answer", "decode_tokens_per_second_median"),
        ("ms to first token, median", "time_to_first_token_ms"),
    ):
        lines.append(_line(name, *(speed[key] for speed in sides.values())))
    if accepted := summary.get("acceptance"):
        lines.append(_line("acceptance rate", accepted["acceptance_rate"], style=".1%"))
        lines.append(_line("  mean of examples", accepted["acceptance_rate_mean"], style=".1%"))
        if ruled := accepted.get("by_rejection"):
            lines.append(_line("  by rejection sampling", ruled["acceptance_rate"], style=".1%"))
            lines.append(
                _line("of drafted tokens that are reached", ruled["acceptance_rate_reached"], style=".1%")
            )
            lines.append(_line("  by rejection sampling", ruled["mean_of_minima"], style=".1%"))
        lines.append(_line("mean accepted length", accepted["mean_accepted_length"]))
        for source, counts in accepted["drafts_by_source"].items():
            if counts["drafted"]:
                name = f"  {source}, {counted(counts['rounds'], 'round')}: accepted"
                lines.append(_line(name, f"{counts['accepted']} of {counts['drafted']}"))
            else:
                lines.append(_line("  rounds without drafts", str(counts["rounds"])))
    for name, group, key, style in (
        ("speed-up", "comparison", "speedup", ".2f"),
        ("tokens/s, median", "speed", "tokens_per_second_median", ".2f"),
        ("acceptance rate", "acceptance", "acceptance_rate", ".1%"),
    ):
        found = [
            value
            for each in summary.get("repeats", ())
            if (value := each.get(group, {}).get(key)) is not None
        ]
        if found:
            spread = f"{min(found):{style}}-{max(found):{style}}"
            lines.append(_line(f"{name}, of {len(found)} repeats", spread))
    return lines + [_line(name.replace("_", " "), value) for name, value in summary.get("text", {}).items()]


def _line(name: str, *values: float | str | None, style: str = ".2f") -> str:
    shown = ("-" if v is None else v if isinstance(v, str) else format(v, style) for v in values)
    return f"{name:<36}" + "".join(f"{value:>16}" for value in shown)
