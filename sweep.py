"""Exit layer x draft length: the whole grid, read off one pass, or measured.

    python sweep.py --num_samples 40 --max_steps 64 --exit_layer_first 2 --exit_layer_last 12
    python sweep.py --mode measured --num_samples 10 --max_steps 64
    python sweep.py --mode measured --num_samples 40 --max_steps 64 --batch_size 8

--exit_layer, --num_speculations and --generation_strategy are ignored: the grid has its own. Predicted mode
generates each example once, at full depth, reads what every exit layer would have guessed, and replays the
rounds of every cell; a calibration tells what they cost. Counts are exact, times are estimates.
"""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Mapping, Sequence

from arguments import (
    BatchArguments,
    DataArguments,
    GenerationConfig,
    ModelArguments,
    SweepArguments,
    names_in_compat,
    parse,
    refuse,
)
from data import Example, mismatch

Flags = tuple[ModelArguments, GenerationConfig, DataArguments, SweepArguments, BatchArguments]


def flags(argv: Sequence[str] | None = None) -> Flags:
    """The command line; a mistake that can be seen without the model ends the program."""
    groups = (ModelArguments, GenerationConfig, DataArguments, SweepArguments, BatchArguments)
    model_args, config, data_args, args, batch = parse(__doc__ or "", *groups, args=argv)
    if batch.batch_size > 1 and args.mode == "predicted":
        refuse(
            f"--batch_size {batch.batch_size}: must be 1 in predicted mode, whose costs are those of one "
            "sequence; --mode measured takes more"
        )
    if wrong := mismatch(data_args):
        refuse(wrong)
    return model_args, config, data_args, args, batch


if __name__ == "__main__":  # before the imports below, which take seconds
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    flags()

import json
import statistics
import time
from typing import Any

import pandas
import torch
from tqdm import tqdm
from transformers import NoRepeatNGramLogitsProcessor

from measures import metrics
from measures.plots import heat_maps
from measures.remarks import lines, on_predictions
from measures.replay import LONGEST_DRAFT, beyond_the_grid, predicted_cell, rivals, speedup_columns, times
from measures.timed_runs import BASELINE, Question, Side, measure_examples, warm_up
from measures.vocabularies import best_with_a_vocabulary, written
from runs import ranks
from runs.examples import OneByOne, longest_prompt, prepare, run_examples
from runs.failures import named
from runs.records import Record, Run
from runs.startup import autoregressive, read_config, run
from runs.status import says_if_slow
from runs.tuning import COUNTS, best_cell
from self_speculation import HuggingfaceLlamaGenerator
from self_speculation.clock import TURNS, measure
from self_speculation.drafts.costs import Costs
from self_speculation.drafts.table import is_replayable, make_drafter
from self_speculation.model.decoder import Decoder, forward_exits
from self_speculation.model.families import context_length
from self_speculation.model.prepared import prepared
from self_speculation.model.quantized_layers import bytes_per_weight, format_of
from self_speculation.model.short_head import ShortHead

COLUMNS = [
    "mode", "exit_layer", "num_speculations", "draft_weights", "draft_vocabulary",
    "acceptance_rate", "mean_accepted_length", "total_time",
    "time_per_token", "tokens_per_second", "tokens_per_second_median", "speedup", "speedup_q1", "speedup_q3",
    "speedup_low", "speedup_high", "speedup_of_totals", "num_verifications", "num_drafted", "num_accepted",
    "num_tokens",
]  # fmt: skip

HEADINGS = {
    "mode": "mode", "exit_layer": "exit", "num_speculations": "drafted", "draft_vocabulary": "ids",
    "acceptance_rate": "accepted",
    "mean_accepted_length": "length", "tokens_per_second_median": "tokens/s", "speedup": "speed-up",
    "range": "from-to",
}  # fmt: skip

_PATIENCE = 30.0  # seconds that a calibration may take, about
_DRAWS = 40  # of what it measured, to see how certain predictions are

Cell = tuple[int, int]  # exit layer, draft length


