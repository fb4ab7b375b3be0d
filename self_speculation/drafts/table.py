"""The sources of drafts by what asks for them: a new one is a class, an entry here, and its flags.

What drives drafting, what adaptive decoding chooses among and what a sweep can predict follows from here.
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
from self_speculation.drafts.layers import LayerDrafts
from self_speculation.drafts.lookups import Lookup, LookupFirst
from self_speculation.drafts.policy import AdaptivePolicy, Arm, ArmStats
from self_speculation.drafts.threshold import FixedThreshold, LearnedThreshold, Threshold
from self_speculation.model.compiled import RUNS_TO_WARM_UP, is_compiled
from self_speculation.model.decoder import Decoder
from self_speculation.model.quantized_layers import bytes_per_weight, quantized
from self_speculation.model.short_head import ShortHead, default_vocabulary

# Tokens that lookups of adaptive decoding compare, unless prompt_lookup says how many.
_LONGEST_MATCH = 4
# Tokens that must match where lookups come first and another source drafts what they do not find.
_LEAST_MATCH = 2

# Before anything is known: exits are right if they were trained for it, a copy of all layers mostly is.
_PRIOR_OF_EXIT, _PRIOR_OF_COPY = (0.4,), (0.9,)
# Two mistakes in the first rounds of an answer must not be the end of it.
_TRUST_IN_COPY = 6.0

# Of each model, what adaptive decoding has learnt of its drafts, by what that depends on.
_LEARNT: WeakKeyDictionary[nn.Module, dict[Hashable, ArmStats]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Parts:
    """What the sources of one generation are made from."""

    decoder: Decoder  # the target's
    config: GenerationConfig

    @property
    def model(self) -> PreTrainedModel:
        return self.decoder.model

    def draft_ratio(self, exit_layer: int) -> float:
        """c of the formula, estimated."""
        weights = self.config.draft_weights
        return Costs.estimated(self.model, exit_layer, weights, self.draft_vocabulary).draft_ratio(exit_layer)

    @cached_property
    def draft_vocabulary(self) -> int | None:
        """What the config says, or the default of copies and of adaptive decoding. None: the whole head."""
        config, layers = self.config, len(self.decoder.layers)
        if config.draft_vocabulary is not None or not (config.draft_weights != "exact" or config.is_adaptive):
            return config.draft_vocabulary
        deepest = (
            max(candidate_layers(layers, config.draft_weights)) if config.is_adaptive else config.exit_layer
        )
        read = bytes_per_weight(self.model, config.draft_weights)
        return default_vocabulary(self.decoder, deepest, read)

    @cached_property
    def short_head(self) -> ShortHead | None:
        """One for all exits. Raises what `ShortHead` does."""
        return make_short_head(self.decoder, self.draft_vocabulary)


@dataclass(frozen=True)
class SourceEntry:
    """A kind of drafts: what asks for it, and what makes it.

    Args:
        flags: the fields of `GenerationConfig` that are about it.
        asked_for: whether a config asks for it.
        make: makes the source, from the parts and from the source of the kinds before, to fall back on.
        arms: by name, the sources that adaptive decoding chooses among, each as its policy sees it.
    """

    flags: tuple[str, ...]
    asked_for: Callable[[GenerationConfig], bool]
    make: Callable[[Parts, Any], DraftSource]
    arms: Callable[[Parts], Mapping[str, tuple[DraftSource, Arm]]]


def make_short_head(decoder: Decoder, draft_vocabulary: int | None) -> ShortHead | None:
    """None where drafts read the whole head. Raises what `ShortHead` does."""
    if draft_vocabulary is None or draft_vocabulary >= decoder.config.vocab_size:
        return None
    return ShortHead(decoder, draft_vocabulary)


def short_head_of(decoder: Decoder, config: GenerationConfig, num_layers: int) -> ShortHead | None:
    """What drafts of so many layers read with this config. Raises what `ShortHead` does."""
    return Parts(decoder, replace(config, exit_layer=num_layers)).short_head


def make_drafter(
    decoder: Decoder, num_layers: int, draft_weights: DraftWeights, short_head: ShortHead | None = None
) -> Decoder:
    """What runs the first layers and the head for drafts. Raises what `quantized` does."""
    if draft_weights != "exact":
        return quantized(decoder, num_layers, draft_weights, short_head)
    return decoder if short_head is None else decoder.over(decoder.layers, short_head)


def make_source(parts: Parts) -> DraftSource:
    """What the config asks for. Raises what `make_drafter` does."""
    source: DraftSource | None = None
    for kind in SOURCES:
        if kind.asked_for(parts.config):
            source = kind.make(parts, source)
    assert source is not None
    return source


def make_adaptive(parts: Parts) -> DraftSource:
    """A source that chooses among all kinds round by round, and knows what earlier answers of the model have
    taught. Raises what `make_drafter` does.
    """
    made = {name: arm for kind in SOURCES for name, arm in kind.arms(parts).items()}
    sources = {name: source for name, (source, _) in made.items()}
    policy = AdaptivePolicy({name: arm for name, (_, arm) in made.items()}, LONGEST_DRAFT, _stats(parts))
    for source in sources.values():
        source.end_drafts_by(policy.goes_on)
    return AdaptiveDrafts(parts.model, sources, policy)


def candidate_layers(num_layers: int, draft_weights: DraftWeights) -> list[int]:
    """From a twelfth of the layers to a third; with a copy in fewer bits, also all of them."""
    early = {max(1, round(num_layers * share)) for share in (1 / 12, 1 / 8, 1 / 6, 1 / 4, 1 / 3)}
    return sorted(early) if draft_weights == "exact" else [*sorted(early), num_layers]


def _layers(parts: Parts, exit_layer: int, threshold: Callable[[], Threshold] | None = None) -> LayerDrafts:
    weights = parts.config.draft_weights
    drafter = make_drafter(parts.decoder, exit_layer, weights, parts.short_head)
    return LayerDrafts(drafter, exit_layer, "" if weights == "exact" else weights, threshold)


def _layers_asked_for(parts: Parts, _: None) -> DraftSource:
    config = parts.config
    threshold: Callable[[], Threshold] | None = None
    if config.draft_confidence == "auto":
        threshold = partial(LearnedThreshold, parts.draft_ratio(config.exit_layer))
    elif config.draft_confidence is not None:
        threshold = partial(FixedThreshold, float(config.draft_confidence))
    return _layers(parts, config.exit_layer, threshold)


def _lookup(parts: Parts, longest: int) -> Lookup:
    return Lookup(longest, parts.model.config.vocab_size)


def _lookup_first(parts: Parts, otherwise: DraftSource) -> DraftSource:
    longest = parts.config.prompt_lookup
    return LookupFirst(_lookup(parts, longest), otherwise, min(_LEAST_MATCH, longest))


def _layer_arms(parts: Parts) -> Mapping[str, tuple[DraftSource, Arm]]:
    arms: dict[str, tuple[DraftSource, Arm]] = {}
    weights, num_layers, deeper = parts.config.draft_weights, len(parts.decoder.layers), ""
    of_draft_step = growth(parts.decoder, weights)
    for layer in reversed(candidate_layers(num_layers, weights)):
        source, ratio = _layers(parts, layer), parts.draft_ratio(layer)
        if layer == num_layers:
            arm = Arm(ratio, of_draft_step, _PRIOR_OF_COPY, _TRUST_IN_COPY)
        else:
            arm = Arm(ratio, of_draft_step, _PRIOR_OF_EXIT, deeper=deeper)
            deeper = source.name
        arms[source.name] = (source, arm)
    return arms


def _lookup_arms(parts: Parts) -> Mapping[str, tuple[DraftSource, Arm]]:
    longest = parts.config.prompt_lookup or _LONGEST_MATCH
    priors = [0.3 + 0.6 * matched / longest for matched in range(longest + 1)]
    return {"lookup": (_lookup(parts, longest), Arm(priors=priors))}


SOURCES: list[SourceEntry] = [
    SourceEntry(
        ("exit_layer", "num_speculations", "draft_weights", "draft_confidence", "draft_vocabulary"),
        lambda config: True,
        _layers_asked_for,
        _layer_arms,
    ),
    SourceEntry(("prompt_lookup",), lambda config: config.prompt_lookup > 0, _lookup_first, _lookup_arms),
]


def _stats(parts: Parts) -> ArmStats:
    """What earlier answers of the model have taught about such drafts on the device where it is now."""
    model, config, decoder = parts.model, parts.config, parts.decoder
    key = (
        (config.draft_weights, parts.draft_vocabulary, config.greedy, config.prompt_lookup),
        (model.device, model.dtype, decoder.dtype, is_compiled(model)),
    )
    times = PassTimes(growth(decoder), RUNS_TO_WARM_UP if is_compiled(model) else 0)
    return _LEARNT.setdefault(model, {}).setdefault(key, ArmStats(times))


def forget_what_was_learnt(model: PreTrainedModel) -> None:
    """Adaptive decoding begins with nothing known of its drafts, as in a new process."""
    _LEARNT.pop(model, None)


def driving_flags() -> tuple[str, ...]:
    """The fields of a config that say how drafts are made, and so how fast; never what the output is."""
    of_sources = {name for kind in SOURCES for name in kind.flags}
    return ("generation_strategy", *(f.name for f in fields(GenerationConfig) if f.name in of_sources))


def is_replayable(config: GenerationConfig) -> bool:
    """Whether all drafts are those of one exit and one length, so that a replay can follow them."""
    return [kind for kind in SOURCES if kind.asked_for(config)] == SOURCES[
        :1
    ] and config.draft_confidence is None
