"""The draft sources by name. A new source is a class, an entry here, and its flags.

The flags that ask for drafts, the arms of adaptive decoding and the predictable settings of a sweep follow
from these entries.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from self_speculation.config import LONGEST_DRAFT, DraftWeights, GenerationConfig
from self_speculation.drafts.adaptive import AdaptiveDrafts
from self_speculation.drafts.costs import Costs, PassTimes, growth
from self_speculation.drafts.draft import DraftSource
from self_speculation.drafts.layers import FixedThreshold, LayerDrafts, LearnedThreshold, Threshold
from self_speculation.drafts.ngram import NgramDrafts, NgramFirst, TokenDrafts
from self_speculation.drafts.policy import AdaptivePolicy, Arm, ArmStats
from self_speculation.drafts.prediction import PredictionDrafts
from self_speculation.drafts.shared import SharedDrafts, finished_answers, forget_answers
from self_speculation.model.captured_runner import is_captured
from self_speculation.model.model_runner import ModelRunner
from self_speculation.model.quantized_layers import bytes_per_weight, quantized
from self_speculation.model.short_head import ShortHead, default_vocabulary

# Tokens that n-grams match in adaptive decoding, without `prompt_lookup`.
_LONGEST_MATCH = 4

# Prior acceptance of early exits, which may be untrained, and of a copy of all layers.
_PRIOR_OF_EXIT, _PRIOR_OF_COPY = (0.4,), (0.9,)
# Weight of the copy's prior: two rejections in the first rounds must not rule it out.
_TRUST_IN_COPY = 6.0

# Statistics of adaptive decoding, by model and settings.
_LEARNT: WeakKeyDictionary[nn.Module, dict[Hashable, ArmStats]] = WeakKeyDictionary()


@dataclass(frozen=True)
class DraftContext:
    """What draft sources are made from."""

    runner: ModelRunner  # the target's
    config: GenerationConfig

    @property
    def model(self) -> PreTrainedModel:
        return self.runner.model

    def draft_ratio(self, exit_layer: int) -> float:
        """c of the formula, estimated."""
        weights = self.config.draft_weights
        return Costs.estimated(self.model, exit_layer, weights, self.draft_vocabulary).draft_ratio(exit_layer)

    @cached_property
    def draft_vocabulary(self) -> int | None:
        """From the config, or the default of copies and adaptive decoding; None: the whole head."""
        config, layers = self.config, len(self.runner.layers)
        if config.draft_vocabulary is not None or not (config.draft_weights != "exact" or config.is_adaptive):
            return config.draft_vocabulary
        candidates = candidate_layers(layers, config.draft_weights)
        deepest = candidates[-1] if config.is_adaptive else config.exit_layer
        return default_vocabulary(self.runner, deepest, bytes_per_weight(self.model, config.draft_weights))

    @cached_property
    def short_head(self) -> ShortHead | None:
        """Shared by all exits; None: drafts read the whole head. Raises what `ShortHead` does."""
        number = self.draft_vocabulary
        if number is None or number >= self.runner.config.vocab_size:
            return None
        return ShortHead(self.runner, number)


@dataclass(frozen=True)
class SourceEntry:
    """A kind of drafts.

    Args:
        flags: its fields of `GenerationConfig`.
        asked_for: whether a config asks for it.
        make: makes the source, given the source of the entries before.
        arms: by name, the sources that adaptive decoding picks from.
    """

    flags: tuple[str, ...]
    asked_for: Callable[[GenerationConfig], bool]
    make: Callable[[DraftContext, Any], DraftSource]
    arms: Callable[[DraftContext], Mapping[str, tuple[DraftSource, Arm]]]


def short_head_of(runner: ModelRunner, config: GenerationConfig, num_layers: int) -> ShortHead | None:
    """The short head of drafts from so many layers. Raises what `ShortHead` does."""
    return DraftContext(runner, replace(config, exit_layer=num_layers)).short_head


def make_drafter(
    runner: ModelRunner, num_layers: int, draft_weights: DraftWeights, short_head: ShortHead | None = None
) -> ModelRunner:
    """Runs the layers that draft and their head. Raises what `quantized` does."""
    if draft_weights != "exact":
        return quantized(runner, num_layers, short_head)
    return runner if short_head is None else runner.over(runner.layers, short_head)


def make_source(context: DraftContext) -> DraftSource:
    """The source that the config asks for. Raises what `make_drafter` does."""
    source: DraftSource | None = None
    for kind in SOURCES:
        if kind.asked_for(context.config):
            source = kind.make(context, source)
    assert source is not None
    return source


def make_adaptive(context: DraftContext) -> DraftSource:
    """Picks among all entries in each round, by the statistics of earlier answers.

    Raises what `make_drafter` does.
    """
    made = {name: arm for kind in SOURCES for name, arm in kind.arms(context).items()}
    sources = {name: source for name, (source, _) in made.items()}
    policy = AdaptivePolicy({name: arm for name, (_, arm) in made.items()}, LONGEST_DRAFT, _stats(context))
    for source in sources.values():
        source.end_drafts_by(policy.goes_on)
    return AdaptiveDrafts(context.model, sources, policy)


def candidate_layers(num_layers: int, draft_weights: DraftWeights) -> list[int]:
    """Exits from a twelfth to a third of the layers; of a copy in fewer bits also all layers."""
    early = {max(1, round(num_layers * share)) for share in (1 / 12, 1 / 8, 1 / 6, 1 / 4, 1 / 3)}
    return sorted(early) if draft_weights == "exact" else [*sorted(early), num_layers]


def _layers(
    context: DraftContext, exit_layer: int, make_threshold: Callable[[], Threshold] | None = None
) -> LayerDrafts:
    weights = context.config.draft_weights
    drafter = make_drafter(context.runner, exit_layer, weights, context.short_head)
    return LayerDrafts(drafter, exit_layer, "" if weights == "exact" else weights, make_threshold)


def _layers_asked_for(context: DraftContext, _: None) -> DraftSource:
    config = context.config
    make_threshold: Callable[[], Threshold] | None = None
    if config.draft_confidence == "auto":
        make_threshold = partial(LearnedThreshold, context.draft_ratio(config.exit_layer))
    elif config.draft_confidence is not None:
        make_threshold = partial(FixedThreshold, float(config.draft_confidence))
    return _layers(context, config.exit_layer, make_threshold)


def _layer_arms(context: DraftContext) -> Mapping[str, tuple[DraftSource, Arm]]:
    arms: dict[str, tuple[DraftSource, Arm]] = {}
    weights, num_layers, deeper = context.config.draft_weights, len(context.runner.layers), ""
    of_draft_step = growth(context.runner, weights)
    for layer in reversed(candidate_layers(num_layers, weights)):
        source, ratio = _layers(context, layer), context.draft_ratio(layer)
        if layer == num_layers:
            arm = Arm(ratio, of_draft_step, _PRIOR_OF_COPY, _TRUST_IN_COPY)
        else:
            arm = Arm(ratio, of_draft_step, _PRIOR_OF_EXIT, deeper=deeper)
            deeper = source.name
        arms[source.name] = (source, arm)
    return arms


def _ngrams(context: DraftContext) -> TokenDrafts:
    longest = context.config.prompt_lookup or _LONGEST_MATCH
    return NgramDrafts(longest, context.model.config.vocab_size)


def _shared(context: DraftContext) -> TokenDrafts:
    answers = finished_answers(context.model, context.config.shared_lookup)
    return SharedDrafts(answers, context.model.config.vocab_size)


def _copied_tokens(
    flags: tuple[str, ...],
    asked_for: Callable[[GenerationConfig], bool],
    make: Callable[[DraftContext], TokenDrafts],
    always: bool = True,
) -> SourceEntry:
    """Drafts that cost nothing: where they match, they come before the source of the entries before.

    Args:
        always: adaptive decoding picks from them, asked for or not.
    """

    def arms(context: DraftContext) -> Mapping[str, tuple[DraftSource, Arm]]:
        if not (always or asked_for(context.config)):
            return {}
        source = make(context)
        return {source.name: (source, Arm(priors=source.priors))}

    return SourceEntry(flags, asked_for, lambda context, rest: NgramFirst(make(context), rest), arms)


SOURCES: list[SourceEntry] = [
    SourceEntry(
        ("exit_layer", "num_speculations", "draft_weights", "draft_confidence", "draft_vocabulary"),
        lambda config: True,
        _layers_asked_for,
        _layer_arms,
    ),
    _copied_tokens(("shared_lookup",), lambda config: config.shared_lookup > 0, _shared, always=False),
    _copied_tokens(("prompt_lookup",), lambda config: config.prompt_lookup > 0, _ngrams),
    _copied_tokens(
        (),
        lambda config: config.prompt_lookup > 0,
        lambda context: PredictionDrafts(context.model.config.vocab_size),
    ),
]


def _stats(context: DraftContext) -> ArmStats:
    """The statistics of earlier answers, for these drafts on the model's current device."""
    model, config, runner = context.model, context.config, context.runner
    key = (
        (config.draft_weights, context.draft_vocabulary, config.greedy, config.prompt_lookup),
        (model.device, model.dtype, runner.dtype, is_captured(model)),
    )
    times = PassTimes(growth(runner))
    return _LEARNT.setdefault(model, {}).setdefault(key, ArmStats(times))


def forget_what_was_learnt(model: PreTrainedModel) -> None:
    """Drop the statistics of adaptive decoding and the finished answers, as in a new process."""
    _LEARNT.pop(model, None)
    forget_answers(model)


def driving_flags() -> tuple[str, ...]:
    """The fields of a config that change how drafts are made; none changes the output."""
    of_sources = {name for kind in SOURCES for name in kind.flags}
    return ("generation_strategy", *(f.name for f in fields(GenerationConfig) if f.name in of_sources))


def is_replayable(config: GenerationConfig) -> bool:
    """Whether a replay can follow the drafts: they come from one exit and have one length."""
    asked_for = [kind for kind in SOURCES if kind.asked_for(config)]
    return asked_for == SOURCES[:1] and config.draft_confidence is None
