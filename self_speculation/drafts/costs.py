"""What a round costs: one notion for the policy that plans rounds, the sweep, and the formula.

An estimate is made of the bytes that passes read. A sweep calibrates one; adaptive decoding corrects it by
what its rounds take.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy

from self_speculation.drafts.estimates import DecayedLine, DecayedMean
from self_speculation.model.quantized_layers import bytes_per_weight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from self_speculation.config import DraftWeights


@dataclass(frozen=True)
class Costs:
    """All in one unit, whichever: seconds where they were measured, plain steps where they are estimated.

    Args:
        plain_step: one token by autoregressive decoding at full depth.
        draft_step: exit layer -> one drafted token.
        verifications: exit layer -> what follows a draft of `lengths` tokens made there, until the next draft
            begins; 0: the draft left nothing to go on from, and all layers verify.
        lengths: from 0 up; what lies in between is interpolated.
    """

    plain_step: float
    draft_step: Mapping[int, float]
    verifications: Mapping[int, Sequence[float]]
    lengths: Sequence[int]

    def verification(self, exit_layer: int, num_drafted: int) -> float:
        return float(numpy.interp(num_drafted, self.lengths, self.verifications[exit_layer]))

    def round(self, exit_layer: int, num_drafted: int) -> float:
        """With tokens drafted at an exit layer; 0: with tokens that cost nothing to draft, or with none."""
        drafts = num_drafted * self.draft_step[exit_layer] if exit_layer else 0.0
        return drafts + self.verification(exit_layer, num_drafted)

    def draft_ratio(self, exit_layer: int) -> float:
        """c of the formula: a drafted token, in plain steps."""
        return self.draft_step[exit_layer] / self.plain_step

    @classmethod
    def estimated(
        cls,
        model: PreTrainedModel,
        exit_layer: int,
        draft_weights: DraftWeights,
        draft_vocabulary: int | None = None,
    ) -> Costs:
        """By bytes of weights read: a draft step takes c = (E + h) / (L + h), h being the head's size in
        layers (E + h N / V with N of V rows of it), and a verification as much as a plain step, however wide
        it is.
        """
        layers = model.base_model.layers
        head = model.get_output_embeddings().weight.nbytes / sum(p.nbytes for p in layers[0].parameters())
        rows = len(model.get_output_embeddings().weight)
        head_of_draft = head * min(draft_vocabulary or rows, rows) / rows
        of_layers, of_head = bytes_per_weight(model, draft_weights)
        read = (of_layers * exit_layer + of_head * head_of_draft) / model.dtype.itemsize
        return cls(
            plain_step=1.0,
            draft_step={exit_layer: read / (len(layers) + head)},
            verifications={0: (1.0,), exit_layer: (1.0,)},
            lengths=(0,),
        )


_NOTHING_SEEN = DecayedLine()


class RoundTimes:
    """Seconds that rounds take, by their source and the rows in them: a + b x tokens drafted of each row.

    A source begins with an estimate, scaled by the rounds of any source so far, and is corrected by its own
    rounds. The longer ago one was, the less it counts: a bad moment of the machine is forgotten.

    Args:
        warm_up: how many of the first rounds of a source and a draft length do not count: passes may be
            compiled in them.
    """

    _TOO_LONG = 3.0  # no round counts as more than so many times what was expected of it
    _LEAST = 0.1  # no round takes less of a plain step, whatever line a few noisy rounds give

    def __init__(self, warm_up: int = 0) -> None:
        self._warm_up = warm_up
        self._runs: Counter[tuple[str, int, int]] = Counter()
        self._lines: dict[tuple[str, int], DecayedLine] = {}
        self._units: dict[int, DecayedMean] = {}  # seconds of a plain step, by rows

    def line(self, source: str, num_rows: int, drafted: float) -> tuple[float, float]:
        """a and b, in seconds; in plain steps, where there was no round yet.

        Args:
            drafted: estimated cost of one drafted token, in plain steps.
        """
        unit = self._unit(num_rows)
        a, b = self._lines.get((source, num_rows), _NOTHING_SEEN).fitted(unit, unit * drafted)
        return max(a, self._LEAST * unit), b

    def add(self, source: str, num_rows: int, drafted: float, num_drafted: int, seconds: float) -> None:
        """Learn how long a round took. Arguments as those of `line`."""
        key = (source, num_rows)
        self._runs[(*key, num_drafted)] += 1
        if self._runs[(*key, num_drafted)] <= self._warm_up:
            return
        # The very first one is compared with nothing and may be a bad moment. It says only what a step takes,
        # which every round corrects: a source that seems slow is hardly ever tried again.
        step = seconds / (1.0 + drafted * num_drafted)
        if self._units:
            a, b = self.line(source, num_rows, drafted)
            seconds = min(seconds, self._TOO_LONG * (a + b * num_drafted))
            self._lines.setdefault(key, DecayedLine()).add(num_drafted, seconds)
            # Without its drafts, which take longer than estimated where there are many rows.
            step = max(seconds - b * num_drafted, self._LEAST * seconds)
        self._units.setdefault(num_rows, DecayedMean(0.0, weight=0.0)).add(step)

    def _unit(self, num_rows: int) -> float:
        """Seconds of a plain step, by the nearest number of rows that is known; 1 where none is."""
        if not self._units:
            return 1.0
        return self._units[min(self._units, key=lambda known: abs(known - num_rows))].value
