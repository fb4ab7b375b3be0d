"""Drafts by the first layers of the model, or by a copy of them in fewer bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from self_speculation.decoding.batch import Batch
from self_speculation.decoding.sampling import SampledTokens
from self_speculation.drafts.draft import Confidences, Draft, DraftSource, PerSequence
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
        """Learn from the outcome of a draft."""


class LearnedThreshold(FixedThreshold):
    """Ends a draft when another token would cost more time than it is expected to save.

    A token is worth the chance that the draft so far is accepted, times the acceptance of the next token. It
    costs the tokens that could be generated in the same time.

    Args:
        draft_step: cost of a drafted token, in verifications.
    """

    def __init__(self, draft_step: float) -> None:
        self._draft_step = draft_step
        self._acceptance, self._next = AcceptanceByConfidence(), DecayedMean(0.5)
        self._tokens, self._cost = DecayedMean(2.0), DecayedMean(1.0 + 2 * draft_step)

    def goes_on(self, confidences: Sequence[float]) -> bool:
        needed = self._draft_step * self._tokens.value / self._cost.value / self._next.value
        return self._acceptance.all_accepted(confidences) >= min(1.0, needed)

    def learn(self, confidences: Sequence[float], num_accepted: int) -> None:
        for i, confidence in enumerate(confidences[: num_accepted + 1]):
            self._acceptance[confidence].add(i < num_accepted)
            self._next.add(i < num_accepted)
        self._tokens.add(num_accepted + 1.0)
        self._cost.add(1.0 + len(confidences) * self._draft_step)


class LayerDrafts(DraftSource):
    """The first layers draft: each pass gives every row one token.

    Reads from the device: one for each drafted token if drafts end by confidence or are shown; otherwise
    none. A GPU begins the next pass of the model's own layers before that read arrives. If the draft ends
    there, the pass is not lost: verification needs the last token's state at the exit layer anyway.

    Args:
        drafter: runs the model's layers, or a copy of them.
        exit_layer: number of layers that draft.
        copied_in: format of the copy; empty: the model's own layers draft. Verification starts from their
            cache and exit states; those of a copy are less exact and dropped.
        threshold: makes the rule that ends a sequence's drafts before k tokens; None: no rule. Passes go on
            until the drafts of all rows have ended.
    """

    def __init__(
        self,
        drafter: ModelRunner,
        exit_layer: int,
        copied_in: str = "",
        threshold: Callable[[], FixedThreshold] | None = None,
    ) -> None:
        self._drafter, self._exit_layer, self._keeps_cache = drafter, exit_layer, not copied_in
        self.name = f"exit {exit_layer}, {copied_in}" if copied_in else f"exit {exit_layer}"
        self._thresholds = None if threshold is None else PerSequence(lambda sequence: threshold())
        self._goes_on: Callable[[Batch, Confidences], Sequence[bool]] | None = None
        if self._thresholds is not None:
            self._goes_on = self._by_thresholds
        self._runs_ahead = self._keeps_cache and drafter.rotary.device.type == "cuda"

    def end_drafts_by(self, goes_on: Callable[[Confidences], bool]) -> None:
        self._goes_on = lambda batch, confidences: [goes_on(confidences)] * len(batch)

    def _by_thresholds(self, batch: Batch, confidences: Confidences) -> list[bool]:
        assert self._thresholds is not None
        pairs = zip(batch.sequences, confidences, strict=True)
        return [bool(own) and self._thresholds[sequence].goes_on(own) for sequence, own in pairs]

    def draft(self, batch: Batch, k: int, wanted: Sequence[bool] | None = None) -> Draft:
        if isinstance(self._drafter.head, ShortHead):
            self._drafter.head.see(batch.sequences)
        limits = batch.draft_limits(k, wanted)
        inputs, num_drafted, reading = batch.last, 0, None
        sampled_tokens: list[SampledTokens] = []
        exit_hidden: list[Tensor] = []
        confidences: list[list[float]] = [[] for _ in limits]
        # The token that ends a draft stays in it: dropping tokens by their value would bias the output.
        while num_drafted < max(limits):
            early = forward_early(self._drafter, inputs, self._exit_layer)
            exit_hidden.append(early.hidden)
            if self._runs_ahead:
                limits = self._shortened(batch, limits, num_drafted, reading, confidences)
                if num_drafted >= max(limits):
                    break
            is_drafting = [num_drafted < limit for limit in limits]
            sampled, logits = batch.sample_draft(early.logits[:, 0], num_drafted, is_drafting)
            sampled_tokens.append(sampled)
            inputs = sampled.tokens[:, None]
            reading = batch.propose(
                sampled.tokens, num_drafted, is_drafting, self._confidence(sampled, logits)
            )
            num_drafted += 1
            if not self._runs_ahead or num_drafted == max(limits):
                limits = self._shortened(batch, limits, num_drafted, reading, confidences)
        tokens, probabilities = batch.stack(sampled_tokens, self._drafter.config.vocab_size)
        return Draft(
            batch.sampler,
            [self.name] * len(limits),
            tokens,
            probabilities,
            limits,
            self._exit_layer if self._keeps_cache else 0,
            exit_hidden if self._keeps_cache else [],
            confidences,
        )

    def passes(self, runner: ModelRunner, longest: int) -> Iterator[PassRange]:
        yield PassRange(self._drafter, 0, self._exit_layer)
        yield PassRange(runner, self._exit_layer if self._keeps_cache else 0, len(runner.layers), longest + 1)

    def learn(self, batch: Batch, draft: Draft, num_accepted: Sequence[int]) -> None:
        if self._thresholds is None:
            return
        for row, sequence in enumerate(batch.sequences):
            if draft.sources[row] == self.name:
                self._thresholds[sequence].learn(draft.confidences[row], num_accepted[row])

    def _shortened(
        self,
        batch: Batch,
        limits: list[int],
        num_drafted: int,
        reading: Reading | None,
        confidences: list[list[float]],
    ) -> list[int]:
        """Read the confidences of the last tokens, and limit the drafts that end with them."""
        if self._goes_on is None or reading is None:
            return limits
        for row, limit in enumerate(limits):
            if len(confidences[row]) < min(limit, num_drafted):
                confidences[row].append(reading.wait()[len(batch) + row])
        if num_drafted >= max(limits):
            return limits
        pairs = zip(limits, self._goes_on(batch, confidences), strict=True)
        return [limit if goes_on else min(limit, num_drafted) for limit, goes_on in pairs]

    def _confidence(self, sampled: SampledTokens, logits: Tensor) -> Tensor | None:
        """[B] probabilities of tokens sampled from logits [B, V]; None if not needed."""
        if self._goes_on is None:
            return None
        probabilities = sampled.probabilities
        if probabilities is None:
            probabilities = logits.float().softmax(-1)
        # NaN where processors forbid every token of a short head.
        return probabilities.gather(1, sampled.tokens[:, None])[:, 0].nan_to_num(0.0)