def main(argv: Sequence[str] | None = None) -> int:
    model_args, config, data_args, args, batch = flags(argv)
    if args.mode == "predicted" and not is_replayable(config):
        refuse("--mode predicted: is about drafts of layers, of one length; use --mode measured")
    if args.mode == "predicted" and not config.greedy:
        _notice("predicted mode is about greedy decoding: --sample False")
        config = dataclasses.replace(config, sample=False)
    # The grid has exit layers and draft lengths of its own; the strategy is the one that uses them.
    config = dataclasses.replace(
        config, generation_strategy="self_speculative", exit_layer=args.exit_layer_first,
        num_speculations=args.num_speculations_first,
    )  # fmt: skip
    model_config = read_config(model_args)
    num_layers = model_config.num_hidden_layers
    last = num_layers - (config.draft_weights == "exact")
    if args.exit_layer_first > last:
        refuse(f"--exit_layer_first {args.exit_layer_first}: must be between 1 and {last}, the grid is empty")
    if args.exit_layer_last > last:
        _notice(f"--exit_layer_last {args.exit_layer_last}: cut to {last}, the model has {num_layers} layers")
    generator, examples, open_run = prepare("sweep", model_args, config, data_args, args, batch, model_config)
    exit_layers = [*args.exit_layers(last)]
    # Of a copy, all layers guess best: they are part of its grid where no end of it was asked for.
    if last == num_layers > exit_layers[-1] and args.exit_layer_last == SweepArguments.exit_layer_last:
        exit_layers.append(last)
    grid = [(e, k) for e in exit_layers for k in args.draft_lengths()]
    kind = Measured if args.mode == "measured" else Predicted
    sweep = kind(generator, config, examples, grid, args, model_args.seed, batch.batch_size)
    sweep.warm_up()
    return run_examples(sweep, open_run)


