"""Composes the draft of a round: each row drafts by the source that a policy or the longest match picks."""

from __future__ import annotations

from collections import abc
from itertools import takewhile
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from self_speculation.backends.captures import num_captures
from self_speculation.backends.kv_cache import KVCache
from self_speculation.drafts.draft import Draft, DraftSource, LookupDrafts, Match, concat_by_row
from self_speculation.drafts.policy import AdaptivePolicy, Plan
from self_speculation.engine.batch import Batch, queues_passes
from self_speculation.machine.transfers import Stopwatch, on_device
from self_speculation.requests.sequence import Sequence


class RoundPlan(NamedTuple):
    """The drafts of a round."""

    source_names: abc.Sequence[str | None]  # [B] None: no draft
    lengths: abc.Sequence[int]  # [B] tokens of each row
    layer_source: DraftSource | None  # of the rows without a match
    found: abc.Sequence[Match | None]  # [B] matches, with the ids that are drafted


class DraftComposer:
    """Drafts for all rows of a batch: one source of layers at most, and lookups for the rows that they match.

    Reads nothing from the device; the sources may.

    Args:
        sources: a row takes the longest match of the lookups; of equally long ones, the first source's.
            Sources of layers share a head.
        policy: plans rounds and learns from them; None: a row without a match has a draft of the source that
            computes, and all drafts are as long as the limits.

    Raises:
        ValueError: several sources compute, and there is no policy.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sources: abc.Sequence[DraftSource | LookupDrafts],
        policy: AdaptivePolicy | None,
    ) -> None:
        self._model = model
        self._policy = policy
        self._vocab_size = model.config.vocab_size
        layer_sources = [source for source in sources if isinstance(source, DraftSource)]
        self._sources = {source.name: source for source in layer_sources}
        self._learning = [source for source in layer_sources if type(source).learn is not DraftSource.learn]
        self._lookups = [source for source in sources if isinstance(source, LookupDrafts)]
        if policy is None and len(layer_sources) > 1:
            names = ", ".join(source.name for source in layer_sources)
            why = f"one source computes drafts, not {names}; adaptive picks among several"
            raise ValueError(f"generation_strategy self_speculative: {why}")
        self._stopwatch = Stopwatch(model.device)
        self._num_graphs = 0

    @property
    def needs_outcomes(self) -> bool:
        """Whether the plan of a round follows from the outcome of the round before."""
        return bool(self._policy or self._lookups or self._learning)

    @property
    def needs_states(self) -> bool:
        """Whether a source learns from the states that verification computes."""
        return bool(self._learning)

    def plan(self, batch: Batch, limits: abc.Sequence[int]) -> RoundPlan | None:
        """Plan the drafts of each row, of at most `limits` tokens; None: the round is a plain step."""
        matches = [self._look_up(*row) for row in zip(batch.sequences, limits, strict=True)]  # [B]
        if self._policy is None:
            default_name = next(iter(self._sources), None)
            each = zip(matches, limits, strict=True)
            lengths = [len(match.ids) if match else limit if default_name else 0 for match, limit in each]
            plan = Plan([match.source_name if match else default_name for match in matches], lengths)
        else:
            self._stopwatch = Stopwatch(batch.device)
            self._num_graphs = num_captures(self._model)
            if (chosen := self._policy.plan(matches, limits)) is None:
                return None
            plan = chosen
        found = [
            match._replace(ids=match.ids[:length]) if match and match.source_name == name else None
            for match, name, length in zip(matches, plan.source_names, plan.lengths, strict=True)
        ]
        used = self._sources.keys() & {*plan.source_names}  # one at most
        return RoundPlan(plan.source_names, plan.lengths, self._sources[used.pop()] if used else None, found)

    def draft(self, batch: Batch, cache: KVCache, plan: RoundPlan) -> Draft:
        """Draft the tokens of each row as planned, see `DraftSource.draft`."""
        draft = Draft([None] * len(batch), batch.last_tokens[:0], [0] * len(batch))
        if plan.layer_source is not None:
            name = plan.layer_source.name
            planned = zip(plan.source_names, plan.lengths, strict=True)
            lengths = [length if source == name else 0 for source, length in planned]
            draft = plan.layer_source.draft(batch, cache, lengths)
        if any(plan.found):
            draft = _with_lookups(batch, draft, plan.found)
        self.end_drafting()
        return draft

    def end_drafting(self) -> None:
        """The rest of the round is verification."""
        if self._policy:
            self._stopwatch.split()

    def _look_up(self, sequence: Sequence, limit: int) -> Match | None:
        """The longest match, with at most `limit` tokens to draft. It ends before a token that verification
        would reject: one that the model lacks or a grammar forbids.
        """
        found = [match for each in self._lookups if limit and (match := each.find(sequence, limit))]
        if not found:
            return None
        best = max(found, key=lambda match: match.matched)
        ids = sequence.allowed([*takewhile(lambda id_: 0 <= id_ < self._vocab_size, best.ids)])
        return best._replace(ids=ids) if ids else None

    def learn(self, draft: Draft, accepted: abc.Sequence[int], hidden: Tensor) -> None:
        """Learn from the outcome of the last draft, see `DraftSource.learn`; hidden: [N, H] of all rows, or
        empty unless `needs_states`.
        """
        if self._policy:
            seconds = self._stopwatch.stop()
            # A round that captures a pass takes ten times as long.
            is_typical = num_captures(self._model) == self._num_graphs
            self._policy.learn(draft, accepted, seconds if is_typical else None)
        if self._learning:
            by_row = hidden.split(draft.query_lengths)
            for source in self._learning:
                source.learn(draft, accepted, by_row)

    def one_by_one(self) -> list[DraftComposer]:
        """Composers that draft whenever they can: one for each source that computes, one for the lookups."""
        kinds: list[list[DraftSource | LookupDrafts]] = [[source] for source in self._sources.values()]
        kinds.append([*self._lookups])
        return [DraftComposer(self._model, kind, None) for kind in kinds if kind]


def _with_lookups(batch: Batch, draft: Draft, matches: abc.Sequence[Match | None]) -> Draft:
    """Replace the draft of each row that has a match by the ids of the match.

    All layers verify the result, since no layer has processed all rows. Reads nothing from the device.
    """
    ids = [[*match.ids] if match else [] for match in matches]  # [B]
    looked_up = on_device([id_ for found in ids for id_ in found], batch.last_tokens.device)
    each = zip(batch.sequences, ids, looked_up.split([*map(len, ids)]), strict=True)
    for sequence, known, ids_on_device in each:
        sequence.write_drafted(ids_on_device, 0, known)
    if not queues_passes(looked_up.device):
        batch.show_drafts()
    rows = [*enumerate(matches)]
    return Draft(
        [match.source_name if match else draft.source_names[row] for row, match in rows],
        concat_by_row((draft.tokens, draft.lengths), (looked_up, [*map(len, ids)])),
        [len(match.ids) if match else draft.lengths[row] for row, match in rows],
        matched=[match.matched if match else 0 for match in matches],
    )
