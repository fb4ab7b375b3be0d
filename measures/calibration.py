"""What a draft step at each depth and a verification of each width cost on this device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from self_speculation.config import DraftWeights
from self_speculation.decoding.output import Output
from self_speculation.decoding.sampling import Sampler
from self_speculation.decoding.stopping import StopConditions
from self_speculation.drafts.sources import LayerDrafts
from self_speculation.model.decoder import Decoder, agreed, forward, synchronize
from self_speculation.self_speculation_generator import SelfSpeculativeGenerationStrategy

_REPETITIONS = 7
_ENOUGH, _LONG = 3, 30.0  # repetitions that will do where all take more than so many seconds
_DRAFT_LENGTHS = (0, 1, 2, 3, 4, 6, 9, 13, 20)  # in between, the cost is interpolated


@dataclass(frozen=True)
class Costs:
    """Seconds, at one length of the context."""

    plain_step: float
    draft_step: dict[int, float]  # exit layer -> one drafted token
    verifications: dict[int, tuple[float, ...]]  # exit layer -> behind each of `draft_lengths` drafts
    draft_lengths: tuple[int, ...] = _DRAFT_LENGTHS

    def verification(self, exit_layer: int, num_drafted: int) -> float:
        return float(numpy.interp(num_drafted, self.draft_lengths, self.verifications[exit_layer]))


@torch.inference_mode()
def calibrate(
    model: PreTrainedModel, exit_layers: Sequence[int], context: int, draft_weights: DraftWeights = "exact"
) -> Costs:
    """Time the steps of the real decode loop behind a context of so many tokens.

    Verification is measured at the first and last exit layer; in between, it is a straight line.
    """
    longest = max(_DRAFT_LENGTHS)
    prompt = torch.randint(model.config.vocab_size, (context,)).tolist()
    output = Output(prompt, model.device, StopConditions([], longest + 1))
    decoder = Decoder(model, context, context + longest + 1, max_width=longest + 1)
    greedy = Sampler(sample=False)
    sources = {layer: LayerDrafts(decoder, greedy, layer, draft_weights) for layer in exit_layers}
    forward(decoder, output.history())
    decoder.cache.rollback(1)

    def plain_step() -> None:
        forward(decoder, output.last()).logits.argmax().tolist()
        decoder.cache.rollback(1)

    def round_of(exit_layer: int, k: int) -> tuple[float, float]:
        started = time.perf_counter()
        draft = sources[exit_layer].draft(output, k)
        synchronize(model)
        drafted = time.perf_counter()
        verdict = SelfSpeculativeGenerationStrategy.verify(decoder, output, greedy, draft).verdict
        torch.stack([verdict.num_accepted, verdict.next_token, *draft.tokens]).tolist()
        decoder.cache.rollback(k + 1)
        return drafted - started, time.perf_counter() - drafted

    ends = sorted({min(exit_layers), max(exit_layers)})
    jobs: list[Callable[[], None]] = []
    plain: list[float] = []
    drafts: dict[int, list[float]] = {layer: [] for layer in exit_layers}
    checks: dict[tuple[int, int], list[float]] = {(layer, k): [] for layer in ends for k in _DRAFT_LENGTHS}

    def draft_step(layer: int) -> None:
        drafts[layer].append(round_of(layer, 4)[0] / 4)

    def verification(layer: int, k: int) -> None:
        checks[layer, k].append(round_of(layer, k)[1])

    jobs += [lambda: plain.append(_timed(plain_step))] * 3
    jobs += [partial(draft_step, layer) for layer in exit_layers]
    jobs += [partial(verification, *place) for place in checks]
    started = time.perf_counter()
    for turn in tqdm(range(_REPETITIONS + 1), desc="calibration"):
        if agreed(model, turn > _ENOUGH and time.perf_counter() - started > _LONG):
            break
        for job in jobs:  # all in turn, so that a slow moment of the machine hits no one step alone
            job()
        if turn == 0:  # warm-up
            for times in (plain, *drafts.values(), *checks.values()):
                times.clear()
    at_ends = [[statistics.median(checks[layer, k]) for layer in ends] for k in _DRAFT_LENGTHS]
    costs = Costs(
        plain_step=statistics.median(plain),
        draft_step={layer: statistics.median(times) for layer, times in drafts.items()},
        verifications={
            layer: tuple(float(numpy.interp(layer, ends, costs)) for costs in at_ends)
            for layer in exit_layers
        },
    )
    return agreed(model, costs)


def _timed(step: Callable[[], None]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started