class Sweep(OneByOne):
    """What both modes share: cells measured for real, and what is shown in the end."""

    def __init__(
        self,
        generator: HuggingfaceLlamaGenerator,
        config: GenerationConfig,
        examples: list[Example],
        grid: list[Cell],
        args: SweepArguments,
        seed: int,
        batch_size: int = 1,
    ) -> None:
        self._generator, self._config, self._examples, self._seed = generator, config, examples, seed
        self._grid, self._args, self.batch_size = grid, args, batch_size
        self.num_steps = len(grid) if args.mode == "measured" else len(examples)
        self._plain: Side = (BASELINE, *autoregressive(generator, config))

    def warm_up(self) -> None:
        """What both modes time; each cell has a warm-up of its own."""
        with says_if_slow("warming up"):
            warm_up([self._plain], longest_prompt(self._examples), self.batch_size)

    def measure_cell(self, cell: Cell, draft_vocabulary: int | None = None) -> Record:
        """All examples by this cell and by the baseline, in turn."""
        vocabulary = draft_vocabulary or self._config.draft_vocabulary
        config = dataclasses.replace(
            self._config, exit_layer=cell[0], num_speculations=cell[1], draft_vocabulary=vocabulary
        )
        sides: list[Side] = [("", self._generator, config), self._plain]
        warm_up(sides, longest_prompt(self._examples), self.batch_size)
        questions = [
            Question(index, example.prompt, self._seed + index)
            for index, example in enumerate(self._examples)
        ]
        records = [record for _, record in measure_examples(sides, questions, self.batch_size)]
        return {
            "mode": "measured",
            "exit_layer": cell[0],
            "num_speculations": cell[1],
            "draft_vocabulary": vocabulary,
            **metrics.acceptance(records),
            **_speed(records),
        }

    def show(self, run: Run, records: list[Record], rows: list[Record], extra: Record) -> int:
        """Write table and pictures, print the table and the best flags."""
        weights = format_of(prepared(self._generator.model), self._config.draft_weights)
        rows = [{**dict.fromkeys(COLUMNS), "draft_weights": weights, **row} for row in rows]
        table = write_table(run, rows)
        compared = table[table["speedup"].notna()]
        if compared.empty:
            run.finish(records, {**extra, "best": None})
            print(f"no answers to compare: all are empty\n\n{run.folder}/: sweep.csv, run.json")
            return 0
        best = best_cell([row for row in rows if row["speedup"] is not None])
        equal = rivals(rows, best)
        of_grid = compared["draft_vocabulary"].isna() | (self._config.draft_vocabulary is not None)
        heat_maps(
            compared[(compared["mode"] == self._args.mode) & of_grid],
            f"{self._args.mode}, {len(self._examples)} prompts, at most {self._config.max_steps} tokens each"
            + (f", batches of {self.batch_size}" if self.batch_size > 1 else ""),
            run.folder / "sweep",
        )
        run.finish(
            records,
            {**extra, "best": {name: best[name] for name in ("exit_layer", "num_speculations", "speedup")}},
        )
        shown = table.sort_values("speedup", ascending=False).head(20)
        print(_for_terminal(shown))
        if len(table) > len(shown):
            print(f"... and {len(table) - len(shown)} more in the CSV")
        print("\n".join(lines(self._remarks(best, equal))))
        print(f"\n{run.folder}/: sweep.csv, sweep.png, sweep.pdf, run.json")
        if best["speedup"] < 1:
            print("no cell is faster than autoregressive decoding; the nearest:")
        print(
            f"--generation_strategy self_speculative --exit_layer {best['exit_layer']} "
            f"--num_speculations {best['num_speculations']}"
            + (f" --draft_weights {weights}" if weights != "exact" else "")
            + (f" --draft_vocabulary {int(vocabulary)}" if (vocabulary := best["draft_vocabulary"]) else "")
        )
        return 0

    def _remarks(self, best: Mapping[str, Any], equal: Sequence[Record]) -> list[str]:
        """What the figures mean, and how sure the choice is."""
        if self.batch_size == 1:
            what = f"speed-up and tokens/s are medians of {len(self._examples)} prompts"
        else:
            what = (
                f"in batches of {self.batch_size}: speed-up and tokens/s are medians of windows of a few "
                "batches"
            )
        parts = "prompts" if self.batch_size == 1 else "windows"
        remarks = [
            f"{what}. From-to holds the speed-up with a confidence of 90 %: of predicted cells, by the noise "
            f"of the calibration; of measured ones, by how the {parts} scatter"
        ]
        if best["speedup_low"] is None:
            remarks.append(
                "too little was measured to say how far noise goes: a calibration of "
                f"fewer than three turns, or fewer than five {parts}"
            )
        if equal:
            cells = ", ".join(f"{row['exit_layer']}/{row['num_speculations']}" for row in equal[:12])
            more = f" and {len(equal) - 12} more" if len(equal) > 12 else ""
            remarks.append(
                f"noise does not tell the best cell from {cells}{more} (exit/drafted), which may be as fast"
            )
        return remarks


def _speed(records: Sequence[Record]) -> Record:
    """Columns of a measured cell."""
    speed, compared = metrics.speed(records), metrics.speedup(records, BASELINE)
    median = "tokens_per_second_median"
    return {
        **times(speed["num_tokens"], speed["total_time"]),
        median: speed[median],
        f"{BASELINE}{median}": metrics.speed(records, BASELINE)[median],
        **speedup_columns(
            *(compared[f"speedup{what}"] for what in ("", "_quartiles", "_interval", "_of_totals"))
        ),
    }


class Measured(Sweep):
    """Runs every cell for real; a record is a cell."""

    unit = "cells"

    def name(self, index: int) -> str:
        return _name(self._grid[index])

    def measure(self, index: int) -> Record:
        return self.measure_cell(self._grid[index])

    def progress(self, records: Sequence[Record]) -> str:
        compared = [record for record in records if record["speedup"] is not None]
        if not compared:
            return "no answers to compare"
        best = max(compared, key=lambda record: record["speedup"])
        return f"best {best['speedup']:.2f}x at {best['exit_layer']}, {best['num_speculations']}"

    def after_each(self, run: Run) -> None:
        write_table(run, list(run.records().values()))

    def conclude(self, run: Run, records: list[Record]) -> int:
        return self.show(run, records, records, {})


