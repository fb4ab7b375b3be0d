"""Mixtures of experts: which of their weights a pass reads.

Every token chooses its experts, so a pass over more tokens reads more of them: a verification costs more
plain steps than that of a dense model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from self_speculation.families import declared


def experts_per_token(config: PretrainedConfig) -> tuple[int, int] | None:
    """How many experts of a layer a token chooses, and of how many; None: the model is dense."""
    chosen = declared(config, "num_experts_per_tok")
    return None if chosen is None else (chosen, config.num_experts)


def bytes_read(modules: Iterable[nn.Module], config: PretrainedConfig) -> tuple[float, float]:
    """Bytes of weights that a pass over one token reads: of all in these modules, and of experts alone, whose
    weights transformers keeps as [experts, out, in].
    """
    chosen, of = experts_per_token(config) or (1, 1)
    weights = [
        (weight.dim(), weight.nbytes)
        for module in modules
        for weight in (*module.parameters(), *module.buffers())  # those in few bits are buffers
    ]
    expert_bytes = sum(size for dim, size in weights if dim == 3) * chosen / of
    return expert_bytes + sum(size for dim, size in weights if dim < 3), expert_bytes


def bytes_per_layer(model: PreTrainedModel) -> float:
    """Bytes of weights that a pass over one token reads, in a layer on average. All layers of a dense model
    are alike; to ask each for its weights takes a millisecond.
    """
    layers, config = model.base_model.layers, model.config
    asked = layers[:1] if experts_per_token(config) is None else layers
    return bytes_read(asked, config)[0] / len(asked)


def distinct_experts(chosen: int, of: int, num_tokens: float) -> float:
    """Expected number of experts of a layer that tokens choose, if they choose independently.

    >>> round(distinct_experts(2, 8, 4), 2)
    5.47
    """
    return of * (1.0 - (1.0 - chosen / of) ** num_tokens)


def with_experts(dense: Callable[[float], float], model: PreTrainedModel) -> Callable[[float], float]:
    """The cost of a pass over n tokens relative to one, from that of a dense model."""
    if (experts := experts_per_token(model.config)) is None:
        return dense
    all_read, expert_bytes = bytes_read(
        [*model.base_model.layers, model.get_output_embeddings()], model.config
    )
    share = expert_bytes / all_read

    def mixture(num_tokens: float) -> float:
        more = distinct_experts(*experts, num_tokens) / experts[0]  # each for 1 / more of the tokens
        return (1.0 - share) * dense(num_tokens) + share * more * dense(num_tokens / more)

    return mixture
