"""Picks the draft source with the best expected speed, or none, in each round."""

from __future__ import annotations

from collections import abc
from collections.abc import Mapping

from transformers import PreTrainedModel

from self_speculation.decoding.batch import Batch
from self_speculation.decoding.sequence import Sequence
from self_speculation.drafts.draft import Draft, DraftSource, Guess, draft_by_rows, no_draft
from self_speculation.drafts.policy import PLAIN, AdaptivePolicy
from self_speculation.model.captured_runner import PassRange, num_prepared
from self_speculation.model.devices import broadcast_from_rank0
from self_speculation.model.model_runner import ModelRunner
from self_speculation.transfers import Stopwatch


class AdaptiveDrafts(DraftSource):
    """Drafts as an `AdaptivePolicy` plans: from layers, from n-grams, from both, or not at all.

    Reads from the device: those of the sources that draft.

    Args:
        model: all its ranks make the same plans.
        sources: by name.
    """

    def __init__(
        self, model: PreTrainedModel, sources: Mapping[str, DraftSource], policy: AdaptivePolicy
    ) -> None:
        self._model, self._sources, self._policy, self._device = model, sources, policy, model.device
        self._stopwatch, self._num_prepared = Stopwatch(self._device), 0
        self._guesses: list[tuple[str, Guess, Sequence, int]] = []  # of the last round, with their positions

    def draft(self, batch: Batch, k: int, wanted: abc.Sequence[bool] | None = None) -> Draft:
        self._stopwatch, self._num_prepared = Stopwatch(self._device), num_prepared(self._model)
        self._check_guesses()
        matched: dict[str, list[int | None]] = {}
        for name in self._policy.free_sources:
            guesses = self._sources[name].guesses(batch)
            matched[name] = [None if guess is None else guess.matched for guess in guesses]
            for sequence, guess in zip(batch.sequences, guesses, strict=True):
                if guess is not None and guess.next_id is not None:
                    self._guesses.append((name, guess, sequence, sequence.length))
        plan = self._policy.plan(matched, batch.draft_limits(k, wanted))
        draft = None
        if plan.length:
            lookups = plan.lookups or [PLAIN] * len(batch)
            parts = [
                (self._sources[name], min(k, plan.looked_up), [name == lookup for lookup in lookups])
                for name in sorted({*lookups} - {PLAIN})
            ]
            if plan.source != PLAIN:
                rows = zip(lookups, wanted or [True] * len(batch), strict=True)
                rest = [is_wanted and lookup == PLAIN for lookup, is_wanted in rows]
                parts.append((self._sources[plan.source], min(k, plan.length), rest))
            draft = draft_by_rows(batch, parts)
        self._stopwatch.split()
        return draft or no_draft(batch, self._model.config.vocab_size)

    def passes(self, runner: ModelRunner, longest: int) -> abc.Iterator[PassRange]:
        for source in self._sources.values():
            yield from source.passes(runner, longest)

    def learn(self, batch: Batch, draft: Draft, num_accepted: abc.Sequence[int]) -> None:
        seconds = broadcast_from_rank0(self._model, self._stopwatch.stop())
        self._policy.learn(
            draft.sources,
            draft.matched or [0] * len(batch),
            draft.confidences,
            draft.lengths,
            num_accepted,
            # A round that traces or captures a pass takes ten times as long.
            seconds if num_prepared(self._model) == self._num_prepared else None,
        )

    def _check_guesses(self) -> None:
        """Compare the guesses of the last round with the committed tokens."""
        for name, guess, sequence, position in self._guesses:
            if sequence.length > position:
                self._policy.see(name, guess.matched, sequence.ids_from(position)[0] == guess.next_id)
        self._guesses = []
