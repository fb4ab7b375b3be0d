"""Where drafts come from. A source has two methods: `draft` proposes, `learn` is told what became of it.

Verification makes any draft safe, as long as it says what distribution its tokens were drawn from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from self_speculation.config import DraftWeights, GenerationConfig
from self_speculation.decoding.output import Output
from self_speculation.decoding.sampling import Sampler
from self_speculation.drafts.policy import (
    AdaptivePolicy,
    FixedThreshold,
    LearnedThreshold,
    LookupPolicy,
    Plan,
    Threshold,
)
from self_speculation.drafts.prompt_lookup import NgramIndex
from self_speculation.model.decoder import Decoder, cost_ratio, forward_early
from self_speculation.model.quantized_layers import quantized


@dataclass(frozen=True)
class Draft:
    """k guesses, k >= 0, and what of the work for them verification can go on from."""

    source: str  # of what kind, for the statistics
    tokens: Tensor  # [k]
    probabilities: Tensor | None  # [k, V] what they were drawn from; None when greedy
    exit_layer: int = 0  # the first layer that has not seen them: none has where it is 0
    exit_hidden: list[Tensor] = field(default_factory=list)  # k of [1, 1, H], of the token before each guess
    probe: int = 0  # an exit layer beyond exit_layer to be read at verification; 0: none


class DraftSource(Protocol):
    """One generation's."""

    def draft(self, output: Output, k: int) -> Draft:
        """Propose at most k tokens behind the output; the cache may hold what the draft's layers left."""

    def learn(self, draft: Draft, num_accepted: int, agreement: Sequence[float]) -> None:
        """What became of the last draft, and of the exit that it asked to read: the chances that its guesses
        would have been accepted, up to the first position that was rejected.
        """


def make_source(
    model: PreTrainedModel, decoder: Decoder, sampler: Sampler, config: GenerationConfig, prompt: list[int]
) -> DraftSource:
    """What the config asks for. Raises what `quantized` does."""
    draft_step = draft_cost(model, config)
    threshold: Threshold | None = None
    if config.draft_confidence is not None:
        auto = config.draft_confidence == "auto"
        threshold = LearnedThreshold(draft_step) if auto else FixedThreshold(float(config.draft_confidence))
    layers = LayerDrafts(decoder, sampler, config.exit_layer, config.draft_weights, threshold)
    if not config.prompt_lookup:
        return layers
    lookup = Lookup(prompt, config.prompt_lookup, model.config.vocab_size)
    return LookupFirst(lookup, layers, LookupPolicy(config.prompt_lookup, draft_step))


def draft_cost(model: PreTrainedModel, config: GenerationConfig) -> float:
    """c, of one token drafted with layers to a full pass over one, by bytes of weights read."""
    ratio = cost_ratio(model, config.exit_layer)
    return ratio if config.draft_weights == "exact" else ratio / model.dtype.itemsize


def make_drafter(decoder: Decoder, num_layers: int, draft_weights: DraftWeights) -> Decoder:
    """What runs the first layers for a draft. Raises what `quantized` does."""
    return decoder if draft_weights == "exact" else quantized(decoder, num_layers)


class LayerDrafts:
    """Guesses of the first layers, one pass each.

    Args:
        decoder: the target's.
        exit_layer: so many layers.
        draft_weights: whether they are the target's own, so that what they leave behind is what verification
            needs, or a copy that is less exact, of which nothing remains.
        threshold: when to stop before k; None: never.
    """

    def __init__(
        self,
        decoder: Decoder,
        sampler: Sampler,
        exit_layer: int,
        draft_weights: DraftWeights = "exact",
        threshold: Threshold | None = None,
    ) -> None:
        self._drafter = make_drafter(decoder, exit_layer, draft_weights)
        self._sampler, self._exit_layer, self._threshold = sampler, exit_layer, threshold
        self._exact = draft_weights == "exact"
        self._confidences: list[float] = []

    def draft(self, output: Output, k: int) -> Draft:
        start = self._drafter.cache.length(0)
        probabilities: list[Tensor] = []
        exit_hidden: list[Tensor] = []
        self._confidences = []
        for i in range(k):
            early = forward_early(self._drafter, output.last(num_drafted=i), self._exit_layer)
            logits = output.process(early.logits[0], i)  # [1, V]
            choice = self._sampler(logits)
            output.propose(choice.tokens, i)
            exit_hidden.append(early.hidden)
            if choice.probabilities is not None:
                probabilities.append(choice.probabilities)
            # The token that ends a draft is part of it: to leave it out for what it is would change the
            # distribution of the output.
            if self._threshold is not None and not self._goes_on(choice.tokens, choice.probabilities, logits):
                break
        tokens = output.drafted(len(exit_hidden))
        q = torch.cat(probabilities) if probabilities else None
        source = f"exit {self._exit_layer}"
        if self._exact:
            return Draft(source, tokens, q, self._exit_layer, exit_hidden)
        self._drafter.cache.truncate(start)
        return Draft(source, tokens, q)

    def learn(self, draft: Draft, num_accepted: int, agreement: Sequence[float]) -> None:  # noqa: ARG002
        if self._threshold is not None:
            self._threshold.learn(self._confidences, num_accepted)

    def _goes_on(self, token: Tensor, probabilities: Tensor | None, logits: Tensor) -> bool:
        assert self._threshold is not None
        if probabilities is None:
            probabilities = logits.float().softmax(-1)
        self._confidences.append(float(probabilities[0, token]))
        return self._threshold.goes_on(self._confidences)


