"""A whole round on a card: what graphs of its drafts and of its verification read, compute and write.

The host writes where rows begin. Graphs then move on by themselves, to the next drafted token and to the
next round, so rounds may be queued before the results of earlier ones are read. Knows nothing of capturing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from self_speculation.backends.runner import ModelRunner
from self_speculation.backends.sampling import sample_by_rules
from self_speculation.config import SAMPLING_RULES
from self_speculation.machine.transfers import overwrite

# A runner, start and end layer, states [R, T, H] and positions [R, T] -> states.
Run = Callable[[ModelRunner, int, int, Tensor, Tensor], Tensor]

_PADDING = -(1 << 30)  # a position that stays negative


class RowStart(NamedTuple):
    """Where a row begins a round."""

    position: int  # of the first token
    ids: Sequence[int]  # the last token of the output, and a draft that is known
    length: int  # of the draft
    is_known: bool  # no layers draft for it


class Outcome(NamedTuple):
    """What a round has given a row."""

    largest: list[float]  # logit of each position
    tokens: list[int]  # of the target: the accepted ones and one more


class RoundTensors:
    """Tensors of R rows and rounds of at most W tokens: W - 1 drafted ones, and one more.

    Args:
        like: of states.
    """

    def __init__(self, like: Tensor, rows: int, width: int, hidden_size: int) -> None:
        device = like.device
        self.rows = rows
        self.width = width
        packed = torch.zeros(rows, 3 * width + 2, dtype=torch.long, device=device)
        self._packed = packed
        # [R, W] of each token of the round; negative: the row has no such token.
        self._positions = packed[:, :width]
        # [R, W] the column of `_ids` for the token that each step drafts.
        self._columns = packed[:, width : 2 * width]
        # [R, W + 1] the tokens of the round. Column W takes drafted tokens that are dropped.
        self._ids = packed[:, 2 * width : -1]
        self._step_index = packed[0, -1:]  # [1] of the next draft step
        self._noise = torch.zeros(rows, 1 + 2 * width, dtype=torch.long, device=device)
        self._keys = self._noise[:, 1:]  # [R, 2 W] of noise, from the position in the first column on
        self._rules = torch.ones(rows, len(SAMPLING_RULES), dtype=torch.float64, device=device)
        self._states = like.new_zeros(rows, width, hidden_size)  # the input of verification
        self._results = torch.zeros(rows * (2 * width + 1), dtype=torch.float32, device=device)

    def begin(self, starts: Sequence[RowStart]) -> None:
        """The next step is the first one of these rows."""
        width = self.width
        numbers = list[int]()
        for position, ids, length, is_known in starts:
            numbers += range(position, position + length + 1)
            numbers += [_PADDING] * (width - length - 1)
            numbers += [width] * width if is_known else range(1, width + 1)
            numbers += ids
            numbers += [0] * (width + 2 - len(ids))
        padding = [_PADDING] * width + [width] * width + [0] * (width + 2)
        overwrite(self._packed, numbers + padding * (self.rows - len(starts)))

    def set_noise(self, keys: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Set the keys of noise of each row, from a position on."""
        longest = 2 * self.width
        numbers = [[position, *of_row, *[0] * (longest - len(of_row))] for position, of_row in keys]
        numbers += [[0] * (longest + 1)] * (self.rows - len(keys))
        overwrite(self._noise, [number for row in numbers for number in row])

    def set_rules(self, rules: Sequence[Sequence[float]]) -> None:
        """Set the rules of sampling of each row."""
        overwrite(self._rules, [number for i in range(self.rows) for number in rules[min(i, len(rules) - 1)]])

    def draft(self, run: Run, runner: ModelRunner, end_layer: int, active: tuple[str, ...]) -> None:
        """Layers [:end_layer] draft the next token of each row.

        Args:
            active: names of the rules of sampling; (): greedily.
        """
        hidden = self._run_step(run, runner, end_layer)
        logits = runner.logits(hidden[:, 0])
        columns = self._columns.index_select(1, self._step_index)
        if not active:
            tokens = logits.argmax(-1)
        else:
            positions = self._positions.index_select(1, self._step_index)
            tokens = sample_by_rules(logits, self._keys_at(positions), self._rules, active, is_draft=True)
        self._ids.scatter_(1, columns, tokens[:, None])
        self._step_index.add_(1)

    def _run_step(self, run: Run, runner: ModelRunner, end_layer: int) -> Tensor:
        """[R, 1, H] the states of the next token of each row after layers [:end_layer], which it keeps."""
        positions = self._positions.index_select(1, self._step_index)
        ids = self._ids.index_select(1, self._step_index)
        hidden = run(runner, 0, end_layer, runner.embed(ids), positions)
        self._states.index_copy_(1, self._step_index, hidden)
        return hidden

    def verify(
        self,
        run: Run,
        runner: ModelRunner,
        start_layer: int,
        end_layer: int,
        width: int,
        active: tuple[str, ...],
    ) -> None:
        """Layers [start_layer:end_layer] verify at most `width` tokens T of each row; the next round begins.

        Args:
            start_layer: 0, or the layers before it have drafted all tokens but the last one.
        """
        ids = self._ids[:, :width]
        positions = self._positions[:, :width]
        if start_layer:
            self._run_step(run, runner, start_layer)
            hidden = self._states[:, :width].clone(memory_format=torch.contiguous_format)
        else:
            hidden = runner.embed(ids)
        hidden = run(runner, start_layer, end_layer, hidden, positions.contiguous())
        logits = runner.logits(hidden.flatten(0, 1))  # [R * T, V]
        if not active:
            largest, tokens = logits.max(-1)
        else:
            largest = logits.amax(-1)
            offsets = torch.arange(width, device=ids.device)
            keys = self._keys_at(self._positions[:, :1] + offsets)
            rules = self._rules[:, None].expand(-1, width, -1).flatten(0, 1)
            tokens = sample_by_rules(logits, keys, rules, active, is_draft=False)
        tokens = tokens.view(-1, width)
        if width == 1:
            accepted = torch.zeros_like(tokens)
        else:
            is_right = (tokens[:, :-1] == ids[:, 1:]) & (positions[:, 1:] >= 0)
            accepted = is_right.cumprod(1).sum(1, keepdim=True)  # [R, 1]
        results = self.results(width)
        results[:, :width] = largest.view(-1, width)
        results[:, width:-1] = tokens
        results[:, -1:] = accepted
        self._ids[:, :1] = tokens.gather(1, accepted)
        self._positions.add_(accepted + 1)
        self._step_index.zero_()

    def _keys_at(self, positions: Tensor) -> Tensor:
        """[R, n] positions of tokens -> [R * n] keys of the noise of the tokens after them."""
        places = (positions - self._noise[:, :1]).clamp_(0, self._keys.shape[1] - 1)
        return self._keys.gather(1, places).flatten()

    def results(self, width: int) -> Tensor:
        """[R, 2 T + 1] what a verification of T tokens has written."""
        return self._results[: self.rows * (2 * width + 1)].view(self.rows, -1)

    def outcomes(self, numbers: Sequence[float], query_lengths: Sequence[int]) -> list[Outcome]:
        """The outcomes of rows from `results`, as they were read.

        Args:
            query_lengths: [B] tokens that each row has verified.
        """
        step = len(numbers) // self.rows
        width = step // 2
        found = []
        for row, number in enumerate(query_lengths):
            largest = numbers[row * step : row * step + number]
            tokens = numbers[row * step + width : row * step + 2 * width]
            accepted = int(numbers[(row + 1) * step - 1])
            found.append(Outcome([*largest], [*map(int, tokens[: accepted + 1])]))
        return found
