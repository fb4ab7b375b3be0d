"""Drafts of whatever source promises most, chosen round by round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from self_speculation.decoding.output import Output
from self_speculation.drafts.draft import Draft, DraftSource
from self_speculation.drafts.policy import AdaptivePolicy


class AdaptiveDrafts(DraftSource):
    """What a policy plans: a draft of one of several sources, or nothing.

    Reads from the device: those of the source that drafts.
    """

    def __init__(self, sources: Mapping[str, DraftSource], policy: AdaptivePolicy) -> None:
        self._sources, self._policy = sources, policy

    def draft(self, output: Output, k: int) -> Draft:
        matched = {name: source.matched(output) for name, source in self._sources.items()}
        plan = self._policy.plan({name: n for name, n in matched.items() if n is not None}, k)
        if not plan.source:
            return Draft("none", output.drafted(0), None, probe=plan.probe)
        return replace(self._sources[plan.source].draft(output, min(k, plan.at_most)), probe=plan.probe)

    def learn(self, draft: Draft, num_accepted: int, agreement: Sequence[float]) -> None:
        self._policy.learn(
            draft.source, draft.matched, len(draft.tokens), num_accepted, draft.probe, agreement
        )
        if draft.source in self._sources:
            self._sources[draft.source].learn(draft, num_accepted, agreement)
