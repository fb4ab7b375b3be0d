"""The draft sources by name. A new source is a class, an entry here, and its flags.

The flags that ask for drafts, the arms of adaptive decoding and the predictable settings of a sweep follow
from these entries.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from self_speculation.config import LONGEST_DRAFT, DraftWeights, GenerationConfig
from self_speculation.drafts.adaptive import AdaptiveDrafts
from self_speculation.drafts.costs import draft_ratio, growth
from self_speculation.drafts.draft import DraftSource, ShouldContinue
from self_speculation.drafts.layers import LayerDrafts
from self_speculation.drafts.ngram import CopiedFirst, NgramDrafts, TokenDrafts
from self_speculation.drafts.policy import AdaptivePolicy, Arm, ArmStats
from self_speculation.drafts.prediction import PredictionDrafts
from self_speculation.drafts.shared import SharedDrafts, finished_answers, forget_answers
from self_speculation.model.captured_runner import is_captured
from self_speculation.model.made import discard, made
from self_speculation.model.model_runner import ModelRunner
from self_speculation.model.quantized_layers import bytes_per_weight, quantized
from self_speculation.model.short_head import ShortHead, default_vocabulary

# Tokens that n-grams match in adaptive decoding, without `prompt_lookup`.
_LONGEST_MATCH = 4

# Prior acceptance of early exits, which may be untrained until a prompt says otherwise, and of a copy of all
# layers.
_PRIOR_OF_EXIT, _PRIOR_OF_COPY = (0.0,), (0.9,)
# Weight of the copy's prior: two rejections in the first rounds must not rule it out.
_TRUST_IN_COPY = 6.0


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
        return draft_ratio(self.model, exit_layer, self.config.draft_weights, self.draft_vocabulary)

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
        return ShortHead(self.runner, number, grows=self.config.draft_vocabulary is None)

    def drafter(self, num_layers: int) -> ModelRunner:
        """Runs so many layers that draft and their head. Raises what `quantized` and `ShortHead` do."""
        if self.config.draft_weights != "exact":
            return quantized(self.runner, num_layers, self.short_head)
        runner, head = self.runner, self.short_head
        return runner if head is None else runner.with_layers(runner.layers, head)


def make_drafter(runner: ModelRunner, config: GenerationConfig, num_layers: int) -> ModelRunner:
    """See `DraftContext.drafter`."""
    return DraftContext(runner, replace(config, exit_layer=num_layers)).drafter(num_layers)


class SourceEntry(NamedTuple):
    """A kind of drafts."""

    flags: tuple[str, ...]  # its fields of `GenerationConfig`
    asked_for: Callable[[GenerationConfig], bool]
    make: Callable[[DraftContext], DraftSource | TokenDrafts]
    # By name, what adaptive decoding picks from; None: the source itself, which copies tokens.
    arms: Callable[[DraftContext], Mapping[str, tuple[LayerDrafts, Arm]]] | None = None


def make_source(context: DraftContext) -> DraftSource:
    """The source that the config asks for. Raises what `DraftContext.drafter` does."""
    made = [kind.make(context) for kind in SOURCES if kind.asked_for(context.config)]
    copying = [source for source in made if isinstance(source, TokenDrafts)]
    *_, drafting = (source for source in made if isinstance(source, DraftSource))
    return CopiedFirst(copying, drafting, context.model.config.vocab_size) if copying else drafting


def make_adaptive(context: DraftContext) -> DraftSource:
    """Picks among all entries in each round, by the statistics of earlier answers.

    Raises what `DraftContext.drafter` does.
    """
    sources: dict[str, LayerDrafts] = {}
    ngrams: dict[str, TokenDrafts] = {}
    arms: dict[str, Arm] = {}
    for kind in SOURCES:
        if kind.arms is not None:
            for name, (drafting, arm) in kind.arms(context).items():
                sources[name], arms[name] = drafting, arm
        elif kind.asked_for(context.config) and isinstance(source := kind.make(context), TokenDrafts):
            ngrams[source.name], arms[source.name] = source, Arm(priors=source.priors)
    policy = AdaptivePolicy(arms, LONGEST_DRAFT, _stats(context))
    return AdaptiveDrafts(context.model, sources, ngrams, policy)


def candidate_layers(num_layers: int, draft_weights: DraftWeights) -> list[int]:
    """Exits from a twelfth to a third of the layers; of a copy in fewer bits also all layers."""
    early = {max(1, round(num_layers * share)) for share in (1 / 12, 1 / 8, 1 / 6, 1 / 4, 1 / 3)}
    return sorted(early) if draft_weights == "exact" else [*sorted(early), num_layers]


def _layers(context: DraftContext, exit_layer: int) -> LayerDrafts:
    config = context.config
    should_continue = None if config.draft_confidence is None else _last_is(config.draft_confidence)
    return LayerDrafts(context.drafter(exit_layer), exit_layer, config.draft_weights, should_continue)


def _last_is(threshold: float) -> ShouldContinue:
    """End a draft after a token whose own probability is below the threshold."""
    return lambda confidences: [bool(row) and row[-1] >= threshold for row in confidences]


def _layer_arms(context: DraftContext) -> Mapping[str, tuple[LayerDrafts, Arm]]:
    arms: dict[str, tuple[LayerDrafts, Arm]] = {}
    weights, num_layers = context.config.draft_weights, len(context.runner.layers)
    of_draft_step = growth(context.runner, weights)
    for layer in candidate_layers(num_layers, weights):
        source, ratio = _layers(context, layer), context.draft_ratio(layer)
        if layer == num_layers:
            arm = Arm(ratio, of_draft_step, _PRIOR_OF_COPY, _TRUST_IN_COPY)
        else:
            arm = Arm(ratio, of_draft_step, _PRIOR_OF_EXIT, is_judged=True)
        arms[source.name] = (source, arm)
    return arms


# In order of precedence for rows where several match.
SOURCES: list[SourceEntry] = [
    SourceEntry(
        ("exit_layer", "num_speculations", "draft_weights", "draft_confidence", "draft_vocabulary"),
        asked_for=lambda config: True,
        make=lambda context: _layers(context, context.config.exit_layer),
        arms=_layer_arms,
    ),
    SourceEntry((), lambda config: config.looks_up, lambda context: PredictionDrafts()),
    SourceEntry(
        ("prompt_lookup",),
        lambda config: config.looks_up,
        lambda context: NgramDrafts(context.config.prompt_lookup or _LONGEST_MATCH),
    ),
    SourceEntry(
        ("shared_lookup",),
        asked_for=lambda config: config.shared_lookup > 0,
        make=lambda context: SharedDrafts(finished_answers(context.model, context.config.shared_lookup)),
    ),
]


def _stats(context: DraftContext) -> ArmStats:
    """The statistics of earlier answers, for these drafts on the model's current device."""
    model, config, runner = context.model, context.config, context.runner
    key = (
        (config.draft_weights, context.draft_vocabulary, config.greedy, config.prompt_lookup),
        (model.device, model.dtype, runner.dtype, is_captured(model)),
    )
    return _learnt(model).setdefault(key, ArmStats(growth(runner), torch.get_num_threads))


def _learnt(model: PreTrainedModel) -> dict[Hashable, ArmStats]:
    """By settings."""
    return made(model, ArmStats, None, dict)


def forget_what_was_learnt(model: PreTrainedModel) -> None:
    """Drop the statistics of adaptive decoding and the finished answers, as in a new process."""
    discard(model, ArmStats)
    forget_answers(model)


def driving_flags() -> tuple[str, ...]:
    """The fields of a config that change how drafts are made; none changes the output."""
    of_sources = {name for kind in SOURCES for name in kind.flags}
    return ("generation_strategy", *(f.name for f in fields(GenerationConfig) if f.name in of_sources))


def is_replayable(config: GenerationConfig) -> bool:
    """Whether a replay can follow the drafts: they come from one exit and have one length."""
    asked_for = [kind for kind in SOURCES if kind.asked_for(config)]
    return asked_for == SOURCES[:1] and config.draft_confidence is None
