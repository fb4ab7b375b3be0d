"""Sequences in flight, one per tensor row.

Rows share passes only. History, processors, seed, stop conditions and streamer belong to one sequence, so no
other row changes a row's tokens. This module knows nothing of layers or caches.
A tensor [N] has an entry for each token: all tokens of the first row, then all tokens of the second row.
"""

from collections import abc
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from self_speculation.backends.sampling import amax, sample
from self_speculation.machine.transfers import AsyncRead, on_device
from self_speculation.requests.sequence import Sequence


def queues_passes(device: torch.device) -> bool:
    """Whether the next pass is queued before the tokens of the last one are read. A CPU has no queue."""
    return device.type != "cpu"


class QueuedRound(NamedTuple):
    """A step or a round that is queued."""

    commit: Callable[[], None]  # reads the tokens, and commits them
    round: object = None  # what the next round may go on from


class Batch:
    """See the module.

    Args:
        device: of the model's input ids.
        longest_draft: the most tokens that a row drafts in a round.
    """

    def __init__(self, device: torch.device, longest_draft: int = 0) -> None:
        self.device = device
        self.longest_draft = longest_draft
        self.sequences: list[Sequence] = []
        self._last_tokens: Tensor | None = None  # see `last_tokens`; None: what the host knows
        self._queued: QueuedRound | None = None

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def last_tokens(self) -> Tensor:
        """[B] the last token of each row, which is not in the cache."""
        if self._last_tokens is None:
            self._last_tokens = on_device([sequence.last_id for sequence in self.sequences], self.device)
        return self._last_tokens

    @property
    def queued_round(self) -> object:
        """The queued round whose tokens are unread; None: all tokens are committed."""
        return None if self._queued is None else self._queued.round

    @property
    def is_watched(self) -> bool:
        """Whether the host looks at logits or drafts of a row."""
        return any(
            each.processors or each.stop_conditions.criteria or each.reads_draft for each in self.sequences
        )

    def add(self, sequence: Sequence, logits: Tensor) -> None:
        """Append a row and sample the first token from logits [V]."""
        alone = Batch(self.device)
        alone.sequences = [sequence]
        alone.commit_previous_and_sample(logits[None])
        for batch in (self, alone):
            batch.commit_queued()
        self._last_tokens = torch.cat(
            (self.last_tokens, alone.last_tokens)
        )  # may find no memory: before it is a row
        self.sequences.append(sequence)

    def remove(self, row: int) -> Sequence:
        """Swap with the last row, then shrink."""
        self.commit_queued()
        removed = self.sequences[row]
        self.sequences[row] = self.sequences[-1]
        self.sequences.pop()
        self._last_tokens = None
        return removed

    def noise_keys(self, positions: abc.Iterable[tuple[int, int]]) -> Tensor | None:
        """[N] keys of noise, for the row and the position after the row's output; None: all are greedy."""
        if all(sequence.sampler.greedy for sequence in self.sequences):
            return None
        start = 0 if self._queued is None else 1
        keys = [self.sequences[row].noise_key(start + position) for row, position in positions]
        return on_device(keys, self.last_tokens.device)

    def sample(self, logits: Tensor, query_lengths: abc.Sequence[int]) -> Tensor:
        """Sample the target's tokens [N] from processed logits [N, V] of the next positions of each row.

        Args:
            query_lengths: [B] positions of each row, N together.
        """
        positions = [(row, i) for row, count in enumerate(query_lengths) for i in range(count)]
        samplers = [self.sequences[row].sampler for row, _ in positions]
        return sample(logits, self.noise_keys(positions), samplers)

    def sample_draft(
        self, logits: Tensor, position: int, rows: abc.Sequence[int], keys: Tensor | None
    ) -> Tensor:
        """Sample the draft tokens [n] at position 0, 1, ... of n rows from logits [n, V].

        Args:
            rows: [n] in ascending order.
            keys: [n] `noise_keys`.
        """
        in_draft = [int(row in rows) for row in range(len(self))]
        samplers = [self.sequences[row].sampler for row in rows]
        return sample(self.process(logits, in_draft, position), keys, samplers, is_draft=True)

    def record_draft(self, tokens: Tensor, position: int, rows: abc.Sequence[int]) -> None:
        """Write drafted tokens [n] into the histories of n rows, and stream them where drafts are shown: at
        once, or on a GPU when `show_drafts` is called.

        Reads from the device: one if a grammar follows the draft or drafts are shown, else none.
        """
        reading = None
        # A draft may go on after an end id. The rest is not shown.
        if any(self.sequences[row].reads_draft for row in rows):
            reading = AsyncRead([tokens])
        for i, row in enumerate(rows):
            drafted = [] if reading is None else [(reading, i)]
            self.sequences[row].write_drafted(tokens[i : i + 1], position, drafted)
        if not queues_passes(tokens.device):
            self.show_drafts()

    def show_drafts(self) -> None:
        """Stream the drafted tokens that are not shown yet."""
        for sequence in self.sequences:
            sequence.show_draft()

    def process(self, logits: Tensor, query_lengths: abc.Sequence[int], num_drafted: int = 0) -> Tensor:
        """Apply the logits processors of each row.

        Args:
            logits: [N, V]; position i of a row follows the history with `num_drafted + i` drafted tokens.
            query_lengths: [B] positions of each row, N together.

        Returns:
            [N, V], in fp32 when there are processors.
        """
        if not any(sequence.processors for sequence in self.sequences):
            return logits
        rows = zip(self.sequences, logits.split([*query_lengths]), strict=True)
        return torch.cat([sequence.process(row_logits, num_drafted) for sequence, row_logits in rows])

    def check(self, largest: abc.Sequence[float], query_lengths: abc.Sequence[int]) -> None:
        """Check the logits of a round by the largest ones, [N], `query_lengths` [B] of each row.

        All positions are checked: the argmax of NaN is a token, so a draft may agree with it.
        """
        ends = accumulate(query_lengths)
        for sequence, length, end in zip(self.sequences, query_lengths, ends, strict=True):
            sequence.check(largest[end - length : end])

    def commit_previous_and_sample(self, logits: Tensor) -> None:
        """Sample one token of each row from logits [B, V], and commit the tokens of the call before.

        A GPU reads the new tokens in the next call, so that the next pass is queued first. On a CPU, and
        where a token may decide about the next pass, this call commits them, too. Reads from the device: one
        for each call.
        """
        ones = [1] * len(self)
        logits = self.process(logits, ones)
        tokens = self.sample(logits, ones)  # [B]
        reading = AsyncRead([amax(logits), tokens])
        self.queue(QueuedRound(partial(self._commit_step, reading, tokens, logits)), 1)
        self._last_tokens = tokens

    def _commit_step(self, reading: AsyncRead, last: Tensor, logits: Tensor) -> None:
        largest, ids = reading.wait()
        self.check(largest, [1] * len(self))
        nothing = [None] * len(self)
        num_drafted = [0] * len(self) if self.longest_draft else nothing
        rows = [[int(id_)] for id_ in ids]
        self.commit(rows, last, logits, range(len(self)), num_drafted, nothing)

    def queue(self, queued: QueuedRound, width: int) -> None:
        """Commit the round that was queued before, and queue this one: the next round may be queued before
        this one is read. Where a token may decide about the next round, commit this one, too.

        Args:
            width: the most tokens that a row can get.
        """
        self.commit_queued()
        self._queued = queued
        all_go_on = all(each.remaining >= 2 * width and not each.processors for each in self.sequences)
        if not (all_go_on and queues_passes(self.device)):
            self.commit_queued()

    def commit_queued(self) -> None:
        """Read and commit the queued tokens, if there are any. A row that has ended takes none."""
        queued = self._queued
        self._queued = None
        if queued is not None:
            queued.commit()

    def commit(
        self,
        tokens: abc.Sequence[abc.Sequence[int]],
        last_tokens: Tensor | None,
        logits: Tensor | None,
        starts: abc.Sequence[int],
        num_drafted: abc.Sequence[int | None],
        sources: abc.Sequence[str | None],
    ) -> None:
        """Append the tokens of a round to the outputs, up to the token that ends an output.

        Args:
            last_tokens: [B] the last token of each row, on the device; None: `tokens` has all that are there.
            logits: [N, V] processed; None: no criteria look at them.
            starts: [B] the first of them of each row.
            num_drafted: [B] tokens of a draft; None: no verification.
            sources: [B] names of the draft sources.
        """
        for row, sequence in enumerate(self.sequences):
            sequence.commit(tokens[row], logits, starts[row], num_drafted[row], sources[row])
        self._last_tokens = last_tokens
