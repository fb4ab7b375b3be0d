"""Picks the draft source with the best expected speed, or none, in each round.

Each prompt judges early exits: a pass tells how often each of them is right (see `measures.replay`).
"""

from __future__ import annotations

from collections import abc
from collections.abc import Mapping

from torch import Tensor
from transformers import PreTrainedModel

from self_speculation.decoding.batch import Batch
from self_speculation.decoding.sequence import Sequence
from self_speculation.drafts.draft import Draft, DraftSource
from self_speculation.drafts.layers import LayerDrafts
from self_speculation.drafts.ngram import Copied, TokenDrafts, with_copied
from self_speculation.drafts.policy import PLAIN, AdaptivePolicy
from self_speculation.model.captured_runner import PassRange, num_prepared
from self_speculation.model.devices import broadcast_from_rank0
from self_speculation.model.kv_cache import KVCache
from self_speculation.model.linear import NARROW
from self_speculation.model.model_runner import ModelRunner
from self_speculation.model.short_head import ShortHead
from self_speculation.transfers import Reading, Stopwatch

# The last positions of a prompt that judge exits.
_JUDGING = 16


class AdaptiveDrafts(DraftSource):
    """Drafts as an `AdaptivePolicy` plans: from layers, from n-grams, from both, or not at all.

    Reads from the device: those of the sources that draft.

    Args:
        model: all its ranks make the same plans.
        sources: by name; all have one head.
        ngrams: sources that cost nothing, by name.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sources: Mapping[str, LayerDrafts],
        ngrams: Mapping[str, TokenDrafts],
        policy: AdaptivePolicy,
    ) -> None:
        self._model, self._device, self._policy = model, model.device, policy
        self._sources, self._ngrams = sources, ngrams
        for source in sources.values():
            source.should_continue = policy.should_continue
        self._stopwatch, self._num_prepared = Stopwatch(self._device), 0
        self._guesses: list[tuple[Copied, Sequence, int]] = []  # of the last round, with their positions
        # Of prompts since the last round: exits, positions, and a read of how many of these each had right.
        self._judgements: list[tuple[list[str], int, Reading]] = []

    def read_prompt(self, runner: ModelRunner, cache: KVCache, sequence: Sequence, tokens: Tensor) -> Tensor:
        """Prefill, and judge exits by the last tokens: would they have drafted what the whole model says?

        Reads from the device: none before the next round, when the prompt's first token has been read.
        """
        width = tokens.shape[1]
        # A pass over few tokens behind a kept prefix would be traced, range by range.
        exits = self._policy.to_be_judged() if width > NARROW or not cache.length(0) else []
        if not exits:
            return super().read_prompt(runner, cache, sequence, tokens)
        num_positions, states, first = min(width, _JUDGING), [], 0
        hidden = runner.embed(tokens)
        for last in (*(self._sources[name].exit_layer for name in exits), len(runner.layers)):
            hidden, first = runner.run_layers(cache, hidden, first, last), last
            states.append(hidden[:, -num_positions:].clone())  # layers overwrite their input
        drafter = self._sources[exits[0]].drafter
        if isinstance(drafter.head, ShortHead):
            drafter.head.seen.read_text(sequence.prompt, num_positions, may_grow=False)
        states = [state.to(hidden.device) for state in states]
        best = [drafter.logits(state, num_positions).argmax(-1) for state in states]  # [1, n] each
        num_right = [(own == best[-1]).sum() for own in best[:-1]]
        self._judgements.append((exits, num_positions, Reading(num_right)))
        return runner.logits(hidden, 1)

    def draft(self, batch: Batch, cache: KVCache, limits: abc.Sequence[int]) -> Draft:
        self._stopwatch, self._num_prepared = Stopwatch(self._device), num_prepared(self._model)
        self._check_guesses()
        for exits, num_positions, reading in self._judgements:
            self._policy.judge(dict(zip(exits, reading.wait(), strict=True)), num_positions)
        self._judgements = []
        matched: dict[str, list[int | None]] = {}
        for name, source in self._ngrams.items():
            guesses = [source.copied(sequence, 1) for sequence in batch.sequences]
            matched[name] = [guess.matched if guess.ids else None for guess in guesses]
            pairs = zip(guesses, batch.sequences, strict=True)
            self._guesses += [(guess, sequence, sequence.length) for guess, sequence in pairs if guess.ids]
        plan = self._policy.plan(matched, limits)
        copied, draft = [Copied()] * len(batch), None
        for row, name in enumerate(plan.lookups):
            if name != PLAIN:
                limit = min(limits[row], plan.looked_up)
                copied[row] = self._ngrams[name].copied(batch.sequences[row], limit)
        if plan.source != PLAIN:
            looked_up = plan.lookups or [PLAIN] * len(batch)
            rows = zip(looked_up, limits, strict=True)
            rest = [min(limit, plan.length) if name == PLAIN else 0 for name, limit in rows]
            if any(rest):
                draft = self._sources[plan.source].draft(batch, cache, rest)
        draft = with_copied(batch, copied, draft, self._model.config.vocab_size)
        self._stopwatch.split()
        return draft

    def passes(self, runner: ModelRunner, longest: int) -> abc.Iterator[PassRange]:
        yield from super().passes(runner, longest)
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
        for guess, sequence, position in self._guesses:
            if sequence.length > position:
                self._policy.see(guess.source, guess.matched, sequence.ids_from(position)[0] == guess.ids[0])
        self._guesses = []
