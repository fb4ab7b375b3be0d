"""Measures what the parts of a round cost, by running the very loops of decoding.

Passes of one kind, one after the other, would take less time than in a round: each would find its weights
in the processor's cache, where the one before left them. So whole rounds are played, in turn with plain
steps, and what is timed is a draft, and then everything from there to the next one.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy
import torch
from transformers import PreTrainedModel

from self_speculation.autoregressive_generator import step_by_step
from self_speculation.config import GenerationConfig
from self_speculation.decoding.output import Output
from self_speculation.decoding.rows import Rows
from self_speculation.decoding.sampling import Sampler
from self_speculation.decoding.stopping import StopConditions
from self_speculation.drafts.costs import Costs, never_falling
from self_speculation.drafts.draft import Draft, DraftSource
from self_speculation.drafts.layers import LayerDrafts
from self_speculation.drafts.lookups import certain
from self_speculation.drafts.policy import FixedThreshold
from self_speculation.drafts.table import make_drafter
from self_speculation.model.compiled import RUNS_TO_WARM_UP, is_compiled, make_decoder
from self_speculation.model.decoder import Decoder, forward
from self_speculation.model.devices import agreed, synchronize
from self_speculation.self_speculation_generator import speculate

# Draft lengths that are measured, as far as they matter; what lies in between is interpolated.
_LENGTHS = (0, 1, 2, 4, 8, 16, 24)
_LENGTHS_OF_SLOW = (0, 4, 16)
# Compiled passes are padded to powers of two: from one of these pairs to the next the cost jumps.
_LENGTHS_OF_COMPILED = (0, 1, 2, 3, 4, 7, 8, 15, 16, 24)
# Length of the drafts that tell about an exit, and how many plain steps are made in a row.
_DRAFTED, _PLAIN_STEPS = 4, 6
TURNS = 9
# Seconds of a pass from which on a model is slow: its turns are short, and none is for warming up.
_SLOW = 0.1
# Below this many turns nobody knows how times scatter; above this error they are repeated; and none is known
# better than to the last of these shares.
_FEW, _SCATTER, _FINEST = 3, 0.03, 0.005


@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    config: GenerationConfig,
    exit_layers: Sequence[int],
    context: int,
    longest: int,
    patience: float,
    turns: Iterable[int] = range(TURNS),
    draws: int = 0,
    num_rows: int = 1,
) -> Costs:
    """What rounds cost on this device after a context of so many positions.

    Args:
        config: how tokens are picked, and by what weights and vocabulary drafts are made.
        exit_layers: exits to draft at.
        longest: tokens that a draft may have.
        patience: seconds, after which no further turn begins.
        turns: how many there are at most; a progress bar fits around them. Those beyond `TURNS` repeat what
            scatters, as long as something does.
        draws: how many `Costs.draws` to take along.
        num_rows: sequences in each pass.
    """
    clock = _Clock(model, config, context, longest, num_rows)
    warm_up = RUNS_TO_WARM_UP if is_compiled(model) else 1
    for _ in range(warm_up + 1):
        clock.plain_steps(1)
    slow = agreed(model, clock.seconds["plain", 0, 0][0] > _SLOW)
    telling = _LENGTHS_OF_SLOW if slow else _LENGTHS_OF_COMPILED if is_compiled(model) else _LENGTHS
    lengths = [*(k for k in telling if k < longest), longest]
    # What compiling takes must not count; elsewhere a first turn is better than a long wait for a second.
    least = warm_up + 1 if is_compiled(model) else 1
    warm_up = 0 if slow else warm_up
    first, last = min(exit_layers), max(exit_layers)
    places, drafted = {(0, k) for k in lengths}, 1 if slow else min(_DRAFTED, longest)
    if slow or clock.drafts_by_copy:  # a copy's layers are alike: the fewest and the most tell of all
        places |= {(layer, drafted) for layer in (first, last)}
    else:
        places |= {(layer, drafted) for layer in exit_layers}
        places |= {(last, k) for k in lengths if k}
    started = time.perf_counter()
    for clock.turn in turns:
        if clock.turn >= least and agreed(model, time.perf_counter() - started > patience):
            break
        if clock.turn == warm_up:
            clock.seconds.clear()
        if clock.turn >= TURNS:
            places = agreed(model, {place for place in places if clock.scatters(*place)})
            if not places:
                break
        # All in turn, so that a slow moment of the machine hits no one part alone.
        clock.plain_steps(1 if slow else _PLAIN_STEPS)
        clock.probe()
        for exit_layer, num_drafted in sorted(places):
            clock.round(exit_layer, num_drafted)
            if clock.chooses_vocabulary and exit_layer == last and num_drafted == drafted:
                clock.round(exit_layer, num_drafted, short_head=True)
    return agreed(model, replace(_costs(clock.seconds, exit_layers, lengths, draws), num_rows=num_rows))


# What is timed: "plain", "draft", or one with a "short head", "verification" or "probe"; the exit layer; the
# draft length.
Part = tuple[str, int, int]
# Part -> turn -> seconds.
Seconds = Mapping[Part, Mapping[int, float]]


def _costs(seconds: Seconds, exit_layers: Sequence[int], lengths: Sequence[int], draws: int) -> Costs:
    """What was measured here and there, for all exits and lengths; and as other draws of turns say."""
    turns = list(seconds["plain", 0, 0])
    chance = random.Random(0)
    samples = [chance.choices(turns, k=len(turns)) for _ in range(draws if len(turns) >= _FEW else 0)]
    fitted, *others = (_fitted(seconds, turns, exit_layers, lengths) for turns in [turns, *samples])
    return replace(fitted, draws=others)


def _fitted(
    seconds: Seconds, turns: Sequence[int], exit_layers: Sequence[int], lengths: Sequence[int]
) -> Costs:
    """Of these turns, the costs of all exits and lengths.

    A part is compared with the plain steps of its own turn, since the machine may be slower in another turn,
    and the median counts. More tokens, or more layers, never take less: what says otherwise is evened out.

    A draft from an exit saves verification the layers below it, and costs it one more pass. For the last exit
    this saving was measured at all lengths, or at one. Other exits save their share of it, and whatever else
    they save or cost, the same at all lengths, was measured at one. A draft by a copy saves nothing: all
    layers verify, as they do after a lookup.
    """
    plain = seconds["plain", 0, 0]
    plain_step = statistics.median(plain[turn] for turn in turns)
    ratios = {
        part: [times[turn] / plain[turn] for turn in turns if turn in times]
        or [time / plain[turn] for turn, time in times.items()]
        for part, times in seconds.items()
    }
    cost = {part: plain_step * statistics.median(each) for part, each in ratios.items()}
    weight = {part: 1 / (_FINEST + _error(each)) ** 2 for part, each in ratios.items()}
    whole = [("verification", 0, k) for k in lengths]
    of_whole = [weight[part] for part in whole]
    # A plain step is the same pass as a verification of nothing, with less around it.
    plain_step, *of_all = never_falling(
        [plain_step, *(cost[part] for part in whole)], [of_whole[0], *of_whole]
    )
    timed_at: dict[int, set[int]] = defaultdict(set)
    for what, layer, k in cost:
        if layer and what == "draft":
            timed_at[layer].add(k)
    at_all = max(set.intersection(*timed_at.values()))
    drafts = [("draft", layer, at_all) for layer in sorted(timed_at)]
    steps = never_falling([cost[part] for part in drafts], [weight[part] for part in drafts])
    saved: dict[int, dict[int, float]] = defaultdict(dict)  # by exit and length
    for what, layer, k in sorted(cost):
        if layer and what == "verification":
            saved[layer][k] = cost[what, layer, k] - float(numpy.interp(k, lengths, of_all))
    last = max(exit_layers)

    def saved_by_last(k: int) -> float:
        return float(numpy.interp(k, list(saved[last]), list(saved[last].values())))

    def verifications(layer: int) -> list[float]:
        if not saved:
            return of_all
        share = layer / last
        same_at_all = [saving - share * saved_by_last(k) for k, saving in saved[layer].items()][:1]
        savings = [share * saved_by_last(k) + sum(same_at_all) for k in lengths]
        costs = [max(cost + saving, 0.0) for cost, saving in zip(of_all, savings, strict=True)]
        return never_falling(costs, of_whole)

    return Costs(
        plain_step=plain_step,
        draft_step={e: float(numpy.interp(e, [layer for _, layer, _ in drafts], steps)) for e in exit_layers},
        verifications={0: of_all, **{layer: verifications(layer) for layer in exit_layers}},
        lengths=lengths,
        probe=cost["probe", 0, 0],
        saved_by_short_head=max(0.0, steps[-1] - cost.get(("short head", last, at_all), steps[-1])),
    )


def _error(values: Sequence[float]) -> float:
    """By what share the median of values may be off: its standard error, going by their middle half."""
    if len(values) < _FEW:
        return 1.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return 0.93 * (high - low) / middle / len(values) ** 0.5


class _Clock:
    """Times plain steps, rounds and probes of one model at one context."""

    def __init__(
        self, model: PreTrainedModel, config: GenerationConfig, context: int, longest: int, num_rows: int
    ) -> None:
        self._model, self._config, self._longest, self._num_rows = model, config, longest, num_rows
        self._sampler = Sampler.of(config)
        self.drafts_by_copy = config.draft_weights != "exact"
        self._adaptive = config.generation_strategy == "adaptive"
        # Adaptive decoding has both heads; whatever else is measured drafts with the one that was asked for.
        self.chooses_vocabulary = self._adaptive and config.draft_vocabulary is not None
        # What is in the prompt and in the cache does not matter, so nothing is prefilled.
        self._prompt = [i % model.config.vocab_size for i in range(context)]
        most = context + max(longest, _PLAIN_STEPS) + 1
        self._decoder = make_decoder(model, context, most, longest + 1, num_rows)
        self._first = torch.tensor([self._prompt[:1]], device=model.device).expand(num_rows, 1)
        self._decoder.cache.clear(num_rows)
        forward(self._decoder, self._first)
        self.turn = 0
        self.seconds: dict[Part, dict[int, float]] = defaultdict(dict)

    def scatters(self, exit_layer: int, num_drafted: int) -> bool:
        """Whether too little is known of these rounds."""
        plain = self.seconds["plain", 0, 0]
        return any(
            _error([seconds / plain[turn] for turn, seconds in times.items()]) > _SCATTER
            for (what, *place), times in self.seconds.items()
            if place == [exit_layer, num_drafted] and (what == "verification" or exit_layer)
        )

    def plain_steps(self, number: int) -> None:
        """Of autoregressive decoding at full depth."""
        decoder, rows = self._at_context(), self._rows(number)
        started = time.perf_counter()
        step_by_step(decoder, rows, len(decoder.layers))
        self.seconds["plain", 0, 0][self.turn] = (time.perf_counter() - started) / number

    def round(self, exit_layer: int, num_drafted: int, short_head: bool = False) -> None:
        """With a draft of an exit layer; 0: with one that takes no layers."""
        decoder = self._at_context()
        source = _Timed(self._source(decoder, exit_layer, short_head), self._model)
        rows = self._rows(num_drafted + 1, ends_text=lambda tokens: True)  # after one round
        speculate(decoder, rows, source, num_drafted)
        what = "short head" if short_head else "draft"
        self.seconds[what, exit_layer, num_drafted][self.turn] = source.drafting / max(1, num_drafted)
        if not (short_head or (exit_layer and self.drafts_by_copy)):
            self.seconds["verification", exit_layer, num_drafted][self.turn] = source.following

    def probe(self) -> None:
        """Reading an exit: norm, head and choice of a token, for one position."""
        decoder = self._at_context()
        hidden = decoder.embed(self._first)
        started = time.perf_counter()
        self._sampler(decoder.logits(hidden, 1)[:, 0])
        synchronize(self._model)
        self.seconds["probe", 0, 0][self.turn] = time.perf_counter() - started

    def _source(self, decoder: Decoder, exit_layer: int, short_head: bool) -> DraftSource:
        if not exit_layer:
            return _Given(self._model.config.vocab_size)
        vocabulary = None if self.chooses_vocabulary and not short_head else self._config.draft_vocabulary
        drafter = make_drafter(decoder, exit_layer, self._config.draft_weights, vocabulary)
        # A threshold takes time, also one that never ends a draft. Adaptive drafts of all layers have none.
        adaptive = self._adaptive and exit_layer < len(decoder.layers)
        watched = adaptive or self._config.draft_confidence is not None
        threshold = partial(FixedThreshold, 0.0) if watched and self._num_rows == 1 else None
        copied_in = self._config.draft_weights if self.drafts_by_copy else ""
        return LayerDrafts(drafter, exit_layer, copied_in, threshold)

    def _at_context(self) -> Decoder:
        """The decoder, with all but the last token of the prompt in its cache; of a batch, a bit less in each
        row than in the one before.
        """
        most = len(self._prompt) - 1
        self._decoder.cache.pretend([max(1, most - row) for row in range(self._num_rows)])
        return self._decoder

    def _rows(self, max_tokens: int, ends_text: Callable[[Sequence[int]], bool] | None = None) -> Rows:
        rows = Rows(self._sampler, self._model.device, self._longest)
        stop = StopConditions([], max_tokens, ends_text=ends_text)
        rows.outputs = [
            Output(self._prompt, self._model.device, stop, has_drafts=True) for _ in range(self._num_rows)
        ]
        rows.last = self._first
        return rows


class _Given(DraftSource):
    """Some tokens, from nowhere, as a lookup drafts them."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def draft(self, rows: Rows, k: int, wanted: Sequence[bool] | None = None) -> Draft:
        lengths = rows.rooms(k, wanted)
        tokens = torch.zeros(len(rows), k, dtype=torch.long, device=rows.last.device)
        for i in range(k):
            rows.propose(tokens[:, i], i, [i < length for length in lengths])
        probabilities = None if rows.sampler.greedy else certain(tokens, self._vocab_size)
        return Draft(["given"] * len(rows), tokens, probabilities, lengths)


class _Timed(DraftSource):
    """Another source, and how many seconds its draft takes, and what follows until the next."""

    def __init__(self, source: DraftSource, model: PreTrainedModel) -> None:
        self._source, self._model = source, model
        self.drafting = self.following = 0.0

    def draft(self, rows: Rows, k: int, wanted: Sequence[bool] | None = None) -> Draft:
        started = time.perf_counter()
        draft = self._source.draft(rows, k, wanted)
        synchronize(self._model)
        self._drafted_at = time.perf_counter()
        self.drafting = self._drafted_at - started
        return draft

    def learn(
        self, rows: Rows, draft: Draft, num_accepted: Sequence[int], agreement: Sequence[Sequence[float]]
    ) -> None:
        self._source.learn(rows, draft, num_accepted, agreement)
        self.following = time.perf_counter() - self._drafted_at
