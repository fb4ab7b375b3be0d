"""The outputs in flight, side by side: one for each row of every tensor that decoding computes.

Rows share passes and nothing else. Each has its own history, processors, random numbers, stop conditions and
streamer, see `Output`, so that it comes out as it would alone. Knows nothing of layers or caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from self_speculation.decoding.output import Output
from self_speculation.decoding.sampling import Choice, Sampler, SamplerOfRows, random_numbers, together
from self_speculation.transfers import Reading, on_device, read


class Rows:
    """See the module.

    Args:
        sampler: picks the tokens of outputs that have none of their own.
        device: where the model takes its ids.
        longest_draft: the most tokens that a round may draft. Each round uses random numbers for that many,
            so that a row's do not depend on how many are drafted, in it or in another row.
    """

    def __init__(self, sampler: Sampler, device: torch.device, longest_draft: int = 0) -> None:
        self._default, self.longest_draft = sampler, longest_draft
        self.outputs: list[Output] = []
        self.last = torch.empty(0, 1, dtype=torch.long, device=device)  # [B, 1] the last token of each
        self._numbers: Tensor | None = None  # [B, 2 * longest_draft + 1] of this round

    def __len__(self) -> int:
        return len(self.outputs)

    @cached_property
    def sampler(self) -> Sampler | SamplerOfRows:
        """Picks the tokens of all, while they are these."""
        samplers = [output.sampler or self._default for output in self.outputs]
        return together(samplers or [self._default], self.last.device)

    @property
    def all_go_on(self) -> bool:
        """Whether none has ended yet."""
        return all(output.remaining for output in self.outputs)

    def rooms(self, k: int, wanted: Sequence[bool] | None = None) -> list[int]:
        """[B] how many tokens may be drafted for each row, `k` at most. A round can output one token
        more, which needs room too.

        Args:
            wanted: [B] the rows that drafts are wanted for; None: all.
        """
        pairs = zip(self.outputs, wanted or [True] * len(self), strict=True)
        return [
            max(0, min(k, output.remaining - 1)) if wants and output.wants_drafts else 0
            for output, wants in pairs
        ]

    def admit(self, output: Output, logits: Tensor) -> None:
        """Add a row, and pick its first token by the logits [1, V]."""
        alone = Rows(self._default, self.last.device)
        alone.outputs = [output]
        alone.emit(logits)
        self.outputs.append(output)
        self.last = torch.cat((self.last, alone.last))
        vars(self).pop("sampler", None)

    def drop(self, row: int) -> Output:
        """Take out a row that has ended; the last row takes its place."""
        ended, self.outputs[row] = self.outputs[row], self.outputs[-1]
        self.outputs.pop()
        if row < len(self.outputs):
            self.last[row] = self.last[-1]
        self.last = self.last[:-1]
        self._numbers = None  # they may be left of a round that raised an error
        vars(self).pop("sampler", None)
        return ended

    def choose(self, logits: Tensor, position: int, going: Sequence[bool]) -> tuple[Choice, Tensor]:
        """Pick a token to be drafted at a position 0, 1, ... after the decided ones.

        Args:
            logits: [B, V]
            going: [B] whether the row's draft is that long. Where it is not, the row's last decided token
                stands in: a token picked here might put NaN into the cache, and a mask does not keep NaN out.

        Returns:
            The choice, and the processed logits [B, V] that it was made by.
        """
        logits = self.process(logits[:, None], position, going)[:, 0]
        numbers = self._round_numbers()
        choice = self.sampler(logits, None if numbers is None else numbers[:, position])
        if not all(going):
            is_going = on_device(going, logits.device).bool()
            choice = replace(choice, tokens=choice.tokens.where(is_going, self.last[:, 0]))
        return choice, logits

    def propose(
        self, tokens: Tensor, position: int, going: Sequence[bool], confidence: Tensor | None = None
    ) -> Reading | None:
        """Note drafted tokens [B], and show those of rows that show drafts.

        Reads from the device: one if drafts are shown or a confidence is given; else none.

        Args:
            confidence: [B], in fp32, the tokens' probabilities, if they decide whether drafts go on.

        Returns:
            The read, if there is one: the tokens, then the confidences.
        """
        drafting = [row for row, goes in enumerate(going) if goes]
        for row in drafting:
            self.outputs[row].place(tokens[row], position)
        # After an end id nothing of a draft is shown: it will never be output.
        shown = [row for row in drafting if self.outputs[row].shows_draft]
        if confidence is None and not shown:
            return None
        reading = Reading([tokens] if confidence is None else [tokens, confidence])
        for row in shown:
            self.outputs[row].show_drafted(int(reading.wait()[row]))
        return reading

    def joined(self, choices: Sequence[Choice], vocab_size: int) -> tuple[Tensor, Tensor | None]:
        """The tokens [B, k] of k choices, and what they were drawn from, [B, k, V]; None when greedy."""
        if not choices:
            nothing = self.last.new_zeros(len(self), 0, vocab_size, dtype=torch.float32)
            return self.last[:, :0], None if self.sampler.greedy else nothing
        drawn_from = [choice.probabilities for choice in choices if choice.probabilities is not None]
        tokens = torch.stack([choice.tokens for choice in choices], 1)
        return tokens, torch.stack(drawn_from, 1) if drawn_from else None

    def process(self, logits: Tensor, num_drafted: int = 0, counts: Sequence[int] | None = None) -> Tensor:
        """Apply each row's logits processors.

        Args:
            logits: [B, n, V]; position i is for the token after the history with `num_drafted + i` drafted
                ones.
            counts: [B] how many of a row's n positions matter; None: all.

        Returns:
            [B, n, V], in fp32 when there are processors.
        """
        if not any(output.has_processors for output in self.outputs):
            return logits
        counts = [logits.shape[1]] * len(self) if counts is None else counts
        rows = zip(self.outputs, logits.unbind(), counts, strict=True)
        return torch.stack([output.process(of_row, num_drafted, n) for output, of_row, n in rows])

    def numbers(self, num_drafted: int) -> Tensor | None:
        """[B, k + 1] random numbers for the verdict on a draft; None when greedy."""
        numbers = self._round_numbers()
        if numbers is None:
            return None
        return torch.cat((numbers[:, self.longest_draft :][:, :num_drafted], numbers[:, -1:]), 1)

    def read(self, numbers: Sequence[Tensor], logits: Tensor) -> list[list[float]]:
        """The numbers of each tensor, in one read. Outputs learn where their logits let no token be picked.

        Args:
            logits: [B, n, V] that the tokens of the round are picked by. A guess may agree with a target that
                is NaN, so all positions are looked at.
        """
        largest, *values = read([logits.amax(-1), *numbers])
        n = logits.shape[1]
        for row, output in enumerate(self.outputs):
            output.check(largest[row * n :][:n], (output.sampler or self._default).greedy)
        return values

    def emit(self, logits: Tensor) -> None:
        """Decide on one token of each row, picked by logits [B, V]. Reads from the device: one."""
        logits = self.process(logits[:, None])  # [B, 1, V]
        numbers = self._round_numbers()
        tokens = self.sampler(logits[:, 0], None if numbers is None else numbers[:, -1]).tokens  # [B]
        (ids,) = self.read([tokens], logits)
        no_round = ([0] * len(self), [""] * len(self))
        self.commit([[int(id_)] for id_ in ids], tokens[:, None], logits, *no_round)

    def commit(
        self,
        tokens: Sequence[Sequence[int]],
        last: Tensor,
        scores: Tensor,
        drafted: Sequence[int],
        sources: Sequence[str],
    ) -> None:
        """Make the tokens of a round part of the outputs, in each row up to the one that ends the output.

        Args:
            tokens: those of each row, as many as it has.
            last: [B, 1] the last of these of each row, on the device.
            scores: [B, >= n, V] the processed logits that they were picked by, n being the most of a row.
            drafted: [B] how many tokens were drafted for each.
            sources: [B] names of what drafted them; empty where there was no round.
        """
        for row, output in enumerate(self.outputs):
            if not output.stop_reason:
                output.commit(tokens[row], scores[row], drafted[row], sources[row])
        self.last, self._numbers = last, None

    def _round_numbers(self) -> Tensor | None:
        """[B, 2 * longest_draft + 1] random numbers of this round: those that draw drafted tokens, those that
        accept or reject them, and one for the token after them. None when greedy.
        """
        if self._numbers is None and not self.sampler.greedy:
            n, device = 2 * self.longest_draft + 1, self.last.device
            self._numbers = torch.stack(
                [random_numbers(n, device, output.generator) for output in self.outputs]
            )
        return self._numbers
