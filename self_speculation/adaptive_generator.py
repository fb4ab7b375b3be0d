"""Self-speculative decoding without numbers to tune: each round is what promises most tokens for its time.

After Zarch et al., DEL (arXiv 2504.05598): exits are judged by what they would have had accepted, and drafts
end when they are no longer confident. Beyond it, costs are measured, not assumed, lookups are rounds among
others, and a plain step is one as well, so that nothing is lost where nothing can be guessed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import numpy
import torch
from transformers import PreTrainedModel

from self_speculation.config import LONGEST_DRAFT, DraftWeights, GenerationConfig, GenerationStrategyName
from self_speculation.decoding.sampling import Sampler
from self_speculation.drafts.policy import AdaptivePolicy, Costs, LearnedThreshold
from self_speculation.drafts.sources import AdaptiveDrafts, DraftSource, LayerDrafts, Lookup, make_drafter
from self_speculation.model.decoder import Decoder, agreed, forward, forward_early, synchronize
from self_speculation.self_speculation_generator import SelfSpeculativeGenerationStrategy

LONGEST_MATCH = 4

# Widths of passes whose time is measured; what lies in between is interpolated.
_WIDTHS = (1, 2, 3, 4, 5, 9, LONGEST_DRAFT + 1)
_REPETITIONS, _CONTEXT = 5, 64
_ENOUGH = 1.0  # seconds, behind which no repetition begins
_SLOW = 0.1  # seconds of a pass, beyond which a quarter of the layers stands for all

_COSTS: WeakKeyDictionary[PreTrainedModel, dict[tuple[DraftWeights, Sampler], Costs]] = WeakKeyDictionary()


class AdaptiveGenerationStrategy(SelfSpeculativeGenerationStrategy):
    """Chooses exit layer, draft length and lookups round by round; see the module.

    What a round costs is measured before a model's first answer, in about a second, or in ten passes or so of
    a model that takes longer for them. Since decisions depend on time, sampled outputs differ from run to run
    in spite of a seed; their distribution does not.
    """

    name: GenerationStrategyName = "adaptive"

    def prepare(self, model: PreTrainedModel, config: GenerationConfig) -> None:
        key, known = (config.draft_weights, Sampler.of(config)), _COSTS.setdefault(model, {})
        if key not in known:
            known[key] = measure_costs(model, *key)

    @staticmethod
    def make_source(
        model: PreTrainedModel,
        decoder: Decoder,
        sampler: Sampler,
        config: GenerationConfig,
        prompt: list[int],
    ) -> DraftSource:
        weights = config.draft_weights
        costs = _COSTS[model][weights, sampler]
        drafts = {
            layer: LayerDrafts(decoder, sampler, layer, weights, LearnedThreshold(step))
            for layer, step in costs.draft_step.items()
        }
        longest = config.prompt_lookup or LONGEST_MATCH
        return AdaptiveDrafts(
            Lookup(prompt, longest, model.config.vocab_size), drafts, AdaptivePolicy(costs, longest)
        )


def candidate_layers(num_layers: int, draft_weights: DraftWeights) -> list[int]:
    """From a twelfth of the layers to a third; with a copy in fewer bits, also all of them."""
    early = {max(1, round(num_layers * share)) for share in (1 / 12, 1 / 8, 1 / 6, 1 / 4, 1 / 3)}
    return sorted(early) if draft_weights == "exact" else [*sorted(early), num_layers]


@torch.inference_mode()
def measure_costs(model: PreTrainedModel, draft_weights: DraftWeights, sampler: Sampler) -> Costs:
    """Time passes of all widths behind a short context, in turn, and what picks a token of their logits."""
    num_layers = model.config.num_hidden_layers
    layers = candidate_layers(num_layers, draft_weights)
    decoder = Decoder(model, _CONTEXT, _CONTEXT + _WIDTHS[-1], max_width=_WIDTHS[-1])
    drafter = make_drafter(decoder, layers[-1], draft_weights)
    ids = torch.randint(model.config.vocab_size, (1, _CONTEXT + _WIDTHS[-1]), device=model.device)
    forward(decoder, ids[:, :_CONTEXT])
    hidden = decoder.embed(ids)

    first = _seconds(model, lambda: decoder.run_layers(hidden[:, :1], 0, num_layers))
    slow = agreed(model, first > _SLOW)
    decoder.cache.truncate(_CONTEXT)
    timed = -(-num_layers // 4) if slow else num_layers

    def layers_of(width: int) -> float:
        taken = _seconds(model, lambda: decoder.run_layers(hidden[:, :width], 0, timed))
        return taken * num_layers / timed

    def head_of(width: int) -> float:
        return _seconds(model, lambda: sampler(decoder.logits(hidden, width)[0]))

    def draft_of(layer: int) -> float:
        return _seconds(model, lambda: sampler(forward_early(drafter, ids[:, :1], layer).logits[0]))

    jobs: list[tuple[Callable[[int], float], int]] = [
        *((function, width) for function in (layers_of, head_of) for width in _WIDTHS),
        *((draft_of, layer) for layer in layers),
    ]
    times: dict[tuple[Callable[[int], float], int], list[float]] = {job: [] for job in jobs}
    started = time.perf_counter()
    for turn in range(_REPETITIONS):
        if agreed(model, turn and time.perf_counter() - started > _ENOUGH):
            break
        for function, argument in jobs:
            times[function, argument].append(function(argument))
            decoder.cache.truncate(_CONTEXT)
    seconds = dict(
        zip(times, agreed(model, [statistics.median(taken) for taken in times.values()]), strict=True)
    )

    widths = numpy.arange(1, LONGEST_DRAFT + 2)
    step = seconds[layers_of, 1] + seconds[head_of, 1]

    def by_width(function: Callable[[int], float]) -> Sequence[float]:
        return numpy.interp(widths, _WIDTHS, [seconds[function, width] / step for width in _WIDTHS]).tolist()

    one_layer = [cost / num_layers for cost in by_width(layers_of)]
    head = by_width(head_of)
    verified_from = {0: 0, **{layer: layer if draft_weights == "exact" else 0 for layer in layers}}
    return Costs(
        draft_step={layer: seconds[draft_of, layer] / step for layer in layers},
        first_layers={layer: first * one_layer[0] for layer, first in verified_from.items()},
        verification={
            layer: [(num_layers - first) * a + b for a, b in zip(one_layer, head, strict=True)]
            for layer, first in verified_from.items()
        },
        exit=head[0],
        readable=[layer for layer in layers if layer < num_layers],
    )


def _seconds(model: PreTrainedModel, run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    synchronize(model)
    return time.perf_counter() - started