class Predicted(Sweep):
    """Replays the rounds of every cell; a record is an example."""

    @torch.inference_mode()
    def measure(self, index: int) -> Record:
        """One output, and for every exit layer of the grid a string of 1 (guessed right) and 0."""
        _, plain, config = self._plain
        prompt = plain.encode(self._examples[index].prompt)
        started = time.perf_counter()
        result = plain.generate(prompt, config).generation_strategy_result
        generated = time.perf_counter()
        tokens = [*result.predicted_tokens]
        if result.end_token_id is not None:
            tokens.append(result.end_token_id)
        model = self._generator.model
        ids = torch.tensor([[*prompt, *tokens]], device=model.device)
        decoder = Decoder(model, ids.shape[1], ids.shape[1])
        expected = ids[0, len(prompt) :]  # [n]
        matches = {}
        drafts = (self._config.draft_weights, self._config.draft_vocabulary)
        drafter = make_drafter(decoder, max(self._exit_layers), *drafts)
        if isinstance(drafter.head, ShortHead):
            drafter.head.follow([{*prompt, *plain.eos_token_ids}])
        for layer, logits in forward_exits(drafter, ids[:, :-1], self._exit_layers, len(tokens)):
            guesses = self._processed(ids, len(prompt), logits[0]).argmax(-1)  # [n]
            matches[str(layer)] = "".join("01"[match] for match in (guesses == expected).tolist())
        return {
            "tokens": tokens,
            "num_prompt_tokens": len(prompt),
            "prompt_ids": sorted(set(prompt)),
            "num_tokens": len(result.predicted_tokens),
            "max_tokens": min(self._config.max_steps, context_length(model.config) - len(prompt)),
            "matches": matches,
            "prefill_time": result.prefill_time,
            "decode_time": result.decode_time,
            "generation_time": generated - started,
            "exits_time": time.perf_counter() - generated,
        }

    def progress(self, records: Sequence[Record]) -> str:
        time_for_exits = sum(r["exits_time"] for r in records) / sum(r["generation_time"] for r in records)
        return f"reading exits takes {time_for_exits:.0%} of generating"

    def conclude(self, run: Run, records: list[Record]) -> int:
        costs = self._costs(records)
        run.replace(COUNTS, json.dumps(written(records)))
        given = {"draft_vocabulary": self._config.draft_vocabulary}
        rows = [predicted_cell(records, costs, *cell) | given for cell in self._grid]
        by_speed = sorted(rows, key=lambda row: -row["speedup"])
        short = self._with_a_vocabulary(records, by_speed, costs)
        if short is not None and short["speedup"] > by_speed[0]["speedup"]:
            rows, by_speed = [*rows, short], [short, *by_speed]
        extra: Record = {
            "with_a_draft_vocabulary": short,
            "calibration": dataclasses.asdict(dataclasses.replace(costs, draws=())),
            "beyond_the_grid": beyond_the_grid(records, costs, self._exit_layers),
        }
        pairs = []
        for row in by_speed[: self._args.verify_top]:
            cell = row["exit_layer"], row["num_speculations"]
            with named(_name(cell)):
                pairs.append((row, self.measure_cell(cell, row["draft_vocabulary"])))
        if pairs:
            print("\n".join([_verified(pairs), *lines(on_predictions(pairs)), ""]))
        print(
            f"Draft lengths up to {LONGEST_DRAFT}, and what a rule that ends each draft at its first mistake "
            f"could reach\n{_beyond(extra['beyond_the_grid'])}\n"
        )
        rows += [measured for _, measured in pairs]
        return self.show(run, records, rows, extra)

    def _with_a_vocabulary(
        self, records: Sequence[Record], by_speed: Sequence[Record], costs: Costs
    ) -> Record | None:
        """The best of these cells with a few rows of the head, which is said; None where that was given
        already, or the head is small.
        """
        if self._config.draft_vocabulary is not None:
            return None
        model = self._generator.model
        bytes_of_head = bytes_per_weight(model, self._config.draft_weights)[1] / model.dtype.itemsize
        short = best_with_a_vocabulary(records, by_speed, costs, model.config.vocab_size, bytes_of_head)
        if short is not None:
            print(
                f"With --draft_vocabulary {short['draft_vocabulary']}, the best of those tried, "
                f"{short['speedup']:.2f} at {short['exit_layer']}/{short['num_speculations']}, "
                f"and {by_speed[0]['speedup']:.2f} with the whole head\n"
            )
        return short

    def _costs(self, records: Sequence[Record]) -> Costs:
        """What rounds cost in the middle of an output of middling length."""
        context = statistics.median(r["num_prompt_tokens"] + len(r["tokens"]) // 2 for r in records)
        longest = max(LONGEST_DRAFT, *(k for _, k in self._grid))
        with tqdm(range(3 * TURNS), desc="calibration, as many turns as it takes") as turns:
            return measure(
                self._generator.model,
                self._config,
                self._exit_layers,
                int(context),
                longest,
                _PATIENCE,
                turns,
                _DRAWS,
            )

    @property
    def _exit_layers(self) -> list[int]:
        return sorted({layer for layer, _ in self._grid})

    def _processed(self, ids: torch.Tensor, prompt_length: int, logits: torch.Tensor) -> torch.Tensor:
        """Logits [n, V] of the output's positions, after the logits processor that drafts go through too."""
        if not self._config.no_repeat_ngram_size:
            return logits
        processor = NoRepeatNGramLogitsProcessor(self._config.no_repeat_ngram_size)
        rows = logits.float().split(1)
        return torch.cat([processor(ids[:, : prompt_length + i], row) for i, row in enumerate(rows)])


def _name(cell: Cell) -> str:
    return f"exit layer {cell[0]}, {cell[1]} drafted"


def write_table(run: Run, rows: Sequence[Record]) -> pandas.DataFrame:
    """The CSV of all rows so far, in the order of the grid."""
    # Rows of a run that began before there were all these columns go on with --resume.
    table = (
        pandas.DataFrame(rows)
        .reindex(columns=COLUMNS)
        .astype({"draft_vocabulary": "Int64"})
        .sort_values(["mode", "exit_layer", "num_speculations", "draft_vocabulary"])
    )
    run.replace("sweep.csv", table.to_csv(index=False))
    return table


def _for_terminal(table: pandas.DataFrame) -> str:
    low, high = (table[f"speedup_{end}"].astype(float).map("{:.2f}".format) for end in ("low", "high"))
    known = (low + "-" + high).where(table["speedup_low"].notna(), "-")
    ids = table["draft_vocabulary"].map(str).where(table["draft_vocabulary"].notna(), "all")
    shown = table.assign(range=known, draft_vocabulary=ids)
    return _plain_text(shown[list(HEADINGS)].rename(columns=HEADINGS))


def _verified(pairs: Sequence[tuple[Record, Record]]) -> str:
    """Predicted cells, beside what was measured of them."""
    cells = [
        {
            "exit": row["exit_layer"],
            "drafted": row["num_speculations"],
            "predicted": row["speedup"],
            "measured": measured["speedup"],
            "tokens/s predicted": row["tokens_per_second_median"],
            "measured ": measured["tokens_per_second_median"],
        }
        for row, measured in pairs
    ]
    return _plain_text(pandas.DataFrame(cells))


def _beyond(cells: Sequence[Record]) -> str:
    names = {
        "exit_layer": "exit", "best_draft_length": "best length", "speedup": "speed-up",
        "oracle_speedup": "stopping each draft at its first mistake would reach",
    }  # fmt: skip
    return _plain_text(pandas.DataFrame(cells).rename(columns=names))


def _plain_text(table: pandas.DataFrame) -> str:
    return table.to_string(index=False, float_format="{:.2f}".format, na_rep="-")


def _notice(text: str) -> None:
    if ranks.rank() == 0:
        print(text, file=sys.stderr)


__getattr__ = names_in_compat(__name__)


if __name__ == "__main__":
    run(main)
