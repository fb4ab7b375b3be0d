"""A round on a card as replays of graphs: one for each drafted token, and one for verification, up to the
number of accepted tokens.

The device moves on to the next round by itself. So the next round is queued before the host reads this one,
where no decision of the host lies between them. A row that ends meanwhile drops that round.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch

from self_speculation.backends.captures import CapturedPasses, CapturedRunner, Replay
from self_speculation.backends.kv_cache import KVCache
from self_speculation.backends.round_tensors import RoundTensors, RowStart
from self_speculation.backends.runner import ModelRunner
from self_speculation.config import SAMPLING_RULES
from self_speculation.drafts.composer import DraftComposer, RoundPlan
from self_speculation.drafts.draft import Draft, LayerDrafts
from self_speculation.engine.batch import Batch, QueuedRound
from self_speculation.machine.devices import padded
from self_speculation.machine.transfers import AsyncRead


class Round(NamedTuple):
    """The graphs of a round, and the tensors from which the next round continues.

    Args:
        draft: of a token of each row; None: no layers draft.
        graphs: the dictionary of captures. If there is another one, these were dropped.
    """

    tensors: RoundTensors
    draft: Replay | None
    verify: Replay
    graphs: Mapping
    plan: RoundPlan
    active: tuple[str, ...]  # rules of sampling; (): greedy

    @property
    def width(self) -> int:
        """The most tokens of a row."""
        return 1 + max(self.plan.lengths)

    def can_continue(self, passes: CapturedPasses, cache: KVCache, plan: RoundPlan) -> bool:
        """Whether the next round can replay the same graphs before this round is read."""
        end = max(cache.lengths()) + 2 * self.width  # this round is unread
        is_kept = self.graphs is passes.replays and end <= passes.buffers.capacity
        return is_kept and plan == self.plan and not any(plan.found)


def replay_round(
    runner: ModelRunner,
    cache: KVCache,
    batch: Batch,
    end_layer: int,
    composer: DraftComposer | None = None,
    plan: RoundPlan | None = None,
) -> bool:
    """Do a round of layers [:end_layer], with drafts as planned. False: nothing is done, since it needs eager
    passes.

    Reads from the device: one, of this round or of the one before.
    """
    if not isinstance(runner, CapturedRunner) or batch.is_watched or (composer and composer.needs_states):
        return False
    if (passes := runner.passes_of(cache)) is None:
        return False
    nothing = [None] * len(batch)
    planned = plan or RoundPlan(nothing, [0] * len(batch), None, nothing)
    before = batch.queued_round
    can_continue = isinstance(before, Round) and before.can_continue(passes, cache, planned)
    if not can_continue and runner.captures_rounds(cache, end_layer):
        batch.commit_queued()  # callbacks of requests run without the lock
    with cache.buffers.lock:
        cache.check()
        queued = before if can_continue else _begin(runner, passes, cache, batch, end_layer, planned)
        if not isinstance(queued, Round):
            return False
        tensors = queued.tensors
        if queued.active:
            number = queued.width * (2 if can_continue else 1)  # the host does not know where the device is
            pairs = zip(cache.lengths(), batch.sequences, strict=True)
            tensors.set_noise([(at, [*map(sequence.noise_key, range(number))]) for at, sequence in pairs])
        if queued.draft is not None:
            for _ in range(max(planned.lengths)):
                queued.draft()
        if composer is not None:
            composer.end_drafting()
        queued.verify()
        reading = AsyncRead([tensors.results(padded(queued.width))])
    learning = composer if plan else None
    batch.queue(QueuedRound(partial(_commit, cache, batch, learning, queued, reading), queued), queued.width)
    return True


def _begin(
    runner: CapturedRunner,
    passes: CapturedPasses,
    cache: KVCache,
    batch: Batch,
    end_layer: int,
    plan: RoundPlan,
) -> Round | None:
    """Tell the device where the rows are. None: parts of the round are not captured."""
    source = plan.layer_source if any(plan.lengths) else None
    draft_runner: ModelRunner = runner
    exit_layer = 0
    start_layer = 0
    if source is not None:
        if not isinstance(source, LayerDrafts):
            return None
        draft_runner = source.draft_runner
        exit_layer = source.exit_layer
        start_layer = 0 if any(plan.found) else source.start_layer
    parts = ((runner, end_layer), (draft_runner, exit_layer))
    if not all(isinstance(each, CapturedRunner) and each.captures_rounds(cache, end) for each, end in parts):
        return None
    cache.make_room(0, end_layer, [1 + length for length in plan.lengths])
    width = 1 + max(plan.lengths)
    tensors = passes.round_tensors(len(batch), width)
    samplers = [sequence.sampler for sequence in batch.sequences]
    active = max((each.active for each in samplers), key=len)
    if len(active) > 1:  # a graph for each set of rules would be captured in the midst of decoding
        active = tuple(SAMPLING_RULES)
    rest = (start_layer, end_layer, padded(width), active)
    graphs = None
    while graphs is not passes.replays:  # a thread that had captured has ended: graphs go together
        graphs = passes.replays
        draft = None
        if source is not None:
            draft = passes.capture_part(tensors.draft, tensors, draft_runner, exit_layer, active)
        verify = passes.capture_part(tensors.verify, tensors, runner, *rest)
    starts = [
        RowStart(position, [sequence.last_id, *(match.ids if match else ())], length, match is not None)
        for position, sequence, length, match in zip(
            cache.lengths(), batch.sequences, plan.lengths, plan.found, strict=True
        )
    ]
    tensors.begin(starts)
    if active:
        tensors.set_rules([each.numbers for each in samplers])
    return Round(tensors, draft, verify, graphs, plan, active)


def _commit(
    cache: KVCache, batch: Batch, composer: DraftComposer | None, queued: Round, reading: AsyncRead
) -> None:
    """Read a round; learn, move the rows on and commit."""
    plan = queued.plan
    query_lengths = [1 + length for length in plan.lengths]
    (numbers,) = reading.wait()
    outcomes = queued.tensors.outcomes(numbers, query_lengths)
    batch.check([number for outcome in outcomes for number in outcome.largest], query_lengths)  # for NaN
    accepted = [len(outcome.tokens) - 1 for outcome in outcomes]
    if composer is not None:
        matched = [match.matched if match else 0 for match in plan.found]
        empty = torch.empty(0, dtype=torch.long)
        composer.learn(Draft(plan.source_names, empty, plan.lengths, matched=matched), accepted, empty)
    cache.set_rows([length + 1 + n for length, n in zip(cache.lengths(), accepted, strict=True)])
    num_drafted = plan.lengths if batch.longest_draft else [None] * len(batch)
    tokens = [outcome.tokens for outcome in outcomes]
    batch.commit(tokens, None, None, [0] * len(batch), num_drafted, plan.source_names)
