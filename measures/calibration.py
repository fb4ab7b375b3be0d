"""The measured costs of a round's parts, for a predicted sweep.

It times passes after a context of some length, in turns; it knows nothing of acceptance or text.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from runs import ranks
from self_speculation.config import GenerationConfig
from self_speculation.decoding.sampling import Sampler
from self_speculation.drafts.registry import make_drafter
from self_speculation.model.devices import broadcast_from_rank0, synchronize
from self_speculation.model.model_runner import forward, forward_early
from self_speculation.model.runners import make_runner
from self_speculation.threads import adjust_threads

# Draft lengths whose verification is timed. Captured passes have widths of powers of two, so their cost jumps
# after 0, 1, 3, 7 and 15.
_LENGTHS = (0, 1, 2, 3, 4, 7, 8, 15, 16)
_EXITS, _STEPS = 5, 4  # exit layers whose draft step is timed, at most; steps in a row, as in a draft
_TURNS, _PATIENCE = 20, 30.0  # turns at most, with those of the warm-up; seconds after which no turn begins


@dataclass(frozen=True)
class Costs:
    """Costs in seconds.

    Args:
        plain_step: one autoregressive token at full depth.
        draft_step: exit layer -> one drafted token.
        verifications: exit layer -> everything after a draft of each of `lengths`.
        lengths: numbers of drafted tokens, from 0 up; costs between them are interpolated.
    """

    plain_step: float
    draft_step: Mapping[int, float]
    verifications: Mapping[int, Sequence[float]]
    lengths: Sequence[int]

    def round(self, exit_layer: int, num_drafted: int) -> float:
        """A draft and its verification."""
        verification = numpy.interp(num_drafted, self.lengths, self.verifications[exit_layer])
        return num_drafted * self.draft_step[exit_layer] + float(verification)


@torch.inference_mode()
def calibrate(
    model: PreTrainedModel,
    config: GenerationConfig,
    exit_layers: Sequence[int],
    context: int,
    longest: int,
) -> Costs:
    """The costs of rounds after `context` positions, in seconds: medians over several turns.

    Each turn times a plain step, draft steps, and verifications with sampling and the read of the accepted
    tokens. Costs in between are interpolated linearly.

    Args:
        config: settings of sampling, weights and vocabulary of drafts.
        exit_layers: in ascending order.
        longest: the longest draft.
    """
    sampler, num_layers = Sampler.of(config), model.config.num_hidden_layers
    runner = make_runner(model)
    cache = runner.new_cache(context, context + longest + _STEPS)
    drafter = make_drafter(runner, config, exit_layers[-1])
    ids = torch.zeros(1, longest + 1, dtype=torch.long, device=model.device)
    forward(runner, cache, ids[:, :1])  # allocates the cache

    def now() -> float:
        synchronize(model)
        return time.perf_counter()

    def plain_step() -> float:
        cache.set_rows([context])
        started = now()
        for _ in range(_STEPS):
            sampler(forward(runner, cache, ids[:, :1]).logits[:, 0]).tokens.item()
        return (now() - started) / _STEPS

    def draft_step(exit_layer: int) -> float:
        cache.set_rows([context])
        tokens = ids[:, :1]
        forward(runner, cache, tokens)  # as before a real draft
        started = now()
        for _ in range(_STEPS):
            tokens = sampler(forward_early(drafter, cache, tokens, exit_layer).logits[:, 0]).tokens[:, None]
        return (now() - started) / _STEPS

    def verification(exit_layer: int, k: int) -> float:
        cache.set_rows([context])
        inputs, states = ids[:, : k + 1], list[Tensor]()
        if exit_layer and k:  # the exit states of a draft, in one pass
            states.append(forward_early(runner, cache, ids[:, :k], exit_layer, num_logits=0).hidden)
        started = now()
        if exit_layer:  # the last drafted token
            states.append(forward_early(runner, cache, ids[:, :1], exit_layer, num_logits=0).hidden)
            inputs = torch.cat(states, 1)  # [1, k+1, H]
        choice = sampler(runner.run(cache, inputs, exit_layer, num_layers, k + 1).logits[0]).tokens  # [k+1]
        accepted = (choice[:-1] == ids[0, :k]).cumprod(0).sum()
        torch.cat((accepted[None], choice[accepted][None], ids[0, :k])).tolist()
        cache.rollback(k)
        return now() - started

    lengths = [*(k for k in _LENGTHS if k < longest), longest]
    indices = numpy.linspace(0, len(exit_layers) - 1, min(_EXITS, len(exit_layers))).round().astype(int)
    drafted = [exit_layers[index] for index in indices]
    # A copy's exit states are of no use: all layers verify.
    verified = sorted({exit_layers[0], exit_layers[-1]}) if config.draft_weights == "exact" else [0]
    turns = list[list[float]]()
    started = time.perf_counter()
    hidden = None if ranks.is_first() else True  # None: unless at a terminal
    with tqdm(total=_TURNS, desc="calibration", disable=hidden) as bar:
        while len(turns) < _TURNS:
            late = time.perf_counter() - started > _PATIENCE
            if len(turns) > 1 and broadcast_from_rank0(model, late):
                break
            adjust_threads(model)
            passes = itertools.starmap(verification, itertools.product(verified, lengths))
            turns.append([plain_step(), *map(draft_step, drafted), *passes])
            bar.update()
        bar.total = bar.n
    plain, *parts = medians(broadcast_from_rank0(model, turns[1:]))
    steps = numpy.interp(exit_layers, drafted, parts[: len(drafted)])
    table = numpy.reshape(parts[len(drafted) :], (len(verified), len(lengths)))
    by_length = [numpy.interp(exit_layers, verified, costs) for costs in table.T]
    verifications = zip(exit_layers, numpy.transpose(by_length).tolist(), strict=True)
    return Costs(plain, dict(zip(exit_layers, steps.tolist(), strict=True)), dict(verifications), lengths)


def medians(turns: Sequence[Sequence[float]]) -> list[float]:
    """The median of each part over all turns, relative to the turn's first part: a machine's pace changes."""
    table = numpy.array(turns)  # [turns, parts]
    return (numpy.median(table[:, 0]) * numpy.median(table / table[:, :1], axis=0)).tolist()
