"""Drafts of a round: each row has the draft of one source, as a policy plans."""

from __future__ import annotations

from collections import abc
from itertools import chain, takewhile

import torch
from torch import Tensor
from transformers import PreTrainedModel

from self_speculation.decoding.batch import Batch
from self_speculation.decoding.sequence import Sequence
from self_speculation.drafts.draft import Draft, DraftSource, LookupDrafts, Match, ShouldContinue
from self_speculation.drafts.policy import AdaptivePolicy, Plan
from self_speculation.passes.captured_runner import num_captures
from self_speculation.passes.kv_cache import KVCache
from self_speculation.passes.model_runner import ModelRunner, PassRange
from self_speculation.transfers import Stopwatch, on_device


class DraftComposer:
    """Drafts as planned: by layers, by lookups or both, or not at all.

    Only the sources read from the device.

    Args:
        sources: those of layers share a head. A row takes the longest match of the lookups; at a tie, that of
            the source listed first.
        policy: plans rounds and learns from them; None: a row without a match has a draft of the last source
            that computes, and all drafts are as long as the limits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sources: abc.Sequence[DraftSource | LookupDrafts],
        policy: AdaptivePolicy | None,
    ) -> None:
        self._model, self._policy, self._vocab_size = model, policy, model.config.vocab_size
        self._sources = {source.name: source for source in sources if isinstance(source, DraftSource)}
        self._lookups = [source for source in sources if isinstance(source, LookupDrafts)]
        self._should_continue: ShouldContinue | None = policy.should_continue if policy else None
        self._stopwatch, self._num_graphs = Stopwatch(model.device), 0

    def draft(self, batch: Batch, cache: KVCache, limits: abc.Sequence[int]) -> Draft | None:
        """Draft tokens for each row, see `DraftSource.draft`; None: there are none, and nothing to learn."""
        matches = [self._look_up(*row) for row in zip(batch.sequences, limits, strict=True)]  # [B]
        if self._policy is None:
            plan = Plan([*self._sources][-1], max(limits), [*map(bool, matches)], max(limits))
        elif not any(matches) and self._policy.is_plain(limits):
            return None
        else:
            self._stopwatch, self._num_graphs = Stopwatch(batch.last.device), num_captures(self._model)
            plan = self._policy.plan(matches, limits)
        chosen = plan.lookups or [False] * len(batch)
        matches = [match if has else None for match, has in zip(matches, chosen, strict=True)]
        draft = None
        if plan.source is not None and not all(matches):
            rows = zip(limits, matches, strict=True)
            own = [0 if match else min(limit, plan.max_drafted) for limit, match in rows]
            draft = self._sources[plan.source].draft(batch, cache, own, self._should_continue)
        if any(matches):
            copied = _copied(batch, matches, plan.max_lookup)
            draft = _join(batch, draft, copied) if draft and any(draft.lengths) else copied
        if self._policy:
            self._stopwatch.split()
        return draft or Draft([None] * len(batch), batch.last[:, :0], [0] * len(batch))

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
        if self._policy:
            seconds = self._stopwatch.stop()
            # A round that captures a pass takes ten times as long.
            is_typical = num_captures(self._model) == self._num_graphs
            self._policy.learn(draft, num_accepted, seconds if is_typical else None)

    def passes(self, runner: ModelRunner, longest: int) -> abc.Iterator[PassRange]:
        """The passes that draft up to `longest` tokens, and those of `runner` that verify them."""
        passes = (source.passes(runner, longest) for source in self._sources.values())
        verification = [PassRange(runner, 0, len(runner.layers), longest + 1)] if self._lookups else []
        yield from dict.fromkeys(chain(*passes, verification))


def _copied(batch: Batch, matches: abc.Sequence[Match | None], most: int) -> Draft:
    """The draft of what was looked up, at most so many tokens. Reads nothing from the device."""
    found = [match.ids[:most] if match else [] for match in matches]  # [B]
    width, lengths = max(map(len, found)), [*map(len, found)]
    # Padded with each row's last token, as in `Batch.sample_draft`.
    last = [sequence.ids_from(sequence.length - 1) for sequence in batch.sequences]
    padded = [[*ids, *end * (width - len(ids))] for ids, end in zip(found, last, strict=True)]
    tokens = on_device([id_ for ids in padded for id_ in ids], batch.last.device).view(len(batch), -1)
    for i in range(width):
        batch.record_draft(tokens[:, i], i, [i < n for n in lengths], ids=[row[i] for row in padded])
    sources = [match and match.source for match in matches]
    return Draft(sources, tokens, lengths, matched=[match.matched if match else 0 for match in matches])


def _join(batch: Batch, computed: Draft, copied: Draft) -> Draft:
    """The copied draft in rows that have one, else the computed one. All layers verify it, since none has
    processed all rows.
    """
    width = max(computed.tokens.shape[1], copied.tokens.shape[1])
    is_copied = on_device(copied.lengths, batch.last.device).bool()[:, None]  # [B, 1]

    def padded(draft: Draft) -> Tensor:
        return torch.cat((draft.tokens, batch.last.expand(-1, width - draft.tokens.shape[1])), 1)

    rows = [*enumerate(copied if length else computed for length in copied.lengths)]
    return Draft(
        [draft.sources[row] for row, draft in rows],
        torch.where(is_copied, padded(copied), padded(computed)),
        [draft.lengths[row] for row, draft in rows],
        confidences=[draft.confidences[row] if draft.confidences else () for row, draft in rows],
        matched=[draft.matched[row] if draft.matched else 0 for row, draft in rows],
    )
