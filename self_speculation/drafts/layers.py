"""Drafts by the first layers of the model, or by a copy of them in fewer bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from torch import Tensor

from self_speculation.config import DraftWeights
from self_speculation.decoding.batch import Batch
from self_speculation.decoding.sampling import SampledTokens
from self_speculation.drafts.draft import Confidences, Draft, DraftSource, GoesOn, PerSequence
from self_speculation.drafts.estimates import AcceptanceByConfidence, DecayedMean
from self_speculation.model.captured_runner import PassRange
from self_speculation.model.model_runner import ModelRunner, forward_early
from self_speculation.model.short_head import ShortHead
from self_speculation.transfers import Reading


class FixedThreshold:
    """Ends a draft after a token whose own probability is below the threshold."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def goes_on(self, confidences: Sequence[float]) -> bool:
        """Whether to draft another token after those with these probabilities."""
        return confidences[-1] >= self.threshold

    def learn(self, confidences: Sequence[float], num_accepted: int) -> None:
        """A fixed threshold learns nothing."""


class LearnedThreshold:
    """Ends a draft when another token would cost more time than it is expected to save.

    The draft goes on while P(all its tokens are accepted) * P(the next one is accepted) is at least
    `draft_step` * mean output per time.

    Args:
        draft_step: time of a drafted token, in verifications.
    """

    def __init__(self, draft_step: float) -> None:
        self._draft_step = draft_step
        self._acceptance, self._next = AcceptanceByConfidence(), DecayedMean(0.5)
        # Means per round. First guess: two tokens drafted, one accepted.
        self._tokens, self._cost = DecayedMean(2.0), DecayedMean(1.0 + 2 * draft_step)

    def goes_on(self, confidences: Sequence[float]) -> bool:
        needed = self._draft_step * self._tokens.value / self._cost.value / self._next.value
        # At most 1: a draft that is certain to be accepted goes on.
        return self._acceptance.all_accepted(confidences) >= min(1.0, needed)

    def learn(self, confidences: Sequence[float], num_accepted: int) -> None:
        for i, confidence in enumerate(confidences[: num_accepted + 1]):
            self._acceptance[confidence].add(i < num_accepted)
            self._next.add(i < num_accepted)
        self._tokens.add(num_accepted + 1.0)
        self._cost.add(1.0 + len(confidences) * self._draft_step)


Threshold = FixedThreshold | LearnedThreshold


class LayerDrafts(DraftSource):
    """The first layers draft: each pass gives one token to every row whose draft has not ended.

    Reads from the device: one per B tokens if drafts end by confidence or are shown; otherwise none. If the
    model's own layers draft and no draft is shown, a GPU begins the next pass before that read arrives. If
    the draft ends there, the pass is not lost: verification needs the last token's exit state anyway.

    Args:
        drafter: runs the model's layers, or a copy of them.
        exit_layer: number of layers that draft.
        draft_weights: exact: the model's own layers draft, and verification starts from their cache and exit
            states. Those of a copy are less exact, and dropped.
        thresholds: end the drafts of a sequence early; None: drafts are as long as their limits.
    """

    def __init__(
        self,
        drafter: ModelRunner,
        exit_layer: int,
        draft_weights: DraftWeights = "exact",
        thresholds: PerSequence[Threshold] | None = None,
    ) -> None:
        self.drafter, self.exit_layer, self._thresholds = drafter, exit_layer, thresholds
        self._keeps_cache = draft_weights == "exact"
        self.name = f"exit {exit_layer}" if self._keeps_cache else f"exit {exit_layer}, {draft_weights}"
        self._runs_ahead = self._keeps_cache and drafter.rotary.device.type == "cuda"

    def draft(self, batch: Batch, limits: Sequence[int]) -> Draft:
        if isinstance(self.drafter.head, ShortHead):
            self.drafter.head.seen.read(batch.sequences)
        goes_on = self.goes_on
        if goes_on is None and self._thresholds is not None:
            goes_on = partial(_by_thresholds, [self._thresholds[sequence] for sequence in batch.sequences])
        inputs, num_drafted, reading = batch.last, 0, None
        sampled_tokens: list[SampledTokens] = []
        exit_hidden: list[Tensor] = []
        confidences: list[list[float]] = [[] for _ in limits]
        # The token that ends a draft stays in it: dropping tokens by their value would bias the output.
        while num_drafted < max(limits):
            early = forward_early(self.drafter, inputs, self.exit_layer)
            exit_hidden.append(early.hidden)
            if self._runs_ahead:  # by the last token: this pass is queued already
                limits = _shortened(goes_on, limits, num_drafted, reading, confidences)
                if num_drafted >= max(limits):
                    break
            is_drafting = [num_drafted < limit for limit in limits]
            sampled, logits = batch.sample_draft(early.logits[:, 0], num_drafted, is_drafting)
            sampled_tokens.append(sampled)
            inputs = sampled.tokens[:, None]
            confidence = None if goes_on is None else batch.sampler.confidence(sampled, logits)
            reading = batch.record_draft(sampled.tokens, num_drafted, is_drafting, confidence)
            num_drafted += 1
            if not self._runs_ahead or num_drafted == max(limits):
                limits = _shortened(goes_on, limits, num_drafted, reading, confidences)
        tokens, probabilities = batch.stack(sampled_tokens)
        return Draft(
            [self.name] * len(limits),
            tokens,
            probabilities,
            limits,
            self.exit_layer if self._keeps_cache else 0,
            exit_hidden if self._keeps_cache else [],
            confidences,
        )

    def passes(self, runner: ModelRunner, longest: int) -> Iterator[PassRange]:
        yield PassRange(self.drafter, 0, self.exit_layer)
        yield PassRange(runner, self.exit_layer if self._keeps_cache else 0, len(runner.layers), longest + 1)

    def learn(self, batch: Batch, draft: Draft, num_accepted: Sequence[int]) -> None:
        if self._thresholds is None:
            return
        for row, sequence in enumerate(batch.sequences):
            if draft.sources[row] == self.name and draft.lengths[row]:
                self._thresholds[sequence].learn(draft.confidences[row], num_accepted[row])


def _by_thresholds(thresholds: Sequence[Threshold], confidences: Confidences) -> list[bool]:
    return [bool(own) and rule.goes_on(own) for rule, own in zip(thresholds, confidences, strict=True)]


def _shortened(
    goes_on: GoesOn | None,
    limits: Sequence[int],
    num_drafted: int,
    reading: Reading | None,
    confidences: list[list[float]],
) -> Sequence[int]:
    """Read the confidences of the last tokens, and limit the drafts that end with them."""
    if goes_on is None or reading is None:
        return limits
    latest = reading.wait()[len(limits) :]  # behind the tokens
    for row, limit in enumerate(limits):
        if len(confidences[row]) < min(limit, num_drafted):  # this row drafted the last token
            confidences[row].append(latest[row])
    if num_drafted >= max(limits):
        return limits
    pairs = zip(limits, goes_on(confidences), strict=True)
    return [limit if more else min(limit, num_drafted) for limit, more in pairs]
