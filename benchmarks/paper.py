"""Published results of the LayerSkip checkpoints beside measured ones.

    python benchmarks/paper.py --rows llama2-7B --num_samples 100
    python benchmarks/paper.py --model checkpoints/python-10m --rows human_eval --num_samples 5

benchmarks/paper.csv has the published rows: the paper's, and rows of the authors' post about transformers,
whose defaults draft up to 20 tokens while the draft's probabilities are above 0.4. Here those rows always
draft 20 tokens, so their speed-up is a lower bound. Each row is a run of benchmark.py with --compare True,
greedy, in a separate process. A checkpoint or a dataset that is not at
hand is named, and the other rows run. --resume FOLDER goes on with an interrupted run.

With --model, all rows decode with that model: a rehearsal, which a CPU can do. The exit is at the same share
of the layers.

With --temperature 1 answers are sampled from all tokens, where published rows are greedy. *reject* is then
what rejection sampling would have accepted in the same rounds, see measures/rejection.py.

The columns: *acc* accepted / drafted tokens, as published the mean of examples; *x* the speed-up over
decoding without drafts; *formula* the speed-up by the published acceptance, (1 + k acc) / (1 + k exit /
layers); *len* the mean accepted length; *tok/s* whole answers. The columns with a star are measured
here: speeds are medians, with the 90 % confidence interval. *paper* is the acceptance by the paper's
definition, see paper_rounds.py. --repeats 3 measures each row three times, and --seeds 1 2 3 with each of
these seeds, which choose examples and samples: speeds are then of the median run, *least* and *most* the
slowest and the fastest, and acceptance is the mean. The CSV of the run also has the acceptance rate
of all tokens together, numbers of examples, seeds and machines, with memory, pinning, and the load before.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pandas
import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))

from arguments import ModelArguments, at_least, check, parse, refuse
from benchmarks.bars import bars
from data import DATASETS
from runs.description import Record, describe, machine
from runs.failures import Failed, check_folder
from runs.program import run
from runs.records import Run, write_atomically
from runs.startup import read_config
from runs.status import print_status

PUBLISHED = pandas.read_csv(Path(__file__).with_suffix(".csv"))
PUBLISHED["row"] = [
    f"{model.removeprefix('facebook/layerskip-')} {data.removesuffix('_summarization')}" + " 1-shot" * shots
    for model, data, shots in PUBLISHED[["model", "dataset", "n_shot"]].to_numpy()
]
_COLUMNS = {
    "row": "row", "exit": "exit", "num_speculations": "k", "acceptance": "acc", "measured_acceptance": "acc*",
    "paper_acceptance": "paper*", "rejection_acceptance": "reject*", "mean_accepted_length": "len*",
    "speedup": "x", "formula": "formula", "measured_speedup": "x*", "low": "from", "high": "to",
    "least": "least*", "most": "most*", "tokens_per_second": "tok/s", "measured_tokens_per_second": "tok/s*",
}  # fmt: skip
_FOOTNOTE = """acc* counts as this library drafts: the pass over the prompt gives the first token, and a draft
goes on after an end id. paper* counts as the paper does, over the same prompts: the first token is
drafted too, and a draft stops at an end id."""

# Columns whose values are means over all runs of a row.
_MEANS = [
    "measured_acceptance", "pooled_acceptance", "mean_accepted_length", "rejection_acceptance",
    "paper_acceptance",
]  # fmt: skip
_OF_SAMPLES = """acc* counts what this library accepts; reject* is what rejection sampling would have accepted
in the same rounds."""


@dataclass(frozen=True)
class PaperArguments:
    """Which rows, and on how much data."""

    rows: list[str] = field(default_factory=list)
    """Only rows whose model or dataset contains one of the given texts."""
    repeats: int = 1
    """How often each row is measured with each seed."""
    seeds: list[int] = field(default_factory=list)
    """Seeds to measure each row with; without them, --seed."""
    temperature: float = 0.0
    """Of sampled answers; 0: greedy, as published."""
    num_samples: int | None = None
    """Examples of each row; without it, all."""
    max_steps: int | None = None
    """New tokens at most; without it, as published."""
    data_path: str | None = None
    """Folder of local data: a .jsonl file or a folder for each dataset, by the dataset's name."""
    resume: str | None = None
    """Folder of an interrupted run to continue."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_samples", "max_steps", "repeats")
        at_least(self, 0, "temperature")
        check(self, "seeds", all(0 <= seed < 2**32 for seed in self.seeds), f"must be from 0 to {2**32 - 1}")
        names = ", ".join(pandas.unique(PUBLISHED[["model", "dataset"]].to_numpy().ravel()))
        unknown = [part for part in self.rows if not any(part in name for name in self._named())]
        check(self, "rows", not unknown, f"{', '.join(unknown)} must be a part of one of {names}")

    def chosen(self) -> pandas.DataFrame:
        return PUBLISHED[[not self.rows or any(part in name for part in self.rows) for name in self._named()]]

    def _named(self) -> pandas.Series:
        return PUBLISHED["model"] + " " + PUBLISHED["dataset"]


def main(argv: Sequence[str] | None = None) -> int:
    model_args, args = parse(__doc__ or "", ModelArguments, PaperArguments, args=argv)
    check_folder(model_args.output_dir, args.resume)
    rows = _rows(model_args, args)
    try:
        run = Run.open(model_args.output_dir, args.resume, describe("paper", (model_args, args)))
    except Failed as error:
        refuse(str(error))
    records = []
    try:
        for index, row in rows.iterrows():
            print_status(f"{row['row']} ...")
            seeds = args.seeds or [model_args.seed]
            flags = _flags(row, model_args, args)
            records.append(_repeated(flags, run.folder / f"row{index}", seeds, args.repeats))
            if "not_measured" in records[-1]:
                print_status(f"  not measured: {records[-1]['not_measured']}")
    except KeyboardInterrupt:
        run.write_status("interrupted")
        print_status(f"interrupted, go on with {run.resume_command}")
        return 130
    return _show(run, rows, records, model_args, args.temperature)


def _rows(model_args: ModelArguments, args: PaperArguments) -> pandas.DataFrame:
    """The chosen rows, with the exits to measure and the speed-ups by the formula."""
    rows = args.chosen().reset_index(drop=True)
    k = rows["num_speculations"]
    share = rows["exit_layer"] / rows["layers"]
    rows["formula"] = (1 + k * rows["acceptance"]) / (1 + k * share)
    depth = read_config(model_args).num_hidden_layers if model_args.model else rows["layers"]
    rows["exit"] = (share * depth).round().clip(lower=1).astype(int)
    return rows


def _show(
    run: Run,
    rows: pandas.DataFrame,
    records: list[Record],
    model_args: ModelArguments,
    temperature: float,
) -> int:
    """Write, draw and print the table. The exit status is 1 if no row is measured."""
    table = rows.join(pandas.DataFrame(records))
    table = table.reindex(columns=[*dict.fromkeys((*table, *_COLUMNS, "not_measured"))])
    table = table.astype(dict.fromkeys(list(_COLUMNS)[3:], float))
    machines = dict.fromkeys(record["machine"] for record in records if "machine" in record)
    write_atomically(run.folder / "paper.csv", table.to_csv(index=False))
    run.write_status("finished")
    names = table["row"] + ", exit " + table["exit_layer"].astype(str)
    table.index = names + ", k " + table["num_speculations"].astype(str)
    title = "; ".join(machines)
    if temperature:
        title += f"\nsampled at temperature {temperature:g}, published rows are greedy"
    here = "measured here"
    color = "C2"
    if model_args.model:
        name = Path(model_args.model).name
        color = "silver"
        here = f"a rehearsal with {name} in place of the checkpoints, by the column exit"
        title = f"REHEARSAL with {name}, which is none of the published checkpoints\n{title}"
        table.index += " (rehearsed at exit " + table["exit"].astype(str) + ")"
    drawn = [
        table.assign(by="published", value=table["speedup"], low=None, high=None),
        table.assign(by="by the formula", value=table["formula"], low=None, high=None),
        table.assign(by=here, value=table["measured_speedup"]),
    ]
    label = "speed-up over decoding without drafts"
    bars(pandas.concat(drawn), label, title, run.folder / "paper", colors=("C0", "C1", color))
    print(f"{title}\n* {here}\n")
    unknown = "paper_acceptance" if temperature else "rejection_acceptance"
    shown = table[[name for name in _COLUMNS if name != unknown]].rename(columns=_COLUMNS)
    print(shown.to_string(index=False, float_format="{:.2f}".format, na_rep="-"))
    print(f"\n{_OF_SAMPLES if temperature else _FOOTNOTE}")
    for name, at, why in table[["row", "exit", "not_measured"]].dropna().to_numpy():
        print(f"\nnot measured: {name}, exit {at}: {why}")
    print(f"\n{run.folder}/: run.json, paper.csv, paper.png")
    return 0 if machines else 1


def _flags(row: pandas.Series, model_args: ModelArguments, args: PaperArguments) -> dict[str, Any]:
    """The flags of benchmark.py for a row, but for --output_dir."""
    given = {each.name: getattr(model_args, each.name) for each in fields(model_args)}
    changed = {each.name for each in fields(model_args) if given[each.name] != each.default} - {"output_dir"}
    flags = {
        "model": row["model"],
        **{name: given[name] for name in changed},
        "dataset": row["dataset"],
        "n_shot": row["n_shot"],
        "generation_strategy": "self_speculative",
        "exit_layer": row["exit"],
        "num_speculations": row["num_speculations"],
        "max_steps": args.max_steps or row["max_steps"],
        "num_samples": args.num_samples,
        "sample": args.temperature > 0,
    }
    if args.temperature:
        flags |= {"temperature": args.temperature, "top_p": 1.0}  # fmt: skip
    if args.data_path is not None and not isinstance(DATASETS[row["dataset"]].source, Path):
        path = Path(args.data_path) / row["dataset"]
        flags["data_path"] = path if path.expanduser().is_dir() else path.with_suffix(".jsonl")
    return {name: value for name, value in flags.items() if not pandas.isna(value)}


def _repeated(flags: dict[str, Any], folder: Path, seeds: Sequence[int], repeats: int) -> Record:
    """The figures of the median run of a row, with the spread of speed-ups and means of acceptance; or why
    there are none.
    """
    found = []
    by_paper = []
    for seed in seeds:
        of_seed = {**flags, "seed": seed}
        compared = {**of_seed, "compare": True, "rejection_sampling": flags["sample"]}
        for repeat in range(repeats):
            found.append(_measured(compared, folder / f"seed{seed}_repeat{repeat}"))
            if "not_measured" in found[-1]:
                return found[-1]
        if not flags["sample"]:  # those rounds are greedy
            rounds = _finished("benchmarks/paper_rounds.py", of_seed, folder / f"seed{seed}")
            if "not_measured" in rounds:
                return rounds
            by_paper.append({"paper_acceptance": rounds["metrics"]["paper_acceptance"]})
    acceptance = pandas.DataFrame([*found, *by_paper]).reindex(columns=_MEANS).astype(float).mean()
    found.sort(key=lambda figures: figures["measured_speedup"])
    return {
        **found[len(found) // 2],
        **acceptance,
        "seeds": " ".join(map(str, seeds)),
        "repeats": repeats,
        "least": found[0]["measured_speedup"],
        "most": found[-1]["measured_speedup"],
    }


def _measured(flags: dict[str, Any], folder: Path) -> Record:
    """The figures of a row, or why there are none; goes on with what is in `folder`."""
    load = round(os.getloadavg()[0], 2)
    report = _finished("benchmark.py", flags, folder)
    return report if "not_measured" in report else {**_figures(report), "load": load}


def _finished(program: str, flags: dict[str, Any], folder: Path) -> Record:
    """The run.json of a program, or why it does not end well; goes on with what is in `folder`."""
    name = Path(program).stem
    # A program that was killed early has left a folder without run.json.
    begun = next(folder.glob(f"{name}_*/run.json"), None)
    if begun is not None and (report := json.loads(begun.read_text("utf-8")))["status"] == "finished":
        return report
    given = {**flags, "output_dir": folder} if begun is None else {"resume": begun.parent}
    command = [sys.executable, str(Path(__file__).parent.parent / program)]
    command += [word for name, value in given.items() for word in (f"--{name}", str(value))]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode == 130:
        raise KeyboardInterrupt
    if ended.returncode != 0:
        lines = ended.stderr.splitlines() or [f"{name}.py ended with status {ended.returncode}"]
        return {"not_measured": lines[-1].removeprefix(f"{name}.py: error: ")}
    (done,) = folder.glob(f"{name}_*/run.json")
    return json.loads(done.read_text("utf-8"))


def _figures(report: Record) -> Record:
    metrics = report["metrics"]
    compared = report["metrics"]["comparison"]
    low, high = compared["speedup_interval"] or (None, None)
    pinned = psutil.Process().cpu_affinity() if hasattr(psutil.Process, "cpu_affinity") else []
    return {
        "measured_acceptance": metrics["acceptance"]["acceptance_rate_mean"],
        "rejection_acceptance": metrics["acceptance"].get("by_rejection", {}).get("acceptance_rate"),
        "pooled_acceptance": metrics["acceptance"]["acceptance_rate"],
        "mean_accepted_length": metrics["acceptance"]["mean_accepted_length"],
        "measured_speedup": compared["speedup"], "low": low, "high": high,
        "measured_tokens_per_second": metrics["speed"]["tokens_per_second_median"],
        "examples": metrics["num_examples"], "identical_outputs": compared["identical_outputs"],
        "machine": machine(report), "processor": report["processor"],
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "processors": psutil.cpu_count(), "pinned_to": " ".join(map(str, pinned)),
    }  # fmt: skip


if __name__ == "__main__":
    run(main)
