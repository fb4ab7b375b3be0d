"""x W^T + b by whatever computes it fastest: for a few tokens on a CPU libraries differ threefold.

The weights are the modules' own; `Packed` alone has a copy.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from self_speculation.model.devices import free_memory

# What `choose_forms` measures: forms of products with weights of at least so many elements, at these widths,
# in so many rounds. What lies between two widths is done as the wider one.
_SMALLEST_TO_CHOOSE = 2**15
_WIDTHS = (1, 2, 3, 4, 6, 8, 12, 16, 32, 64)
_ROUNDS = 3
# After the first round, forms that took so many times as long as the best are out.
_HOPELESS = 1.3
# Of large models some weights are enough, and of a large weight some rows: so many elements.
_SAMPLE, _LARGE = 2**24, 2**23
# Copies of weights may take so much of the memory that is free. Models of fewer bytes than these have none:
# they stay largely in the processor's cache, where copies would compete with the weights.
_SHARE_OF_ROOM, _CACHED = 1 / 3, 2**27


def _transposed(x: Tensor, weight: Tensor) -> Tensor:
    """W x^T, transposed. One vector goes in twice: to multiply two columns is often faster."""
    columns = torch.cat((x, x)) if x.shape[0] == 1 else x
    return torch.mm(weight, columns.T).T[: x.shape[0]].contiguous()


def _blocked(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T by blocks of rows of W: small enough for kernels that do not first copy W into another order."""
    blocks = weight.view(_num_blocks(weight), -1, weight.shape[1])
    product = torch.bmm(x.expand(len(blocks), -1, -1), blocks.mT)
    return product.transpose(0, 1).reshape(x.shape[0], -1)


