"""Drafts of a round: each row has the draft of one source, as a policy plans."""

from __future__ import annotations

from collections import abc
from collections.abc import Mapping
from itertools import chain, takewhile

from torch import Tensor
from transformers import PreTrainedModel

from self_speculation.decoding.batch import Batch
from self_speculation.decoding.sequence import Sequence
from self_speculation.drafts.adaptive import AdaptivePolicy
from self_speculation.drafts.draft import Draft, DraftSource, join
from self_speculation.drafts.ngram import LookupDrafts, copied
from self_speculation.drafts.policy import FixedPolicy, Match, RoundOutcome
from self_speculation.model.captured_runner import num_captures
from self_speculation.model.devices import broadcast_from_rank0
from self_speculation.model.kv_cache import KVCache
from self_speculation.model.model_runner import ModelRunner, PassRange
from self_speculation.transfers import Stopwatch


class DraftComposer:
    """Drafts as a policy plans: by layers, by lookups or both, or not at all.

    Only the sources read from the device.

    Args:
        model: all its ranks make the same plans.
        sources: by name; layers have one head.
        lookups: each row has the longest match of these; the first one of equal length.
        vocab_size: width of the logits.
        policy: an `AdaptivePolicy` learns from rounds.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sources: Mapping[str, DraftSource],
        lookups: abc.Sequence[LookupDrafts],
        vocab_size: int,
        policy: FixedPolicy | AdaptivePolicy,
    ) -> None:
        self._model, self._device, self._sources, self._policy = model, model.device, sources, policy
        self._lookups, self._vocab_size = lookups, vocab_size
        self._learner = policy if isinstance(policy, AdaptivePolicy) else None
        self._stopwatch, self._num_graphs = Stopwatch(self._device), 0

    def draft(self, batch: Batch, cache: KVCache, limits: abc.Sequence[int], numbers: Tensor | None) -> Draft:
        """Draft tokens for each row, see `DraftSource.draft`."""
        if self._learner:
            self._stopwatch, self._num_graphs = Stopwatch(self._device), num_captures(self._model)
        matches = [self._look_up(*row) for row in zip(batch.sequences, limits, strict=True)]  # [B]
        plan = self._policy.plan(matches, limits)
        chosen = plan.lookups or [False] * len(batch)
        matches = [match if has else None for match, has in zip(matches, chosen, strict=True)]
        drafts = []
        if plan.source is not None and not all(matches):
            rows = zip(limits, matches, strict=True)
            own = [0 if match else min(limit, plan.max_drafted) for limit, match in rows]
            layers, should_continue = self._sources[plan.source], self._policy.should_continue
            drafts = [layers.draft(batch, cache, own, numbers, should_continue)]
        if any(matches):
            drafts.append(copied(batch, matches, plan.max_lookup, self._vocab_size))
        draft = join(batch, drafts)
        if self._learner:
            self._stopwatch.split()
        return draft

    def _look_up(self, sequence: Sequence, limit: int) -> Match | None:
        """The longest match, and at most `limit` tokens to draft, up to one that the model lacks or a grammar
        forbids: verification would reject it.
        """
        found = [match for each in self._lookups if limit and (match := each.find(sequence, limit))]
        if not found:
            return None
        best = max(found, key=lambda match: match.matched)
        ids = sequence.allowed([*takewhile(lambda id_: 0 <= id_ < self._vocab_size, best.ids)])
        return best._replace(ids=ids) if ids else None

    def learn(self, draft: Draft, num_accepted: abc.Sequence[int]) -> None:
        """Learn from the outcome of the last draft; num_accepted: [B]."""
        if not self._learner:
            return
        seconds = broadcast_from_rank0(self._model, self._stopwatch.stop())
        # A round that captures a pass takes ten times as long.
        is_typical = num_captures(self._model) == self._num_graphs
        matched = draft.matched or [0] * len(num_accepted)
        drafted = draft.sources, matched, draft.confidences, draft.lengths
        self._learner.learn(RoundOutcome(*drafted, num_accepted, seconds if is_typical else None))

    def passes(self, runner: ModelRunner, longest: int) -> abc.Iterator[PassRange]:
        """The passes that draft up to `longest` tokens, and those of `runner` that verify them."""
        passes = (source.passes(runner, longest) for source in self._sources.values())
        verification = [PassRange(runner, 0, len(runner.layers), longest + 1)] if self._lookups else []
        yield from dict.fromkeys(chain(*passes, verification))
