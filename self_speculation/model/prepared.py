"""What was prepared for a model once and is kept as long as the model: the only registry of this library."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import nn

from self_speculation.model.vocabulary import Vocabulary

if TYPE_CHECKING:
    from self_speculation.config import DraftWeights
    from self_speculation.model.compiled import Passes
    from self_speculation.model.lean_layers import Lean
    from self_speculation.model.short_head import Gathered


@dataclass
class Prepared:
    """
    Args:
        lean: layer or head -> its lean form, see `fuse`.
        copies: lean form -> its copies in fewer bits, by what they multiply by, see `quantized`.
        fastest: the format that drafts of such copies are fastest in here; None: not known yet.
        passes: by the rows of their batch, see `compile_decoding`; None where nothing is to be compiled.
        vocabulary: what it wrote, and what it is likely to write.
        gathered: rows of its head for drafts, by their number and what they are multiplied by.
        costs: what rounds were measured to cost, by whatever they depend on.
        learnt: what adaptive decoding has learnt of its drafts, by whatever that depends on.
    """

    lean: dict[nn.Module, Lean] = field(default_factory=dict)
    copies: WeakKeyDictionary[Lean, dict[Any, Lean]] = field(default_factory=WeakKeyDictionary)
    fastest: DraftWeights | None = None
    passes: dict[int, Passes] | None = None
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    gathered: dict[Hashable, Gathered] = field(default_factory=dict)
    costs: dict[Hashable, Any] = field(default_factory=dict)
    learnt: dict[Hashable, Any] = field(default_factory=dict)


_PREPARED: WeakKeyDictionary[nn.Module, Prepared] = WeakKeyDictionary()


def prepared(model: nn.Module) -> Prepared:
    """What there is for the model; nothing yet at first."""
    return _PREPARED.setdefault(model, Prepared())
