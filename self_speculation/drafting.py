"""Where drafts come from. A source has two methods: `draft` proposes, `learn` is told what became of it.

Verification makes any draft safe, as long as it says what distribution its tokens were drawn from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from self_speculation.generator_base import DraftWeights, GenerationConfig
from self_speculation.llama_model_utils import Decoder, cost_ratio, forward_early
from self_speculation.output import Output
from self_speculation.policy import FixedThreshold, LearnedThreshold, LookupPolicy, Threshold
from self_speculation.prompt_lookup import NgramIndex
from self_speculation.quantized_layers import quantized
from self_speculation.sampling import Sampler


@dataclass(frozen=True)
class Draft:
    """k guesses, k >= 0, and what of the work for them verification can go on from."""

    source: str  # of what kind, for the statistics
    tokens: Tensor  # [k]
    probabilities: Tensor | None  # [k, V] what they were drawn from; None when greedy
    exit_layer: int = 0  # the first layer that has not seen them: none has where it is 0
    exit_hidden: list[Tensor] = field(default_factory=list)  # k of [1, 1, H], of the token before each guess


class DraftSource(Protocol):
    """One generation's."""

    def draft(self, output: Output, k: int) -> Draft:
        """Propose at most k tokens behind the output; the cache may hold what the draft's layers left."""

    def learn(self, draft: Draft, num_accepted: int) -> None:
        """What became of the last draft."""


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
    policy = LookupPolicy(config.prompt_lookup, draft_step)
    return LookupFirst(layers, prompt, NgramIndex(config.prompt_lookup), policy, model.config.vocab_size)


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
        if self._exact:
            return Draft("layers", tokens, q, self._exit_layer, exit_hidden)
        self._drafter.cache.truncate(start)
        return Draft("layers", tokens, q)

    def learn(self, draft: Draft, num_accepted: int) -> None:  # noqa: ARG002
        if self._threshold is not None:
            self._threshold.learn(self._confidences, num_accepted)

    def _goes_on(self, token: Tensor, probabilities: Tensor | None, logits: Tensor) -> bool:
        assert self._threshold is not None
        if probabilities is None:
            probabilities = logits.float().softmax(-1)
        self._confidences.append(float(probabilities[0, token]))
        return self._threshold.goes_on(self._confidences)


class LookupFirst:
    """What followed the last tokens when they stood before; where they did not, or it has not paid, another
    source's draft.

    Args:
        prompt: its ids.
        vocab_size: width of the logits.
    """

    def __init__(
        self,
        otherwise: DraftSource,
        prompt: list[int],
        index: NgramIndex,
        policy: LookupPolicy,
        vocab_size: int,
    ) -> None:
        self._otherwise, self._index, self._policy, self._vocab_size = otherwise, index, policy, vocab_size
        self._prompt_length = len(prompt)
        self._matched = 0
        index.extend(prompt)

    def draft(self, output: Output, k: int) -> Draft:
        self._index.extend(output.tokens[len(self._index) - self._prompt_length :])
        self._matched, ids = self._index.lookup(k)
        if not ids or not self._policy.pays(self._matched):
            self._matched = 0
            return self._otherwise.draft(output, k)
        tokens = torch.tensor(ids, device=output.history().device)
        for i in range(len(ids)):
            output.propose(tokens[i : i + 1], i)
        q = tokens.new_zeros(len(ids), self._vocab_size, dtype=torch.float32)
        return Draft("lookup", tokens, q.scatter_(1, tokens[:, None], 1.0))

    def learn(self, draft: Draft, num_accepted: int) -> None:
        if self._matched:
            self._policy.learn_lookup(self._matched, num_accepted)
        else:
            self._policy.learn_layers(len(draft.tokens), num_accepted)
            self._otherwise.learn(draft, num_accepted)