class Lookup:
    """What followed the last tokens of prompt and output when they stood there before.

    Args:
        prompt: its ids.
        longest: tokens that are matched at most.
        vocab_size: width of the logits.
    """

    def __init__(self, prompt: list[int], longest: int, vocab_size: int) -> None:
        self._prompt_length, self._vocab_size = len(prompt), vocab_size
        self._index = NgramIndex(longest)
        self._index.extend(prompt)

    def find(self, output: Output, k: int) -> tuple[int, list[int]]:
        """How many of the last tokens were found, and k ids that followed."""
        self._index.extend(output.tokens[len(self._index) - self._prompt_length :])
        return self._index.lookup(k)

    def draft(self, output: Output, ids: list[int]) -> Draft:
        tokens = torch.tensor(ids, device=output.history().device)
        for i in range(len(ids)):
            output.propose(tokens[i : i + 1], i)
        q = tokens.new_zeros(len(ids), self._vocab_size, dtype=torch.float32)
        return Draft("lookup", tokens, q.scatter_(1, tokens[:, None], 1.0))


class LookupFirst:
    """Lookups; where nothing is found, or it has not paid, another source's draft."""

    def __init__(self, lookup: Lookup, otherwise: DraftSource, policy: LookupPolicy) -> None:
        self._lookup, self._otherwise, self._policy = lookup, otherwise, policy
        self._matched = 0

    def draft(self, output: Output, k: int) -> Draft:
        self._matched, ids = self._lookup.find(output, k)
        if ids and self._policy.pays(self._matched):
            return self._lookup.draft(output, ids)
        self._matched = 0
        return self._otherwise.draft(output, k)

    def learn(self, draft: Draft, num_accepted: int, agreement: Sequence[float]) -> None:
        if self._matched:
            self._policy.learn_lookup(self._matched, num_accepted)
        else:
            self._policy.learn_layers(len(draft.tokens), num_accepted)
            self._otherwise.learn(draft, num_accepted, agreement)


class AdaptiveDrafts:
    """Round by round what a policy plans: a draft of one of several exits, a lookup, or nothing."""

    # A draft may become so much longer than planned while it is confident.
    _SLACK = 4

    def __init__(self, lookup: Lookup, by_layer: dict[int, LayerDrafts], policy: AdaptivePolicy) -> None:
        self._lookup, self._by_layer, self._policy = lookup, by_layer, policy
        self._plan = Plan()

    def draft(self, output: Output, k: int) -> Draft:
        matched, ids = self._lookup.find(output, k)
        self._plan = plan = self._policy.plan(matched, k)
        if plan.matched:
            draft = self._lookup.draft(output, ids[: plan.length])
        elif plan.exit_layer:
            draft = self._by_layer[plan.exit_layer].draft(output, min(k, plan.length + self._SLACK))
        else:
            draft = Draft("none", output.drafted(0), None)
        return replace(draft, probe=plan.probe)

    def learn(self, draft: Draft, num_accepted: int, agreement: Sequence[float]) -> None:
        self._policy.learn(self._plan, len(draft.tokens), num_accepted, agreement)
        if self._plan.exit_layer:
            self._by_layer[self._plan.exit_layer].learn(draft, num_accepted, agreement)
