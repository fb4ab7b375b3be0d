"""What a round costs: one notion for the policy that plans rounds, the sweep, and the formula.

Numbers alone. `clock` measures them; `estimated` takes them from the bytes that passes read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy

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
        probe: one exit read off a pass.
        draws: the same as other draws of what was measured would have it, so that it shows how certain
            anything is that follows from costs; none where nobody asked, or too little was measured.
        num_rows: sequences in the passes: all costs are those of one token, or draft, of each of them.
        fewer: the same for fewer rows, as a batch has them in the end; all from 1 up.
        saved_by_short_head: what a drafted token costs less where a draft reads few rows of the head.
    """

    plain_step: float
    draft_step: Mapping[int, float]
    verifications: Mapping[int, Sequence[float]]
    lengths: Sequence[int]
    probe: float
    draws: Sequence[Costs] = ()
    num_rows: int = 1
    fewer: Mapping[int, Costs] = field(default_factory=dict)
    saved_by_short_head: float = 0.0

    def of(self, num_rows: int) -> Costs:
        """Of passes over so many rows."""
        return self if num_rows == self.num_rows else self.fewer[num_rows]

    def with_fewer_rows(self, one: Costs) -> Costs:
        """The same, and those of fewer rows: on straight lines between these and those of one."""

        def between(num_rows: int) -> Costs:
            share = (num_rows - 1) / (self.num_rows - 1)

            def mean(of_one: float, of_all: float) -> float:
                return of_one + share * (of_all - of_one)

            return Costs(
                plain_step=mean(one.plain_step, self.plain_step),
                draft_step={e: mean(one.draft_step[e], cost) for e, cost in self.draft_step.items()},
                verifications={
                    e: [mean(one.verification(e, k), self.verification(e, k)) for k in self.lengths]
                    for e in self.verifications
                },
                lengths=self.lengths,
                probe=mean(one.probe, self.probe),
                saved_by_short_head=mean(one.saved_by_short_head, self.saved_by_short_head),
                num_rows=num_rows,
            )

        return replace(self, fewer={n: between(n) for n in range(1, self.num_rows)})

    def with_share_of_head(self, share: float, bytes_of_head: float = 1.0) -> Costs:
        """With drafts that read a share of the head's rows, where these have read all.

        Args:
            bytes_of_head: that they read of each weight of the head, for each of the model's own.
        """
        saved = (1.0 - share) * bytes_of_head * self.probe
        return replace(
            self,
            draft_step={layer: max(0.0, cost - saved) for layer, cost in self.draft_step.items()},
            draws=[draw.with_share_of_head(share, bytes_of_head) for draw in self.draws],
            fewer={n: costs.with_share_of_head(share, bytes_of_head) for n, costs in self.fewer.items()},
        )

    def verification(self, exit_layer: int, num_drafted: int) -> float:
        return float(numpy.interp(num_drafted, self.lengths, self.verifications[exit_layer]))

    def drafted(self, exit_layer: int, short_head: bool = False) -> float:
        """One token, drafted at an exit layer, if so with few rows of the head."""
        return max(0.0, self.draft_step[exit_layer] - self.saved_by_short_head * short_head)

    def round(self, exit_layer: int, num_drafted: int, short_head: bool = False) -> float:
        """With tokens drafted at an exit layer; 0: with tokens that cost nothing to draft, or with none."""
        drafts = num_drafted * self.drafted(exit_layer, short_head) if exit_layer else 0.0
        return drafts + self.verification(exit_layer, num_drafted)

    def draft_ratio(self, exit_layer: int, short_head: bool = False) -> float:
        """c of the formula: a drafted token, in plain steps."""
        return self.drafted(exit_layer, short_head) / self.plain_step

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
            probe=head / (len(layers) + head),
        )


def never_falling(values: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Of all sequences that never fall, the nearest one in weighted squares (isotonic regression).

    Where a value is below the one before, both become their mean, and so on with the means.
    """
    blocks: list[tuple[float, float, int]] = []  # mean, weight, how many values
    for value, weight in zip(values, weights, strict=True):
        block = (value, weight, 1)
        while blocks and blocks[-1][0] > block[0]:
            mean, before, number = blocks.pop()
            together = before + block[1]
            block = ((mean * before + block[0] * block[1]) / together, together, number + block[2])
        blocks.append(block)
    return [mean for mean, _, number in blocks for _ in range(number)]
