"""Drafts by the first layers of the model, or by a copy of them in fewer bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from self_speculation.decoding.output import Output, Reading
from self_speculation.decoding.sampling import Choice, Sampler
from self_speculation.drafts.draft import Draft, DraftSource
from self_speculation.drafts.policy import Threshold
from self_speculation.model.decoder import Decoder, forward_early


class LayerDrafts(DraftSource):
    """Guesses of the first layers, one pass each.

    Reads from the device: none, but one for each drafted token where a threshold decides whether another
    follows, or where drafts are shown; one, not two, where both is so. A GPU begins the next pass before the
    threshold is asked: if that ends the draft, verification finds its last token's first layers done.

    Args:
        drafter: what runs the layers.
        exit_layer: so many layers.
        keeps_cache: whether they leave in the cache, and as exit states, what verification can go on from.
            The model's own layers do; those of a copy are less exact, and all that they leave is removed.
        threshold: when to stop before k; None: never.
    """

    def __init__(
        self,
        drafter: Decoder,
        sampler: Sampler,
        exit_layer: int,
        keeps_cache: bool = True,
        threshold: Threshold | None = None,
    ) -> None:
        self._drafter, self._sampler, self._exit_layer = drafter, sampler, exit_layer
        self._keeps_cache, self._threshold = keeps_cache, threshold
        self._runs_ahead = drafter.rotary.device.type == "cuda"

    def draft(self, output: Output, k: int) -> Draft:
        start = self._drafter.cache.length(0)
        choices: list[Choice] = []
        exit_hidden: list[Tensor] = []
        confidences: list[float] = []
        reading: Reading | None = None
        # The token that ends a draft is part of it: to leave it out for what it is would change the
        # distribution of the output.
        while len(choices) < k and (self._runs_ahead or self._goes_on(reading, confidences)):
            i = len(choices)
            early = forward_early(self._drafter, output.last(num_drafted=i), self._exit_layer)
            exit_hidden.append(early.hidden)
            if self._runs_ahead and not self._goes_on(reading, confidences):
                break
            logits = output.process(early.logits[0], i)  # [1, V]
            choices.append(self._sampler(logits))
            reading = output.propose(choices[i].tokens, i, self._confidence(choices[i], logits))
        if len(confidences) < len(choices):  # nothing depends on the last one, but it is learnt from
            self._goes_on(reading, confidences)
        drawn_from = [choice.probabilities for choice in choices if choice.probabilities is not None]
        draft = Draft(
            f"exit {self._exit_layer}",
            output.drafted(len(choices)),
            torch.cat(drawn_from) if drawn_from else None,
            confidences=confidences,
        )
        if self._keeps_cache:
            return replace(draft, exit_layer=self._exit_layer, exit_hidden=exit_hidden)
        self._drafter.cache.truncate(start)
        return draft

    def learn(self, draft: Draft, num_accepted: int, agreement: Sequence[float]) -> None:  # noqa: ARG002
        if self._threshold is not None:
            self._threshold.learn(draft.confidences, num_accepted)

    def _goes_on(self, reading: Reading | None, confidences: list[float]) -> bool:
        """Whether another token is wanted after the last one, which is being read; keeps its confidence."""
        if self._threshold is None or reading is None:
            return True
        confidences.append(reading.wait()[1])
        return self._threshold.goes_on(confidences)

    def _confidence(self, choice: Choice, logits: Tensor) -> Tensor | None:
        """[1] the probability of the token chosen by logits [1, V], if anybody asks for it."""
        if self._threshold is None:
            return None
        probabilities = choice.probabilities
        if probabilities is None:
            probabilities = logits.float().softmax(-1)
        return probabilities[0, choice.tokens]
