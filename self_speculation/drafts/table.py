"""The sources of drafts by what asks for them: a new one is a class, an entry here, and its flags.

What drives drafting, what adaptive decoding chooses among and what a sweep can predict follows from here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial

from transformers import PreTrainedModel

from self_speculation.config import LONGEST_DRAFT, DraftWeights, GenerationConfig
from self_speculation.drafts.adaptive import AdaptiveDrafts
from self_speculation.drafts.costs import Costs
from self_speculation.drafts.draft import DraftSource
from self_speculation.drafts.layers import LayerDrafts
from self_speculation.drafts.lookups import Lookup, LookupFirst
from self_speculation.drafts.policy import (
    AdaptivePolicy,
    Arm,
    FixedThreshold,
    LearnedThreshold,
    LookupPolicy,
    Memory,
    Threshold,
)
from self_speculation.model.decoder import Decoder
from self_speculation.model.quantized_layers import format_of, quantized
from self_speculation.model.short_head import ShortHead

# Tokens that lookups of adaptive decoding compare, unless prompt_lookup says how many.
_LONGEST_MATCH = 4

# Before anything is known: exits are right if they were trained for it, a copy of all layers mostly is.
_PRIOR_OF_EXIT, _PRIOR_OF_COPY = (0.4,), (0.9,)
# Two mistakes in the first rounds of an answer must not be the end of it.
_TRUST_IN_COPY = 6.0


@dataclass(frozen=True)
class Parts:
    """What the sources of one generation are made from."""

    model: PreTrainedModel
    decoder: Decoder  # the target's
    config: GenerationConfig
    costs: Costs  # measured for adaptive decoding, else estimated

    @property
    def copied_in(self) -> str:
        """The format of the layers that draft, once they are there; empty: they are the target's own."""
        weights = format_of(self.decoder.prepared, self.config.draft_weights)
        return "" if weights == "exact" else weights

    @property
    def memory(self) -> Memory:
        """What earlier answers of the model have taught about such drafts."""
        of_model, config = self.decoder.prepared.learnt, self.config
        kind = (config.draft_weights, config.draft_vocabulary, config.greedy, config.prompt_lookup)
        return of_model.setdefault(kind, Memory())


@dataclass(frozen=True)
class Kind:
    """
    Args:
        flags: the fields of `GenerationConfig` that are about it.
        asked_for: whether a config asks for it.
        make: the source, by what there is and the source that it may fall back on.
        arms: by name, the sources that adaptive decoding chooses among, and how each looks to its policy.
    """

    flags: tuple[str, ...]
    asked_for: Callable[[GenerationConfig], bool]
    make: Callable[[Parts, Callable[[], DraftSource]], DraftSource]
    arms: Callable[[Parts], Mapping[str, tuple[DraftSource, Arm]]]


def make_drafter(
    decoder: Decoder, num_layers: int, draft_weights: DraftWeights, draft_vocabulary: int | None = None
) -> Decoder:
    """What runs the first layers for a draft, and a head. Raises what `quantized` and `ShortHead` do."""
    drafter = decoder if draft_weights == "exact" else quantized(decoder, num_layers, draft_weights)
    if draft_vocabulary is None or draft_vocabulary >= decoder.config.vocab_size:
        return drafter
    return drafter.over(drafter.layers, ShortHead(decoder, drafter.head, draft_vocabulary))


def _layers(parts: Parts, _otherwise: Callable[[], DraftSource]) -> DraftSource:
    config = parts.config
    threshold: Callable[[], Threshold] | None = None
    if config.draft_confidence == "auto":
        threshold = partial(LearnedThreshold, parts.costs.draft_ratio(config.exit_layer))
    elif config.draft_confidence is not None:
        threshold = partial(FixedThreshold, float(config.draft_confidence))
    return _layer_drafts(parts, config.exit_layer, threshold, config.draft_vocabulary)


def _layer_drafts(
    parts: Parts, exit_layer: int, threshold: Callable[[], Threshold] | None, draft_vocabulary: int | None
) -> LayerDrafts:
    drafter = make_drafter(parts.decoder, exit_layer, parts.config.draft_weights, draft_vocabulary)
    return LayerDrafts(drafter, exit_layer, parts.copied_in, threshold)


