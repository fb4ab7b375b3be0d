"""Drafts of whatever source promises most, chosen round by round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from self_speculation.decoding.rows import Rows
from self_speculation.drafts.draft import Draft, DraftSource
from self_speculation.drafts.policy import AdaptivePolicy


class AdaptiveDrafts(DraftSource):
    """What a policy plans: drafts of one of several sources, or nothing.

    Reads from the device: those of the source that drafts.
    """

    def __init__(self, sources: Mapping[str, DraftSource], policy: AdaptivePolicy) -> None:
        self._sources, self._policy = sources, policy

    def draft(self, rows: Rows, k: int, wanted: Sequence[bool] | None = None) -> Draft:
        matched = {name: source.matched(rows) for name, source in self._sources.items()}
        plan = self._policy.plan(matched, rows.rooms(k, wanted))
        if not plan.source:
            return Draft(["none"] * len(rows), rows.last[:, :0], None, [0] * len(rows), probe=plan.probe)
        source = self._sources[plan.source]
        return replace(source.draft(rows, min(k, plan.at_most), wanted), probe=plan.probe)

    def learn(
        self, rows: Rows, draft: Draft, num_accepted: Sequence[int], agreement: Sequence[Sequence[float]]
    ) -> None:
        matched = draft.matched or [0] * len(rows)
        for row, name in enumerate(draft.sources):
            self._policy.learn(
                name, matched[row], draft.lengths[row], num_accepted[row], draft.probe, agreement[row]
            )
        if draft.sources[0] in self._sources:
            self._sources[draft.sources[0]].learn(rows, draft, num_accepted, agreement)