def _num_blocks(weight: Tensor) -> int:
    """As many as there can be of equal height, 64 rows or more; 1 where a prime number of rows stands."""
    rows = weight.shape[0]
    return next((n for n in range(rows // 64, 1, -1) if rows % n == 0), 1)


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T by another library than the one behind `linear` in fp32; a compiler makes its own choice."""
    if torch.compiler.is_compiling():
        return linear(x, weight)
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _onednn_transposed(x: Tensor, weight: Tensor) -> Tensor:
    """W x^T, transposed: of two matrices this library copies the second into another order, the small one."""
    return _onednn(weight, x).T.contiguous()


class Packed:
    """x W^T over a copy of W in the order that kernels read: without it, each pass brings W into that order.

    Args:
        weight: W [out, in], in fp32 on a CPU.
        parameters: those that W is made of. A change of them is noticed by their versions or, where it went
            past those (`.data`), by some elements.
    """

    # Elements that are watched; and the tokens that the order is meant for. It serves fewer as well.
    _WATCHED, _WIDTH = 64, 16

    def __init__(self, weight: Tensor, parameters: Sequence[Tensor] = ()) -> None:
        self._weight, self._parameters = weight, [p for p in parameters if not p.is_inference()]
        self._watched = weight.flatten()[:: -(-weight.numel() // self._WATCHED)]
        self._pack()

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        return _onednn(x, weight if torch.compiler.is_compiling() else self._packed)

    def follow(self) -> None:
        """Pack W anew where it has changed."""
        if self._versions != self._seen_versions or not torch.equal(self._watched, self._seen):
            self._pack()

    @property
    def num_bytes(self) -> int:
        return self._weight.nbytes

    @property
    def _versions(self) -> list[int]:
        return [parameter._version for parameter in self._parameters]

    def _pack(self) -> None:
        self._seen, self._seen_versions = self._watched.clone(), self._versions
        self._packed = torch.ops.mkldnn._reorder_linear_weight(self._weight, self._WIDTH)


# Ways to multiply [T, in] by a weight [out, in].
Form = Callable[[Tensor, Tensor], Tensor]
FORMS: tuple[Form, ...] = (linear, _transposed, _blocked)
if torch.backends.mkldnn.is_available():
    FORMS += (_onednn, _onednn_transposed)
# With those that have to be made for a weight.
Kind = Form | type[Packed]


class Product:
    """x [T, in] -> x W^T + b [T, out]. Fewer calls than `linear`, and the fastest form there is."""

    def __init__(self, *projections: nn.Linear) -> None:
        """Several projections become one, their weights views of the joint one."""
        self.weight = _joined([projection.weight for projection in projections])
        biases = [projection.bias for projection in projections]
        self.bias = None if biases[0] is None else _joined(biases)
        # Widths T that another form than the ordinary one is faster for, see `choose_forms`.
        self.forms: dict[int, Form] = {}
        self.packed: Packed | None = None
        self._parameters = [projection.weight for projection in projections]
        self._weight_t = self.weight.t()

    def use(self, kinds: Mapping[int, Kind]) -> None:
        """Multiply tokens of these widths in these ways."""
        self.packed = Packed(self.weight, self._parameters) if Packed in kinds.values() else None
        made: dict[Kind, Any] = {Packed: self.packed}
        self.forms = {width: made.get(kind, kind) for width, kind in kinds.items()}

    def follow(self) -> None:
        """Notice where the weight has changed."""
        if self.packed is not None:
            self.packed.follow()

    def __call__(self, x: Tensor) -> Tensor:
        form = self.forms.get(x.shape[0]) if self.forms else None
        product = torch.mm(x, self._weight_t) if form is None else form(x, self.weight)
        return product if self.bias is None else product.add_(self.bias)

    def unconverted(self, x: Tensor) -> Tensor:
        """The product in the format that it is computed in, which copies in fewer bits have of their own."""
        return self(x)

    def add_to(self, hidden: Tensor, x: Tensor) -> Tensor:
        """hidden + x W^T + b, in the place of `hidden`: one kernel, not two."""
        form = self.forms.get(x.shape[0]) if self.forms else None
        hidden = hidden.addmm_(x, self._weight_t) if form is None else hidden.add_(form(x, self.weight))
        return hidden if self.bias is None else hidden.add_(self.bias)

    def of_rows(self, ids: Tensor) -> Product:
        """The same over a copy of some rows [n] of the weight."""
        other = copy.copy(self)
        other.packed = None
        other.forms = {width: form for width, form in self.forms.items() if form is not self.packed}
        other.weight = self.weight[ids]
        other.bias = None if self.bias is None else self.bias[ids]
        other._weight_t = other.weight.t()
        return other

    def tensors(self) -> list[Tensor]:
        """All that a pass reads."""
        return [self.weight, self._weight_t, *([] if self.bias is None else [self.bias])]


def _joined(parameters: Sequence[Tensor]) -> Tensor:
    """One tensor of all rows; the parameters become views of it."""
    if len(parameters) == 1:
        return parameters[0].data
    joint = torch.cat([parameter.data for parameter in parameters])
    for parameter, part in zip(parameters, joint.split([len(p) for p in parameters]), strict=True):
        parameter.data = part
    return joint


def choose_forms(products: Sequence[Product]) -> None:
    """Find out which form of a product is fastest for each shape of a weight and each width, and use it.

    BLAS libraries differ threefold here, in both directions, from shape to shape and from width to width, so
    the answer is measured, in about a second. It can only be another than `linear` on a CPU in fp32, and does
    not matter for small weights.
    """
    products = [
        product
        for product in products
        if product.weight.device.type == "cpu"
        and product.weight.dtype == torch.float32
        and product.weight.numel() >= _SMALLEST_TO_CHOOSE
    ]
    weights = [product.weight for product in products]
    kinds: tuple[Kind, ...] = FORMS
    room = _SHARE_OF_ROOM * free_memory(torch.device("cpu"))
    if torch.backends.mkldnn.is_available() and _CACHED <= sum(weight.nbytes for weight in weights) <= room:
        kinds += (Packed,)
    least = _least_seconds(kinds, _sample(weights))
    chosen: dict[torch.Size, dict[int, Kind]] = {weight.shape: {} for weight in weights}
    for (shape, width), took in least.items():
        # Another form must be clearly faster than the ordinary one, and a copy than all others.
        demands = {linear: 0.9, Packed: 1.1}
        best = min(kinds, key=lambda kind: took[kind] * demands.get(kind, 1.0))
        if best is not linear:
            narrower = max((other for other in _WIDTHS if other < width), default=0)
            chosen[shape] |= dict.fromkeys(range(narrower + 1, width + 1), best)
    for product in products:
        product.use(chosen[product.weight.shape])


def _sample(weights: Sequence[Tensor]) -> list[tuple[torch.Size, Tensor]]:
    """Weights layer after layer, as decoding reads them: some of them, one of each shape at least. With the
    shapes that they stand for.
    """
    sample: list[tuple[torch.Size, Tensor]] = []
    for weight in weights:
        rows = _LARGE // weight.shape[1] // 64 * 64
        part = weight[:rows] if rows and weight.numel() > _LARGE else weight
        taken = sum(other.numel() for _, other in sample)
        if taken < _SAMPLE or weight.shape not in {shape for shape, _ in sample}:
            sample.append((weight.shape, part))
    return sample


@torch.inference_mode()
def _least_seconds(
    kinds: Sequence[Kind], sample: Sequence[tuple[torch.Size, Tensor]]
) -> dict[tuple[torch.Size, int], dict[Kind, float]]:
    """By shape and width, how long the products of a sample take together."""
    inputs = {weight.shape[1]: torch.randn(max(_WIDTHS), weight.shape[1]) for _, weight in sample}
    forms: dict[Kind, list[Any]] = {
        kind: [Packed(weight) if kind is Packed else kind for _, weight in sample] for kind in kinds
    }
    least = {(shape, width): dict.fromkeys(kinds, math.inf) for shape, _ in sample for width in _WIDTHS}
    # All in turn: a slow moment of the machine hits no one form alone.
    for turn, width, kind in itertools.product(range(_ROUNDS), _WIDTHS, kinds):
        taken: dict[torch.Size, float] = {}
        for (shape, weight), form in zip(sample, forms[kind], strict=True):
            known = least[shape, width]
            if turn and known[kind] > _HOPELESS * min(known.values()):
                continue
            x = inputs[weight.shape[1]][:width]
            started = time.perf_counter()
            form(x, weight)
            taken[shape] = taken.get(shape, 0.0) + time.perf_counter() - started
        for shape, seconds in taken.items():
            least[shape, width][kind] = min(least[shape, width][kind], seconds)
    return least