def _layer_arms(parts: Parts) -> Mapping[str, tuple[DraftSource, Arm]]:
    """One for each exit whose cost is known, and another where its drafts may have a short vocabulary."""
    few, arms = parts.config.draft_vocabulary, {}
    for layer in parts.costs.draft_step:
        source, arm = _layer_arm(parts, layer)
        arms[source.name] = source, arm
        if few is not None and few < parts.decoder.config.vocab_size:
            short, arm = _layer_arm(parts, layer, few, like=source.name)
            arms[short.name] = short, arm
    return arms


def _layer_arm(
    parts: Parts, layer: int, vocabulary: int | None = None, like: str = ""
) -> tuple[LayerDrafts, Arm]:
    """An exit, if so with a short vocabulary, and then like the arm without one. In a batch, drafts have the
    length that was planned for all.
    """
    costs = parts.costs
    verifications = [costs.verification(layer, k) / costs.plain_step for k in range(LONGEST_DRAFT + 1)]
    # A copy of all layers is right nearly always, and to ask it how sure it is takes time.
    is_copy = layer == len(parts.decoder.layers)
    ends_itself = costs.num_rows == 1 and not is_copy
    arm = Arm(
        layer,
        _PRIOR_OF_COPY if is_copy else _PRIOR_OF_EXIT,
        trust=_TRUST_IN_COPY if is_copy else 1.0,
        slack=4 if ends_itself else 0,
        leaves_layers=parts.config.draft_weights == "exact",
        like=like,
    )
    ratio = costs.draft_ratio(layer, short_head=vocabulary is not None)
    known = parts.memory.threshold(f"{layer} {vocabulary}", ratio, verifications)
    return _layer_drafts(parts, layer, partial(_same, known) if ends_itself else None, vocabulary), arm


def _same(threshold: Threshold) -> Threshold:
    """For whichever output: what one of them teaches, the others know."""
    return threshold


def _lookup(parts: Parts, longest: int) -> Lookup:
    return Lookup(longest, parts.model.config.vocab_size)


def _lookup_first(parts: Parts, otherwise: Callable[[], DraftSource]) -> DraftSource:
    longest = parts.config.prompt_lookup
    policy = partial(LookupPolicy, longest, parts.costs.draft_ratio(parts.config.exit_layer))
    return LookupFirst(_lookup(parts, longest), otherwise(), policy)


def _lookup_arms(parts: Parts) -> Mapping[str, tuple[DraftSource, Arm]]:
    longest = parts.config.prompt_lookup or _LONGEST_MATCH
    priors = [0.3 + 0.6 * matched / longest for matched in range(longest + 1)]
    return {"lookup": (_lookup(parts, longest), Arm(priors=priors))}


# The first that a config asks for drafts, and may fall back on the next.
KINDS: list[Kind] = [
    Kind(("prompt_lookup",), lambda config: config.prompt_lookup > 0, _lookup_first, _lookup_arms),
    Kind(
        ("exit_layer", "num_speculations", "draft_weights", "draft_confidence", "draft_vocabulary"),
        lambda config: True,
        _layers,
        _layer_arms,
    ),
]


def make_source(parts: Parts) -> DraftSource:
    """What the config asks for. Raises what `quantized` does."""
    asked_for = iter([kind for kind in KINDS if kind.asked_for(parts.config)])

    def following() -> DraftSource:
        return next(asked_for).make(parts, following)

    return following()


def make_adaptive(parts: Parts) -> AdaptiveDrafts:
    """All that there are, chosen among round by round, by what earlier answers of the model have taught too.
    Raises what `quantized` does.
    """
    made = {name: arm for kind in KINDS for name, arm in kind.arms(parts).items()}
    sources = {name: source for name, (source, _) in made.items()}
    arms = {name: arm for name, (_, arm) in made.items()}
    num_layers = len(parts.decoder.layers)
    readable = {
        arm.exit_layer: name for name, arm in arms.items() if 0 < arm.exit_layer < num_layers and not arm.like
    }
    return AdaptiveDrafts(sources, AdaptivePolicy(parts.costs, arms, readable, LONGEST_DRAFT, parts.memory))


def driving_flags() -> tuple[str, ...]:
    """The fields of a config that say how drafts are made, and so how fast; never what the output is."""
    of_sources = {name for kind in KINDS for name in kind.flags}
    return ("generation_strategy", *(f.name for f in fields(GenerationConfig) if f.name in of_sources))


def is_replayable(config: GenerationConfig) -> bool:
    """Whether all drafts are those of one exit and one length, so that a replay can follow them."""
    first = next(kind for kind in KINDS if kind.asked_for(config))
    return first is KINDS[-1] and config.draft_confidence is None
