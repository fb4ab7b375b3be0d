"""Drafts of whatever source promises most, chosen round by round."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

from self_speculation.decoding.rows import Rows
from self_speculation.drafts.draft import Draft, DraftSource
from self_speculation.drafts.policy import PLAIN, AdaptivePolicy, Plan
from self_speculation.model.devices import agreed
from self_speculation.model.traced import num_traces


class AdaptiveDrafts(DraftSource):
    """What a policy plans: drafts of one of several sources, or nothing.

    Reads from the device: those of the source that drafts.

    Args:
        model: whose processes must agree on what is planned, where several hold it together.
    """

    def __init__(
        self, model: PreTrainedModel, sources: Mapping[str, DraftSource], policy: AdaptivePolicy
    ) -> None:
        self._model, self._sources, self._policy = model, sources, policy
        self._plan = Plan()
        self._began, self._num_traces = 0.0, 0

    def draft(self, rows: Rows, k: int, wanted: Sequence[bool] | None = None) -> Draft:
        self._began, self._num_traces = time.perf_counter(), num_traces(self._model)
        matched = {name: source.matched(rows) for name, source in self._sources.items()}
        self._plan = self._policy.plan(matched, rows.rooms(k, wanted))
        if self._plan.source == PLAIN:
            nothing, drawn_from = rows.joined([], self._model.config.vocab_size)
            return Draft(rows.sampler, ["none"] * len(rows), nothing, drawn_from, [0] * len(rows))
        return self._sources[self._plan.source].draft(rows, min(k, self._plan.length), wanted)

    def learn(self, rows: Rows, draft: Draft, num_accepted: Sequence[int]) -> None:
        seconds = agreed(self._model, time.perf_counter() - self._began)
        plan = Plan(self._plan.source, draft.tokens.shape[1])
        if num_traces(self._model) == self._num_traces:  # or it says nothing of rounds to come
            self._policy.took(plan, len(rows), seconds)
        self._policy.learn(plan, draft.matched or [0] * len(rows), draft.lengths, num_accepted)
        if plan.source != PLAIN:
            self._sources[plan.source].learn(rows, draft, num_accepted)
