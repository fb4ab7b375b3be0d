"""Losses and scores of hidden states under a head, computed in chunks of positions.

The logits of all exits, [exits, B, T, V], would be the largest tensor in memory. Here logits live for one
chunk, and the backward pass computes them again.
"""

import torch
from torch import Tensor
from torch.distributions import Categorical
from torch.nn import Linear, LinearCrossEntropyOptions, functional
from torch.utils.checkpoint import checkpoint

from training.recipe import IGNORED

# Logits of a chunk: 256 MiB in fp32. Smaller chunks read a large head too often.
CHUNK = 2**26


def exit_losses(head: Linear, states: Tensor, labels: Tensor, distill: bool = False) -> Tensor:
    """[E, N] losses of the exits at each position; 0 without a label. The last exit is the last layer.

    Args:
        states: [E, N, H], normed.
        labels: [N].
        distill: the loss of early exits is KL(last layer || exit), without a gradient for the last layer.
    """
    kind = states.device.type
    if torch.is_autocast_enabled(kind):  # linear_cross_entropy ignores it; cast the head once for all exits
        states = states.to(torch.get_autocast_dtype(kind))
    weight = head.weight.to(states.dtype)
    bias = None if head.bias is None else head.bias.to(states.dtype)

    in_16_bits = kind == "cuda" and states.itemsize == 2
    adds_in_fp32 = in_16_bits and torch.cuda.get_device_capability(states.device) >= (8, 0)

    def cross_entropies(exit: Tensor) -> Tensor:
        options = LinearCrossEntropyOptions(
            batch_chunk_size=min(_positions(head), len(exit)),
            # By default the gradient of the head is added up in 16 bits on a GPU.
            acc_policy="balanced" if adds_in_fp32 else "auto",
            acc_dtype=torch.float32 if adds_in_fp32 else None,
        )
        return functional.linear_cross_entropy(
            exit, weight, labels, linear_bias=bias, ignore_index=IGNORED, reduction="none", options=options
        )

    if not distill or len(states) == 1:
        return torch.stack([cross_entropies(exit) for exit in states])
    last = cross_entropies(states[-1])[None]
    divergences = [
        # Keeps no logits: the backward pass computes them again.
        checkpoint(_divergences, weight, bias, chunk, use_reentrant=False)
        for chunk in states.split(_positions(head, len(states) + 2), dim=1)
    ]
    exits = torch.cat(divergences, dim=1)
    return torch.cat([exits.where(labels != IGNORED, 0), last])


@torch.no_grad()
def exit_scores(head: Linear, states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """([N] losses, [N] predicted tokens, [N] entropies) of an exit's normed states [N, H]. A loss is 0
    without a label.
    """
    losses = []
    guesses = []
    entropies = []
    size = _positions(head)
    for chunk, targets in zip(states.split(size), labels.split(size), strict=True):
        logits = _at_least_fp32(functional.linear(chunk, head.weight, head.bias))
        losses.append(functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none"))
        guesses.append(logits.argmax(-1))
        entropies.append(Categorical(logits=logits, validate_args=False).entropy())
    return torch.cat(losses), torch.cat(guesses), torch.cat(entropies)


def _divergences(weight: Tensor, bias: Tensor | None, states: Tensor) -> Tensor:
    """[E - 1, N] KL(last || exit) of states [E, N, H]."""

    def log_probabilities(exit: Tensor) -> Tensor:
        return _at_least_fp32(functional.linear(exit, weight, bias)).log_softmax(-1)

    *exits, last = states
    with torch.no_grad():
        targets = log_probabilities(last)
    return torch.stack([
        functional.kl_div(log_probabilities(exit), targets, reduction="none", log_target=True).sum(-1)
        for exit in exits
    ])  # fmt: skip


def _positions(head: Linear, times: int = 1) -> int:
    """Positions of a chunk that holds `times` logits of each."""
    return max(1, CHUNK // (head.out_features * times))


def _at_least_fp32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
