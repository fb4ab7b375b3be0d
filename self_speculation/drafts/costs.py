"""What a round costs: one notion for the policy that plans rounds, the sweep, and the formula.

Numbers alone. `clock` measures them; `estimated` takes them from the bytes that passes read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    """

    plain_step: float
    draft_step: Mapping[int, float]
    verifications: Mapping[int, Sequence[float]]
    lengths: Sequence[int]
    probe: float

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
    def estimated(cls, model: PreTrainedModel, exit_layer: int, draft_weights: DraftWeights) -> Costs:
        """By bytes of weights read: a draft step takes c = (E + h) / (L + h), h being the head's size in
        layers, and a verification as much as a plain step, however wide it is.
        """
        layers = model.base_model.layers
        head = model.get_output_embeddings().weight.nbytes / sum(p.nbytes for p in layers[0].parameters())
        of_layers, of_head = bytes_per_weight(model, draft_weights)
        read = (of_layers * exit_layer + of_head * head) / model.dtype.itemsize
        return cls(
            plain_step=1.0,
            draft_step={exit_layer: read / (len(layers) + head)},
            verifications={0: (1.0,), exit_layer: (1.0,)},
            lengths=(0,),
            probe=head / (len(layers) + head),
        )
