"""Sequences in flight, one per tensor row.

Rows share passes only. Each sequence has its own history, processors, seed, stop conditions and streamer, so
no other row changes its tokens. Knows nothing of layers or caches.
"""

from collections import abc
from functools import cached_property

import torch
from torch import Tensor

from self_speculation.decoding.sampling import JointSampler, amax
from self_speculation.decoding.sequence import Sequence
from self_speculation.transfers import AsyncRead, Known, on_device


def reads_late(device: torch.device) -> bool:
    """Whether the next pass is queued before the tokens of the last one are read. A CPU has no queue."""
    return device.type != "cpu"


class Batch:
    """See the module.

    Args:
        device: of the model's input ids.
        longest_draft: K, the most tokens of a draft.
    """

    def __init__(self, device: torch.device, longest_draft: int = 0) -> None:
        self.longest_draft = longest_draft
        self.sequences: list[Sequence] = []
        self.last = torch.empty(0, 1, dtype=torch.long, device=device)  # [B, 1] of each; not cached yet
        # Of the last step, until it is committed: a read of [largest logits, tokens]; logits [B, 1, V].
        self._unread: tuple[AsyncRead, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.sequences)

    @cached_property
    def sampler(self) -> JointSampler:
        """Of all rows; valid until a row is added or removed."""
        return JointSampler([sequence.sampler for sequence in self.sequences], self.last.device)

    def draft_limits(self) -> list[int]:
        """[B] the most tokens to draft for each row."""
        return [sequence.draft_limit(self.longest_draft) for sequence in self.sequences]

    def add(self, sequence: Sequence, logits: Tensor) -> None:
        """Append a row and sample its first token from logits [1, V]."""
        alone = Batch(self.last.device)
        alone.sequences = [sequence]
        alone.sample_and_commit(logits)
        for batch in (self, alone):
            batch.commit_unread()
        self.last = torch.cat((self.last, alone.last))  # may find no memory: before it is a row
        self.sequences.append(sequence)
        vars(self).pop("sampler", None)

    def remove(self, row: int) -> Sequence:
        """Swap with the last row, then shrink."""
        self.commit_unread()
        removed, self.sequences[row] = self.sequences[row], self.sequences[-1]
        self.sequences.pop()
        if row < len(self.sequences):
            self.last[row] = self.last[-1]
        self.last = self.last[:-1]
        vars(self).pop("sampler", None)
        return removed

    def noise_keys(self, n: int) -> Tensor | None:
        """[B, n] keys of the noise of the next n positions of each output; None when greedy."""
        if self.sampler.greedy:
            return None
        start = 0 if self._unread is None else 1
        keys = [sequence.noise_key(start + i) for sequence in self.sequences for i in range(n)]
        return on_device(keys, self.last.device).view(len(self), n)

    def sample(self, logits: Tensor) -> Tensor:
        """The target's tokens [B, n] of the next n positions, from their processed logits [B, n, V]."""
        return self.sampler(logits, self.noise_keys(logits.shape[1]))

    def sample_draft(
        self, logits: Tensor, position: int, is_drafting: abc.Sequence[bool], keys: Tensor | None
    ) -> Tensor:
        """Sample the draft tokens [B] at position 0, 1, ... from logits [B, V].

        Non-drafting rows [B] repeat `last`, so cached padding stays finite: masks do not stop NaN.

        Args:
            keys: [B, n] `noise_keys`.
        """
        logits = self.process(logits[:, None], position, is_drafting)[:, 0]
        keys = None if keys is None else keys[:, position]
        tokens = self.sampler(logits, keys, is_draft=True)
        if all(is_drafting):
            return tokens
        return tokens.where(on_device(is_drafting, logits.device).bool(), self.last[:, 0])

    def record_draft(
        self,
        tokens: Tensor,
        position: int,
        is_drafting: abc.Sequence[bool],
        ids: abc.Sequence[int] | None = None,
    ) -> None:
        """Write drafted tokens [B] into the histories, and stream them where drafts are shown: at once, or on
        a GPU when `show_drafts` is called.

        Reads from the device: one if a grammar follows the draft or drafts are shown, else none.

        Args:
            ids: the tokens, of a source that knows them on the host; they are not read.
        """
        drafting = [row for row, drafts in enumerate(is_drafting) if drafts]
        reading: AsyncRead | Known | None = None if ids is None else Known(ids)
        # A draft may go on after an end id. The rest is not shown.
        if reading is None and any(self.sequences[row].reads_draft for row in drafting):
            reading = AsyncRead([tokens])
        for row in drafting:
            self.sequences[row].write_drafted(tokens, row, position, reading)
        if not reads_late(tokens.device):
            self.show_drafts()

    def show_drafts(self) -> None:
        """Stream the drafted tokens that are not shown yet."""
        for sequence in self.sequences:
            sequence.show_draft()

    def process(
        self, logits: Tensor, num_drafted: int = 0, counts: abc.Sequence[int] | None = None
    ) -> Tensor:
        """Apply the logits processors of each row.

        Args:
            logits: [B, n, V]; position i follows the history with `num_drafted + i` drafted tokens.
            counts: [B] positions in use (booleans if n is 1); None: all.

        Returns:
            [B, n, V], in fp32 when there are processors.
        """
        if not any(sequence.processors for sequence in self.sequences):
            return logits
        counts = [logits.shape[1]] * len(self) if counts is None else counts
        rows = zip(self.sequences, logits.unbind(), counts, strict=True)
        return torch.stack([sequence.process(own, num_drafted, n) for sequence, own, n in rows])

    def check(self, largest: abc.Sequence[float]) -> None:
        """Check the logits of a round by the largest ones, [B * n] of n positions.

        All positions are checked: the argmax of NaN is a token, so a draft may agree with it.
        """
        n = len(largest) // len(self)
        for row, sequence in enumerate(self.sequences):
            sequence.check(largest[row * n :][:n])

    def sample_and_commit(self, logits: Tensor) -> None:
        """Sample one token of each row from logits [B, V]. Commit those of the call before, and these as well
        unless the next pass may be queued first. Reads from the device: one for each call.
        """
        logits = self.process(logits[:, None])  # [B, 1, V]
        tokens = self.sample(logits)  # [B, 1]
        reading = AsyncRead([amax(logits), tokens])
        self.commit_unread()
        self.last, self._unread = tokens, (reading, logits)
        go_on = (sequence.remaining > 1 and not sequence.processors for sequence in self.sequences)
        if not (reads_late(self.last.device) and all(go_on)):
            self.commit_unread()

    def commit_unread(self) -> None:
        """Read and commit the tokens that `sample_and_commit` has left. A row that has ended takes none."""
        if self._unread is not None:
            (reading, logits), self._unread = self._unread, None
            largest, ids = reading.wait()
            self.check(largest)
            nothing = [None] * len(self)
            num_drafted = [0] * len(self) if self.longest_draft else nothing
            self.commit([[int(id_)] for id_ in ids], self.last, logits, num_drafted, nothing)

    def commit(
        self,
        tokens: abc.Sequence[abc.Sequence[int]],
        last: Tensor,
        logits: Tensor,
        num_drafted: abc.Sequence[int | None],
        sources: abc.Sequence[str | None],
    ) -> None:
        """Append the tokens of a round to the outputs, up to the token that ends an output.

        Args:
            last: [B, 1] the last token of each row, on the device.
            logits: [B, n, V] processed, n >= tokens.
            num_drafted: [B] tokens of a draft; None: no verification.
            sources: [B] names of the draft sources.
        """
        for row, sequence in enumerate(self.sequences):
            sequence.commit(tokens[row], logits[row], num_drafted[row], sources[row])
        self.last = last
