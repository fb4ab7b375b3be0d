"""The LayerSkip recipe as arithmetic: layer dropout, curriculum and loss weights of the exits.

Elhoushi et al. (arXiv 2404.16710), sections 4.1 and 4.2. Layers are numbered from 0; exit layer E is the
output of layer E-1. This module knows nothing of models, data or optimizers.
"""

import math
from collections.abc import Sequence

import numpy

IGNORED = -100  # label of a position without a loss


def dropout_rates(
    num_layers: int, p_max: float, schedule: str = "constant", step: int = 0, num_steps: int = 1
) -> list[float]:
    """p_{l,t} = S(t) D(l) p_max: the probability that a sample skips layer l at step t (eq. 1-3).

    D grows from 0 at the first layer to 1 at the last. S is 1 (`constant`) or grows from 0 to 1 over the
    training (`exponential`, for a new model).
    """
    over_time = 1.0 if schedule == "constant" else _growth(step, num_steps)
    return [over_time * _growth(layer, num_layers) * p_max for layer in range(num_layers)]


def draw_kept(rates: Sequence[float], num_samples: int, seed: int, step: int) -> numpy.ndarray:
    """[L, num_samples], True where a layer runs on a sample, for all samples of a step in their order.

    Each rank takes the columns of the rank's samples, so the number of ranks changes nothing.
    """
    drawn = numpy.random.default_rng([seed, step]).random((len(rates), num_samples))
    return drawn >= numpy.array(rates)[:, None]


def enabled_exits(
    exit_layers: Sequence[int], num_layers: int, curriculum: str, rotation: int, step: int, num_steps: int
) -> list[int]:
    """C(t, l): the exits below the last layer that learn at step t.

    `rotational`: every `rotation`-th of `exit_layers`, shifted by one at each step. `gradual`: one more every
    T/(2L) steps from the last layer downwards, all of them from half time on.
    """
    if curriculum == "rotational":
        return [exit for index, exit in enumerate(exit_layers) if (index - step) % rotation == 0]
    reached = num_layers - 1 - math.floor(step / (num_steps / (2 * num_layers)))
    return [exit for exit in exit_layers if exit - 1 >= reached]


def loss_weights(enabled: Sequence[int], num_layers: int, e_scale: float, equal: bool) -> dict[int, float]:
    """The weight of each exit's loss, by exit; exit L is the last layer.

    The paper's are (eq. 5-6) e(l) = e_scale * sum_{i<=l} i, e(L-1) = L-1 + e_scale * sum_{i<=L-2} i, divided
    by their sum; e(0), of exit 1, is 0. `equal`: 1 for the last layer, e_scale divided among enabled exits.
    """
    last = num_layers - 1
    if equal:
        return {num_layers: 1.0, **{exit: e_scale / len(enabled) for exit in enabled}}
    scales = {exit: e_scale * (exit - 1) * exit / 2 for exit in enabled}  # sum_{i=0..l} i, l = exit - 1
    scales[num_layers] = last + e_scale * (last - 1) * last / 2
    total = sum(scales.values())
    return {exit: scale / total for exit, scale in scales.items()}


def _growth(index: int, length: int) -> float:
    """exp(i ln2 / (n - 1)) - 1: 0 at the first of n, 1 at the last."""
    return math.exp(index * math.log(2) / (length - 1)) - 1 if length > 1 else 1.0
