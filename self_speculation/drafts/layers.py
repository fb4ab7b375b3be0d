"""Drafts by the first layers of the model, or by a copy of them in fewer bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from self_speculation.decoding.batch import Batch
from self_speculation.decoding.sampling import SampledTokens
from self_speculation.drafts.draft import Draft, DraftSource, PerSequence
from self_speculation.drafts.threshold import Threshold
from self_speculation.model.captured_runner import PassRange
from self_speculation.model.model_runner import ModelRunner, forward_early
from self_speculation.model.short_head import ShortHead

Confidences = Sequence[Sequence[float]]  # [B][k] the probabilities of drafted tokens


class LayerDrafts(DraftSource):
    """The first layers draft: each pass gives every row one token.

    Reads from the device: one for each drafted token if drafts end by confidence or are shown; otherwise
    none. A GPU begins the next pass of the model's own layers before that read arrives. If the draft ends
    there, the pass is not lost: verification needs the last token's state at the exit layer anyway.

    Args:
        drafter: runs the model's layers, or a copy of them.
        exit_layer: number of layers that draft.
        copied_in: the format of the copy; empty: the model's own layers draft. Verification starts from
            their cache and exit states; those of a copy are less exact and dropped.
        threshold: makes the rule that ends a sequence's drafts before k tokens; None: no rule. Passes go on
            until the drafts of all rows have ended.
    """

    def __init__(
        self,
        drafter: ModelRunner,
        exit_layer: int,
        copied_in: str = "",
        threshold: Callable[[], Threshold] | None = None,
    ) -> None:
        self._drafter, self._exit_layer, self._keeps_cache = drafter, exit_layer, not copied_in
        self.name = f"exit {exit_layer}, {copied_in}" if copied_in else f"exit {exit_layer}"
        self._thresholds = None if threshold is None else PerSequence(lambda sequence: threshold())
        self._goes_on: Callable[[Batch, Confidences], Sequence[bool]] | None = None
        if self._thresholds is not None:
            self._goes_on = self._by_thresholds
        self._runs_ahead = self._keeps_cache and drafter.rotary.device.type == "cuda"

    def draft(self, batch: Batch, k: int, wanted: Sequence[bool] | None = None) -> Draft:
        if isinstance(self._drafter.head, ShortHead):
            self._drafter.head.see(batch.sequences)
        limits = batch.draft_limits(k, wanted)
        inputs, reading = batch.last, None
        sampled_tokens: list[SampledTokens] = []
        exit_hidden: list[Tensor] = []
        lengths = [0] * len(limits)
        confidences: list[list[float]] = [[] for _ in limits]

        def end_where_unlikely() -> None:
            """Read the confidences of the last tokens, and limit the drafts that end there."""
            if self._goes_on is None or reading is None:
                return
            new = [row for row, length in enumerate(lengths) if len(confidences[row]) < length]
            for row in new:
                confidences[row].append(reading.wait()[len(batch) + row])
            if new and max(limits) > max(lengths):
                for row, goes_on in enumerate(self._goes_on(batch, confidences)):
                    limits[row] = limits[row] if goes_on else lengths[row]

        # The token that ends a draft stays in it: dropping tokens by their value would bias the output.
        for i in range(max(limits)):
            if not self._runs_ahead:
                end_where_unlikely()
                if i >= max(limits):
                    break
            early = forward_early(self._drafter, inputs, self._exit_layer)
            exit_hidden.append(early.hidden)
            end_where_unlikely()
            is_drafting = [i < limit for limit in limits]
            if not any(is_drafting):
                break
            sampled, logits = batch.sample_draft(early.logits[:, 0], i, is_drafting)
            sampled_tokens.append(sampled)
            lengths = [length + drafts for length, drafts in zip(lengths, is_drafting, strict=True)]
            reading = batch.propose(sampled.tokens, i, is_drafting, self._confidence(sampled, logits))
            inputs = sampled.tokens[:, None]
        end_where_unlikely()  # `learn` needs the last confidences
        tokens, probabilities = batch.stack(sampled_tokens, self._drafter.config.vocab_size)
        return Draft(
            batch.sampler,
            [self.name] * len(limits),
            tokens,
            probabilities,
            lengths,
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

    def end_drafts_by(self, goes_on: Callable[[Confidences], bool]) -> None:
        self._goes_on = lambda batch, confidences: [goes_on(confidences)] * len(batch)

    def _by_thresholds(self, batch: Batch, confidences: Confidences) -> list[bool]:
        assert self._thresholds is not None
        pairs = zip(batch.sequences, confidences, strict=True)
        return [bool(own) and self._thresholds[sequence].goes_on(own) for sequence, own in pairs]

    def _confidence(self, sampled: SampledTokens, logits: Tensor) -> Tensor | None:
        """[B] probabilities of tokens sampled from logits [B, V]; None if not needed."""
        if self._goes_on is None:
            return None
        probabilities = sampled.probabilities
        if probabilities is None:
            probabilities = logits.float().softmax(-1)
        # NaN where processors forbid every token of a short head.
        return probabilities.gather(1, sampled.tokens[:, None])[:, 0].nan_to_num(0.0)
