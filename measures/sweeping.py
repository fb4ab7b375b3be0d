"""The work of sweep.py. A cell is an exit layer and a draft length.

Every other prompt chooses three cells, and the remaining ones tell how fast they are: the best of many
measured speed-ups is partly luck.

Along a fixed greedy output, exit layer E drafts, after any accepted prefix, the argmax of the exit's logits
with the output as input. So the list of output tokens that E guesses decides every round, for every draft
length.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pandas
import torch
from transformers import LogitsProcessorList

from measures import metrics
from measures.comparison import with_end
from measures.plots import heat_maps
from measures.timed_runs import BASELINE, TimedSide, measure_all, warm_up
from runs.description import Record, counted, fewest_threads, heading
from runs.examples import Experiment
from runs.records import Run, write_atomically
from runs.startup import autoregressive
from self_speculation.backends.runners import eager_runner
from self_speculation.drafts.costs import draft_ratio, relative_pass_cost
from self_speculation.drafts.registry import DraftContext
from self_speculation.models.families import context_length
from self_speculation.requests.request import config_processors
from self_speculation.requests.results import DraftStats

Cell = tuple[int, int]  # exit layer, draft length

COLUMNS = [
    "exit_layer", "num_speculations", "draft_weights", "num_verifications", "num_drafted", "num_accepted",
    "acceptance_rate", "acceptance_rate_mean", "mean_accepted_length", "speedup", "speedup_low",
    "speedup_high", "tokens_per_second", "tokens_per_second_median", "total_time", "time_per_token",
    "num_tokens", "measured",
]  # fmt: skip

HEADINGS = {
    "exit_layer": "exit", "num_speculations": "drafted", "acceptance_rate": "accepted",
    "mean_accepted_length": "length", "tokens_per_second_median": "tokens/s", "speedup": "speed-up",
    "speedup_low": "from", "speedup_high": "to",
}  # fmt: skip

_CHOSEN = 3  # cells


@dataclass
class Sweep(Experiment):
    """Measures single cells and shows the results, for both modes."""

    grid: Sequence[Cell]

    def __post_init__(self) -> None:
        self._plain: TimedSide = (BASELINE, *autoregressive(self.generator, self.config))

    @property
    def halves(self) -> tuple[Sequence[int], Sequence[int]]:
        """The indices of the examples that choose cells, and of the examples that confirm them; a single
        example does both.
        """
        every = range(len(self.examples))
        return every[::2], every[1::2] or every

    def timed(self, cell: Cell, indices: Sequence[int], title: str | None = None) -> list[Record]:
        """Records of examples by this cell and by plain decoding, in turn; with a title, a bar at a
        terminal.
        """
        config = replace(self.config, exit_layer=cell[0], num_speculations=cell[1])
        sides = [("", self.generator, config), self._plain]
        warm_up(sides, max((example.ids for example in self.examples), key=len), self.batch_size)
        requests = {index: self.request(index) for index in indices}
        return measure_all(sides, requests, self.batch_size, title)

    def show(self, run: Run, records: list[Record], rows: Mapping[Cell, Record], chosen: list[Cell]) -> int:
        """Write table and pictures; print the measured cells, and the flags of the best one that was
        chosen.
        """
        about = run.description
        about["threads_used"] = fewest_threads(rows.values(), about["threads_used"])
        table = pandas.DataFrame(
            {"draft_weights": self.config.draft_weights, **row, "measured": "speedup" in row}
            for row in rows.values()
        )
        table = table.reindex(columns=COLUMNS).sort_values(COLUMNS[:2])
        table = table.astype(dict.fromkeys(("speedup", "speedup_low", "speedup_high"), float))
        write_atomically(run.folder / "sweep.csv", table.to_csv(index=False))
        measured = table.dropna(subset="speedup").sort_values("speedup", ascending=False)
        if measured.empty:
            run.finish(records, {"best": None})
            print(f"no answers to compare: all are empty\n\n{run.listing()}")
            return 0
        is_chosen = pandas.MultiIndex.from_frame(measured[COLUMNS[:2]]).isin(chosen)
        measured = pandas.concat([measured[is_chosen], measured[~is_chosen]])
        first = measured.astype(object).iloc[0]
        best = first[["exit_layer", "num_speculations", "speedup"]].to_dict()
        interval = first["speedup_low"], first["speedup_high"]
        remarks = metrics.undecided(None if pandas.isna(interval[0]) else interval, "prompts")
        run.finish(records, {"best": None if remarks else best})
        title = heading(about, left_out=("exit_layer", "num_speculations"))
        choosing, confirming = (counted(len(half), "prompt") for half in self.halves)
        answered = f"cells chosen on {choosing}, measured on {confirming}: whole answers with prefill"
        heat_maps(table, f"{title}\n{answered}", run.folder / "sweep")
        print(f"{title}\n\n{answered};\nmedians, from and to are the 90 % confidence interval")
        shown = measured[[*HEADINGS]].rename(columns=HEADINGS)
        print(shown.to_string(index=False, float_format="{:.2f}".format, na_rep="-"))
        if (rest := len(table) - len(shown)) > 0:
            print(f"{counted(rest, 'other cell')}: counts in sweep.csv and sweep.png")
        print(f"\n{run.listing()}")
        if remarks:
            print(f"no cell is recommended: {remarks[0]}; take more, by --num_samples")
            return 0
        if best.pop("speedup") < 1:
            print("no measured cell is faster than decoding without drafts; the nearest:")
        flags = {"generation_strategy": self.config.generation_strategy, **best}
        flags |= {"draft_weights": self.config.draft_weights}
        print(" ".join(f"--{name} {value}" for name, value in flags.items() if value != "exact"))
        return 0


class Measured(Sweep):
    """Measures every cell; a record is a cell."""

    unit = "cell"

    @property
    def names(self) -> Sequence[str]:
        return [*map(_name, self.grid)]

    def measure(self, index: int) -> Record:
        cell = self.grid[index]
        choosing, confirming = (self.timed(cell, half) for half in self.halves)
        counts = _counts(cell, [*choosing, *confirming])
        return {**counts, **_speeds(confirming), "speedup_of_choice": _speeds(choosing)["speedup"]}

    def report(self, run: Run, records: list[Record]) -> int:
        rows = dict(zip(self.grid, records, strict=True))
        chosen = sorted(self.grid, key=lambda cell: rows[cell]["speedup_of_choice"] or 0.0, reverse=True)
        return self.show(run, records, rows, chosen[:_CHOSEN])


class Counted(Sweep):
    """Counts the rounds of every cell from one pass over each example, and measures the best few cells; a
    record is an example.
    """

    @torch.inference_mode()
    def measure(self, index: int) -> Record:
        """One output, and for every exit layer of the grid a string of 1 (guessed right) and 0."""
        _, plain, config = self._plain
        prompt = self.examples[index].ids
        result = plain.generate(self.request(index), config).generation_strategy_result
        tokens = with_end(result)
        model = self.generator.model
        ids = torch.tensor([[*prompt, *tokens]], device=model.device)
        expected = ids[0, len(prompt) :]  # [n]
        runner = eager_runner(model)
        cache = runner.new_cache(ids.shape[1], ids.shape[1], dtype=self.config.cache_dtype)
        exit_layers = sorted({layer for layer, _ in self.grid})
        draft_runner = DraftContext(runner, replace(self.config, exit_layer=exit_layers[-1])).draft_runner
        processors = LogitsProcessorList(config_processors(self.config, len(prompt)))
        matches = {}
        hidden = draft_runner.embed(ids[0, :-1])
        done = 0
        for layer in exit_layers:
            hidden = draft_runner.run_layers(cache, hidden, [len(hidden)], done, layer)
            done = layer
            logits = draft_runner.logits(hidden[-len(tokens) :])  # [n, V]
            if processors:
                rows = enumerate(logits.float().split(1))
                logits = torch.cat([processors(ids[:, : len(prompt) + i], row) for i, row in rows])
            matches[str(layer)] = "".join(map(str, (logits.argmax(-1) == expected).int().tolist()))
        room = context_length(model.config) - len(prompt)
        return {"tokens": tokens, "matches": matches, "max_tokens": min(self.config.max_steps, room)}

    def report(self, run: Run, records: list[Record]) -> int:
        rows = {}
        choosing = {}
        for cell in self.grid:
            replayed = [_replayed(record, cell) for record in records]
            rows[cell] = _counts(cell, replayed)
            choosing[cell] = _counts(cell, [replayed[index] for index in self.halves[0]])
        chosen = self._fastest(choosing)
        for cell in chosen:
            rows[cell] |= _speeds(self.timed(cell, self.halves[1], _name(cell)))
        return self.show(run, records, rows, chosen)

    def _fastest(self, rows: Mapping[Cell, Record]) -> list[Cell]:
        """The cells with the most tokens per time, by the costs that adaptive decoding begins with."""
        model = self.generator.model
        weights = self.config.draft_weights
        cost = relative_pass_cost(eager_runner(model))
        size = self.batch_size

        def speed(cell: Cell) -> float:
            exit_layer, k = cell
            draft = k * draft_ratio(model, exit_layer, weights) * cost(size)
            return (rows[cell]["mean_accepted_length"] or 0.0) / (draft + cost(size * (1 + k)))

        return sorted((cell for cell in rows if speed(cell)), key=speed, reverse=True)[:_CHOSEN]


def _counts(cell: Cell, records: Sequence[Record]) -> Record:
    """The counts of a cell's drafts in the records."""
    return {"exit_layer": cell[0], "num_speculations": cell[1], **metrics.acceptance(records)}


def _speeds(records: Sequence[Record]) -> Record:
    """Speed and speed-up of records of `Sweep.timed`."""
    compared = metrics.speedup(records, BASELINE)
    low, high = compared["speedup_interval"] or (None, None)
    return {
        **metrics.speed(records),
        "speedup": compared["speedup"], "speedup_low": low, "speedup_high": high,
        "threads": fewest_threads(records, torch.get_num_threads()),
    }  # fmt: skip


def _replayed(record: Record, cell: Cell) -> Record:
    """The rounds of a cell along the output of an example of `Counted`.

    Nothing drafts the first token. Drafts are as long as the cell's, where `max_tokens` leaves room.
    """
    matches = record["matches"][str(cell[0])]
    stats = DraftStats()
    position = 1
    while position < len(matches):
        k = min(cell[1], record["max_tokens"] - position - 1)
        draft = matches[position : position + k]
        accepted = len(draft) - len(draft.lstrip("1"))
        emitted = min(accepted + 1, len(matches) - position)
        stats.add("exit", drafted=k, accepted=accepted, emitted=emitted)
        position += emitted
    return {"drafts": stats.to_rows()}


def _name(cell: Cell) -> str:
    return f"exit layer {cell[0]}, {cell[1]} drafted"
