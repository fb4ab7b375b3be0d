"""Drafts of a round: each row has the draft of one source, as a policy plans.

For adaptive decoding, each prompt judges early exits: a pass tells how often each of them is right (see
`measures.replay`).
"""

from __future__ import annotations

from collections import abc
from collections.abc import Mapping
from itertools import chain
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from self_speculation.decoding.batch import Batch
from self_speculation.decoding.sequence import Sequence
from self_speculation.drafts.adaptive import AdaptivePolicy
from self_speculation.drafts.draft import Draft, DraftSource, join
from self_speculation.drafts.layers import LayerDrafts
from self_speculation.drafts.ngram import LookupDrafts
from self_speculation.drafts.policy import PLAIN, FixedPolicy, RoundOutcome
from self_speculation.model.captured_runner import num_captures
from self_speculation.model.devices import broadcast_from_rank0
from self_speculation.model.kv_cache import KVCache
from self_speculation.model.model_runner import ModelRunner, PassRange, forward
from self_speculation.model.short_head import ShortHead
from self_speculation.transfers import Reading, Stopwatch

# The last positions of a prompt that judge exits.
_JUDGING = 16


class _Guess(NamedTuple):
    """The first token that a free source would draft."""

    source: str
    matched: int
    id: int
    sequence: Sequence
    position: int


class DraftComposer:
    """Drafts as a policy plans: by layers, n-grams or both, or not at all.

    Reads from the device: those of the sources that draft.

    Args:
        model: all its ranks make the same plans.
        sources: by name; layers have one head.
        policy: an `AdaptivePolicy` learns from rounds and prompts.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sources: Mapping[str, DraftSource],
        policy: FixedPolicy | AdaptivePolicy,
    ) -> None:
        self._model, self._device, self._sources, self._policy = model, model.device, sources, policy
        self._free = [source for source in sources.values() if isinstance(source, LookupDrafts)]
        self._learner = policy if isinstance(policy, AdaptivePolicy) else None
        self._stopwatch, self._num_graphs = Stopwatch(self._device), 0
        self._guesses: list[_Guess] = []  # of the last round
        # Of prompts since the last round: exits, positions, and a read of how many of these each had right.
        self._judgements: list[tuple[list[str], int, Reading]] = []

    def prefill(self, runner: ModelRunner, cache: KVCache, sequence: Sequence, tokens: Tensor) -> Tensor:
        """Prefill the last tokens [1, T] of a prompt; returns the logits [1, 1, V] after them.

        For adaptive decoding, judge exits by the last tokens: would they have drafted what the model says?
        Reads from the device: none before the next round, when the prompt's first token has been read.
        """
        width = tokens.shape[1]
        names = self._learner.to_be_judged() if self._learner else []
        exits = [source for name in names if isinstance(source := self._sources[name], LayerDrafts)]
        if not exits:
            return forward(runner, cache, tokens).logits
        num_positions, states, first = min(width, _JUDGING), [], 0
        hidden = runner.embed(tokens)
        for last in (*(source.exit_layer for source in exits), len(runner.layers)):
            hidden, first = runner.run_layers(cache, hidden, first, last), last
            states.append(hidden[:, -num_positions:].clone())  # layers overwrite their input
        drafter = exits[0].drafter
        if isinstance(drafter.head, ShortHead):
            drafter.head.seen.read_text(sequence.prompt, num_positions, may_grow=False)
        states = [state.to(hidden.device) for state in states]
        best = [drafter.logits(state, num_positions).argmax(-1) for state in states]  # [1, n] each
        num_right = [(own == best[-1]).sum() for own in best[:-1]]
        self._judgements.append((names, num_positions, Reading(num_right)))
        return runner.logits(hidden, 1)

    def draft(self, batch: Batch, cache: KVCache, limits: abc.Sequence[int], numbers: Tensor | None) -> Draft:
        """Draft tokens for each row, see `DraftSource.draft`."""
        if self._learner:
            self._stopwatch, self._num_graphs = Stopwatch(self._device), num_captures(self._model)
            self._learn_pending(self._learner)
        matched: dict[str, list[int | None]] = {source.name: [] for source in self._free}
        for source in self._free:
            for sequence, limit in zip(batch.sequences, limits, strict=True):
                number, ids = source.lookup(sequence, min(limit, 1))
                matched[source.name].append(number if ids else None)
                if ids and self._learner:
                    self._guesses.append(_Guess(source.name, number, ids[0], sequence, sequence.length))
        plan = self._policy.plan(matched, limits)
        names = [name or plan.source for name in plan.lookups or [PLAIN] * len(batch)]  # [B]
        drafts = []
        for name in dict.fromkeys(filter(None, names)):
            most = plan.length if name == plan.source else plan.looked_up
            own = [min(limit, most) if each == name else 0 for each, limit in zip(names, limits, strict=True)]
            should_continue = self._policy.should_continue
            drafts.append(self._sources[name].draft(batch, cache, own, numbers, should_continue))
        draft = join(batch, drafts)
        if self._learner:
            self._stopwatch.split()
        return draft

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

    def _learn_pending(self, learner: AdaptivePolicy) -> None:
        """Learn from the guesses of the last round and the prompts since."""
        for guess in self._guesses:
            if guess.sequence.length > guess.position:
                is_right = guess.sequence.ids_from(guess.position)[0] == guess.id
                learner.see(guess.source, guess.matched, is_right)
        for exits, num_positions, reading in self._judgements:
            learner.judge(dict(zip(exits, reading.wait(), strict=True)), num_positions)
        self._guesses, self._judgements = [], []

    def passes(self, runner: ModelRunner, longest: int) -> abc.Iterator[PassRange]:
        """The passes that draft up to `longest` tokens, and those of `runner` that verify them."""
        passes = (source.passes(runner, longest) for source in self._sources.values())
        yield from dict.fromkeys(chain.from_iterable(passes))
