"""The draft sources. A new source is a class, a line of `draft_sources`, and fields of `GenerationConfig`."""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property

import torch

from self_speculation.backends.copies import int4_draft_runner, why_no_copies
from self_speculation.backends.runner import ModelRunner
from self_speculation.backends.runners import is_captured
from self_speculation.config import DraftWeights, GenerationConfig
from self_speculation.drafts.composer import DraftComposer
from self_speculation.drafts.costs import draft_ratio, relative_pass_cost
from self_speculation.drafts.draft import DraftCost, DraftSource, LayerDrafts, LookupDrafts
from self_speculation.drafts.ngram import NgramDrafts
from self_speculation.drafts.policy import AdaptivePolicy, SourceStats
from self_speculation.models.model_cache import kept

# Tokens that n-grams match in adaptive decoding, without `prompt_lookup`.
_LONGEST_MATCH = 4

# Prior acceptance of a copy of all layers. It is strong, so that two rejections do not rule the copy out.
_COPY_PRIOR = (0.95,)
_COPY_PRIOR_STRENGTH = 6.0


@dataclass(frozen=True)
class DraftContext:
    """What draft sources are made from."""

    runner: ModelRunner  # the target's
    config: GenerationConfig

    @property
    def exit_layers(self) -> list[int]:
        """Exits in ascending order; none where layers draft nothing. Adaptive decoding has exits from a
        twelfth to a third of the layers, and in a copy in fewer bits also all layers.
        """
        config = self.config
        num_layers = len(self.runner.layers)
        if not config.is_adaptive:
            return [] if config.exit_layer == -1 else [config.exit_layer]
        early = {max(1, round(num_layers * share)) for share in (1 / 12, 1 / 8, 1 / 6, 1 / 4, 1 / 3)}
        early.discard(num_layers)  # of a model with one layer
        return sorted(early) if self.draft_weights == "exact" else [*sorted(early), num_layers]

    @cached_property
    def draft_weights(self) -> DraftWeights:
        """From the config; adaptive decoding makes no copies of what is in few bits already."""
        config = self.config
        return "exact" if config.is_adaptive and why_no_copies(self.runner.model) else config.draft_weights

    @cached_property
    def draft_runner(self) -> ModelRunner:
        """The runner that drafts: the target's, or one over copies in four bits. All exits share it.

        Raises:
            ValueError: layers or head cannot be copied.
        """
        if self.draft_weights == "exact":
            return self.runner
        return int4_draft_runner(self.runner, self.exit_layers[-1])


def draft_sources(context: DraftContext) -> list[DraftSource | LookupDrafts]:
    """The sources that the config asks for. Of equally long matches, a row takes the first source's."""
    sources: list[DraftSource | LookupDrafts] = [*_layer_drafts(context)]
    if context.config.looks_up:
        sources.append(NgramDrafts(context.config.prompt_lookup or _LONGEST_MATCH))
    return sources


def make_composer(context: DraftContext) -> DraftComposer:
    """Make the composer of the config's sources; for adaptive decoding with a policy that picks among them.

    Raises:
        ValueError: layers or head cannot be copied, or several sources compute and nothing picks one.
    """
    sources = draft_sources(context)
    costs = dict[str, DraftCost]()
    for source in sources:
        costs |= source.costs if isinstance(source, LookupDrafts) else {source.name: source.cost}
    policy = AdaptivePolicy(costs, _stats(context)) if context.config.is_adaptive else None
    return DraftComposer(context.runner.model, sources, policy)


def _layer_drafts(context: DraftContext) -> Iterator[LayerDrafts]:
    if not context.exit_layers:
        return
    weights = context.draft_weights
    num_layers = len(context.runner.layers)
    draft_runner = context.draft_runner  # first: without kernels for copies, there are no costs of them
    grows = relative_pass_cost(context.runner, weights)

    def draft_step(layer: int) -> Callable[[int], float]:
        ratio = draft_ratio(context.runner.model, layer, weights)
        return lambda num_rows: ratio * grows(num_rows)

    for layer in context.exit_layers:
        cost = DraftCost(draft_step(layer), prior_strength=1.0)  # one good trial is enough
        if is_whole := layer == num_layers:
            cost = replace(cost, priors=_COPY_PRIOR, prior_strength=_COPY_PRIOR_STRENGTH)
        yield LayerDrafts(draft_runner, layer, weights, cost, is_whole)


def _stats(context: DraftContext) -> SourceStats:
    """The statistics of earlier answers, for the same drafts on the model's current device."""
    config = context.config
    runner = context.runner
    model = runner.model
    key = (
        (context.draft_weights, config.greedy, config.prompt_lookup),
        (model.device, model.dtype, runner.dtype, is_captured(model)),
    )
    learnt: dict[Hashable, SourceStats] = kept(model).setdefault(SourceStats, {})
    return learnt.setdefault(key, SourceStats(relative_pass_cost(runner), torch.get_num_threads))


def draft_flags() -> tuple[str, ...]:
    """The fields of a config that change how drafts are made; none changes the output."""
    drafting = (field.name for field in fields(GenerationConfig) if "used_by" in field.metadata)
    return ("generation_strategy", *drafting)
