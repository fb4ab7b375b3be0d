"""Drafts of whatever sources promise most, chosen round by round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

from self_speculation.decoding.output import Output
from self_speculation.decoding.rows import Rows
from self_speculation.drafts.draft import Draft, DraftSource, Guess, mixed, no_draft
from self_speculation.drafts.policy import PLAIN, AdaptivePolicy, Plan
from self_speculation.model.devices import agreed
from self_speculation.model.traced import num_traces
from self_speculation.transfers import Stopwatch


class AdaptiveDrafts(DraftSource):
    """What a policy plans: drafts of one of several sources, with lookups before them, or nothing.

    Reads from the device: those of the sources that draft.

    Args:
        model: whose processes must agree on what is planned, where several hold it together.
        sources: by name; those of layers end their drafts as the policy says.
    """

    def __init__(
        self, model: PreTrainedModel, sources: Mapping[str, DraftSource], policy: AdaptivePolicy
    ) -> None:
        self._model, self._sources, self._policy = model, sources, policy
        self._plan = Plan()
        self._stopwatch, self._num_traces = Stopwatch(model.device), 0
        self._guesses: list[tuple[str, Guess, Output, int]] = []  # of the last round, and where they belong

    def draft(self, rows: Rows, k: int, wanted: Sequence[bool] | None = None) -> Draft:
        self._stopwatch, self._num_traces = Stopwatch(self._model.device), num_traces(self._model)
        self._see_what_became_of_guesses()
        matched: dict[str, list[int | None]] = {}
        for name, source in self._sources.items():
            guesses = source.guesses(rows)
            matched[name] = [None if guess is None else guess.matched for guess in guesses]
            for output, guess in zip(rows.outputs, guesses, strict=True):
                if guess is not None and guess.next_id is not None:
                    self._guesses.append((name, guess, output, output.length))
        self._plan = plan = self._policy.plan(matched, rows.rooms(k, wanted))
        draft, rest = None, wanted or [True] * len(rows)
        for name in sorted({*plan.lookups} - {PLAIN}):
            found = [name == lookup for lookup in plan.lookups]
            looked_up = self._sources[name].draft(rows, min(k, plan.looked_up), found)
            draft = looked_up if draft is None else mixed(rows, looked_up, draft, found)
            rest = [wants and not is_found for is_found, wants in zip(found, rest, strict=True)]
        if plan.source != PLAIN and any(rest):
            drafted = self._sources[plan.source].draft(rows, min(k, plan.length), rest)
            draft = drafted if draft is None else mixed(rows, drafted, draft, rest)
        self._stopwatch.split()
        return draft or no_draft(rows, self._model.config.vocab_size)

    def learn(self, rows: Rows, draft: Draft, num_accepted: Sequence[int]) -> None:
        seconds = agreed(self._model, self._stopwatch.stop())
        none = [0] * len(rows)
        self._policy.learn(
            draft.sources,
            draft.matched or none,
            draft.confidences,
            draft.lengths,
            num_accepted,
            # A pass that is traced takes ten times as long as later ones.
            seconds if num_traces(self._model) == self._num_traces else None,
        )

    def _see_what_became_of_guesses(self) -> None:
        """A guess costs nothing, drafted or not: the token that was decided tells whether it was right."""
        for name, guess, output, position in self._guesses:
            if output.length > position:
                self._policy.see(name, guess.matched, output.ids_from(position)[0] == guess.next_id)
        self._guesses = []
