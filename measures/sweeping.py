"""The work of sweep.py: measure every cell of the grid, or predict all of them from one pass per example.

A cell is an exit layer and a draft length.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas
import torch
from transformers import LogitsProcessorList

from measures import metrics
from measures.comparison import with_end
from measures.plots import heat_maps
from measures.replay import Cell, Costs, costs_of, replayed
from measures.timed_runs import BASELINE, TimedSide, measure_all, warm_up
from runs.examples import Experiment
from runs.failures import failed
from runs.records import Record, Run, counted, fewest_threads, heading, note
from runs.startup import autoregressive
from runs.status import log_if_slow
from self_speculation import Request
from self_speculation.decoding.request import config_processors
from self_speculation.drafts.registry import make_drafter
from self_speculation.families import context_length
from self_speculation.passes.model_runner import ModelRunner

COLUMNS = [
    "mode", "exit_layer", "num_speculations", "draft_weights", "speedup", "speedup_low", "speedup_high",
    "tokens_per_second", "tokens_per_second_median", "total_time", "num_tokens", "acceptance_rate",
    "mean_accepted_length", "num_verifications", "num_drafted", "num_accepted",
]  # fmt: skip

HEADINGS = {
    "mode": "mode", "exit_layer": "exit", "num_speculations": "drafted", "acceptance_rate": "accepted",
    "mean_accepted_length": "length", "tokens_per_second_median": "tokens/s", "speedup": "speed-up",
    "speedup_low": "from", "speedup_high": "to",
}  # fmt: skip

_ROWS_SHOWN = 20
# A predicted sweep measures rounds of these draft lengths and of the longest one, at three exits, on a few
# tokens of a few prompts. Captured passes have widths of powers of two.
_LENGTHS, _TOKENS, _PROMPTS = (1, 3, 7, 15), 24, 3


@dataclass
class Sweep(Experiment):
    """Measures single cells and shows the results, for both modes."""

    grid: Sequence[Cell]
    verify_top: int  # of the best predicted cells, so many are measured

    mode = ""

    def __post_init__(self) -> None:
        self._plain: TimedSide = (BASELINE, *autoregressive(self.generator, self.config))
        self._timed: list[Record] = []

    def warm_up(self) -> None:
        """Warm up plain decoding; `measure_cell` warms up its cell."""
        with log_if_slow("warming up"):
            warm_up([self._plain], self.longest_prompt, self.batch_size)

    def measure_cell(self, cell: Cell) -> Record:
        """All examples by this cell and by plain decoding, in turn."""
        records = self._time(cell, self.requests(range(len(self.examples))))
        threads = fewest_threads(records, torch.get_num_threads())
        return {**_row("measured", cell, records), "threads": threads}

    def _time(self, cell: Cell, requests: Mapping[int, Request], **settings: Any) -> list[Record]:
        """Records of requests by this cell and by plain decoding, in turn."""
        _, plain, plain_config = self._plain
        config = replace(self.config, exit_layer=cell[0], num_speculations=cell[1], **settings)
        sides = [("", self.generator, config), (BASELINE, plain, replace(plain_config, **settings))]
        warm_up(sides, max((request.ids for request in requests.values()), key=len), self.batch_size)
        records = measure_all(sides, requests, self.batch_size)
        self._timed += records
        return records

    def show(self, run: Run, records: list[Record], rows: list[Record], extra: Record) -> int:
        """Write table and pictures; print the table, the best cell and its flags."""
        table = pandas.DataFrame([{"draft_weights": self.config.draft_weights, **row} for row in rows])
        table = table.reindex(columns=COLUMNS).sort_values(COLUMNS[:3])
        table = table.astype(dict.fromkeys(("speedup", "speedup_low", "speedup_high"), float))
        run.replace("sweep.csv", table.to_csv(index=False))
        # A cell may be both predicted and measured: measured rows come first.
        compared = table.dropna(subset="speedup").sort_values(["mode", "speedup"], ascending=[True, False])
        if compared.empty:
            run.finish(records, {**extra, "best": None})
            print(f"no answers to compare: all are empty\n\n{run.folder}/: sweep.csv, run.json")
            return 0
        first = compared.astype(object).iloc[0]
        cell = first[["exit_layer", "num_speculations"]].to_dict()
        best = {**cell, "speedup": first["speedup"]}
        which = "" if first["mode"] == self.mode else f"{first['mode']} "
        title = heading(run.description, left_out=("exit_layer", "num_speculations"))
        answered = f"{counted(len(self.examples), 'prompt')}, whole answers with prefill"
        cells = compared[compared["mode"] == self.mode]
        framed = tuple(cell.values()), f"best {which}speed-up"
        measured = best["speedup"] if which else None
        heat_maps(cells, self.mode, framed, f"{title}\n{answered}", run.folder / "sweep", measured)
        run.finish(records, {**extra, "best": best})
        print(f"{title}\n\n{answered}; medians, from and to are the 90 % confidence interval")
        shown = compared.head(_ROWS_SHOWN)[[*HEADINGS]].rename(columns=HEADINGS)
        print(shown.to_string(index=False, float_format="{:.2f}".format, na_rep="-"))
        if len(table) > _ROWS_SHOWN:
            print(f"... and {len(table) - _ROWS_SHOWN} more in the CSV")
        interval = first["speedup_low"], first["speedup_high"]
        for remark in metrics.undecided(None if pandas.isna(interval[0]) else interval, "prompts"):
            print(f"\n{note(remark)}")
        print(f"\n{run.folder}/: {', '.join(sorted(path.name for path in run.folder.iterdir()))}")
        if best["speedup"] < 1:
            print(f"no {which}cell is faster than decoding without drafts; the nearest:")
        flags = {"generation_strategy": self.config.generation_strategy, **cell}
        flags |= {"draft_weights": self.config.draft_weights}
        print(" ".join(f"--{name} {value}" for name, value in flags.items() if value != "exact"))
        return 0


class Measured(Sweep):
    """Measures every cell; a record is a cell."""

    mode, unit = "measured", "cells"

    @property
    def num_records(self) -> int:
        return len(self.grid)

    def name(self, index: int) -> str:
        return _name(self.grid[index])

    def measure(self, index: int) -> Record:
        return self.measure_cell(self.grid[index])

    def conclude(self, run: Run, records: list[Record]) -> int:
        return self.show(run, records, records, {})


class Predicted(Sweep):
    """Generates each example once and replays the rounds of every cell; a record is an example."""

    mode = "predicted"

    @property
    def _exit_layers(self) -> list[int]:
        return sorted({layer for layer, _ in self.grid})

    @torch.inference_mode()
    def measure(self, index: int) -> Record:
        """One output, and for every exit layer of the grid a string of 1 (guessed right) and 0."""
        _, plain, config = self._plain
        prompt = self.examples[index].ids
        result = plain.generate(self.examples[index].request(), config).generation_strategy_result
        tokens = with_end(result)
        model = self.generator.model
        ids = torch.tensor([[*prompt, *tokens]], device=model.device)
        expected = ids[0, len(prompt) :]  # [n]
        runner = ModelRunner(model)
        cache = runner.new_cache(ids.shape[1], ids.shape[1])
        drafter = make_drafter(runner, self.config, self._exit_layers[-1])
        processors = LogitsProcessorList(config_processors(self.config, len(prompt)))
        matches = {}
        hidden, done = drafter.embed(ids[:, :-1]), 0
        for layer in self._exit_layers:
            hidden, done = drafter.run_layers(cache, hidden, done, layer), layer
            logits = drafter.logits(hidden, len(tokens))[0]  # [n, V]
            if processors:
                rows = enumerate(logits.float().split(1))
                logits = torch.cat([processors(ids[:, : len(prompt) + i], row) for i, row in rows])
            matches[str(layer)] = "".join(map(str, (logits.argmax(-1) == expected).int().tolist()))
        return {
            "tokens": tokens,
            "num_prompt_tokens": len(prompt),
            "num_tokens": len(result.predicted_tokens),
            "max_tokens": min(self.config.max_steps, context_length(model.config) - len(prompt)),
            "matches": matches,
            "prefill_time": result.prefill_time,
            "decode_time": result.decode_time,
        }

    def conclude(self, run: Run, records: list[Record]) -> int:
        with log_if_slow("measuring costs of rounds"):
            costs = self._costs(records)
        cells = ((cell, [replayed(record, costs, cell) for record in records]) for cell in self.grid)
        predicted = [_row("predicted", *cell) for cell in cells]
        verified, known = [], [row for row in predicted if row["speedup"] is not None]
        for row in sorted(known, key=lambda row: -row["speedup"])[: self.verify_top]:
            cell = row["exit_layer"], row["num_speculations"]
            try:
                verified.append(self.measure_cell(cell))
            except Exception as error:
                raise failed(_name(cell), error, self.batch_size) from error
            measured = verified[-1]["speedup"] or 0.0
            print(f"{_name(cell)}: {row['speedup']:.2f} predicted, {measured:.2f} measured")
        about = run.description
        about["threads_used"] = fewest_threads(self._timed, about["threads_used"])
        return self.show(run, records, [*predicted, *verified], {"costs": costs})

    def _costs(self, records: list[Record]) -> Costs:
        """The costs of real rounds around the middle of the longest outputs."""
        requests = {}
        for record in sorted(records, key=lambda record: -len(record["tokens"]))[:_PROMPTS]:
            index, tokens = record["index"], record["tokens"]
            ids = [*self.examples[index].ids, *tokens[: max(0, (len(tokens) - _TOKENS) // 2)]]
            requests[index] = Request(ids)
        exits, most = self._exit_layers, max(k for _, k in self.grid)
        lengths = {min(length, most) for length in (*_LENGTHS, most)}
        cells = itertools.product({exits[0], exits[len(exits) // 2], exits[-1]}, lengths)
        steps = min(self.config.max_steps, _TOKENS)
        return costs_of({cell: self._time(cell, requests, max_steps=steps) for cell in cells})


def _row(mode: str, cell: Cell, records: Sequence[Record]) -> Record:
    """A cell's row of the table, by records of it and of plain decoding."""
    compared = metrics.speedup(records, BASELINE)
    low, high = compared["speedup_interval"] or (None, None)
    return {
        "mode": mode, "exit_layer": cell[0], "num_speculations": cell[1],
        **metrics.acceptance(records), **metrics.speed(records),
        "speedup": compared["speedup"], "speedup_low": low, "speedup_high": high,
    }  # fmt: skip


def _name(cell: Cell) -> str:
    return f"exit layer {cell[0]}, {cell[1]} drafted"
