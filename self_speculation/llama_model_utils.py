"""The functions of the paper's code base, for scripts that import them from here.

`docs/moving.md` says which have no counterpart, and what to use in their place. The decode loop calls
`ModelRunner.run` and `Sampler`.
"""

import math
from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor
from transformers import Cache, TopKLogitsWarper, TopPLogitsWarper

from self_speculation.backends.buffers import Pair
from self_speculation.backends.kv_cache import KVCache
from self_speculation.backends.runner import ForwardResult, ModelRunner
from self_speculation.config import LEAST_TEMPERATURE, check_kind

__all__ = [
    "ForwardResult",
    "crop_past_key_values",
    "decode_next_token",
    "forward",
    "forward_early",
    "forward_remainder",
    "top_k_top_p_filtering",
]

_PAGE = ", as docs/moving.md shows"

KeysAndValues: TypeAlias = KVCache | Cache | Sequence[Pair]


def forward(runner: ModelRunner, cache: KVCache, input_ids: Tensor, num_logits: int = 1) -> ForwardResult:
    """All layers over T new tokens [B, T]; logits for the last `num_logits` tokens."""
    return forward_early(runner, cache, input_ids, None, num_logits)


def forward_early(
    runner: ModelRunner, cache: KVCache, input_ids: Tensor, exit_layer: int | None, num_logits: int = 1
) -> ForwardResult:
    """Layers 0..exit_layer-1 (None: all) over T new tokens [B, T]; logits for the last `num_logits` tokens.

    Raises ValueError for a model, which the paper's functions take.
    """
    check_kind("runner", runner, ModelRunner, _PAGE)
    return runner.run(cache, input_ids, 0, exit_layer, num_logits)


def forward_remainder(
    runner: ModelRunner, cache: KVCache, exit_hidden: Tensor, exit_layer: int
) -> ForwardResult:
    """Layers exit_layer..L-1 over the exit hidden states [B, T, H] of T tokens; logits for all tokens."""
    check_kind("runner", runner, ModelRunner, _PAGE)
    return runner.run(cache, exit_hidden, exit_layer, num_logits=exit_hidden.shape[1])


def top_k_top_p_filtering(
    logits: Tensor,
    top_k: int = 0,
    top_p: float = 1.0,
    filter_value: float = -math.inf,
    min_tokens_to_keep: int = 1,
) -> Tensor:
    """Keep the `top_k` largest logits and, of those, the smallest set whose mass reaches `top_p`.

    Uses the filters of transformers.

    Args:
        logits: [..., V]; not changed.
        top_k: 0 keeps all.
        top_p: 1.0 keeps all.
        filter_value: replaces the other logits.
        min_tokens_to_keep: the least number of logits to keep.
    """
    rows = logits.reshape(-1, logits.shape[-1])
    if top_k > 0:
        rows = TopKLogitsWarper(top_k, filter_value, min_tokens_to_keep)(None, rows)
    if top_p < 1.0:
        rows = TopPLogitsWarper(top_p, filter_value, min_tokens_to_keep)(None, rows)
    return rows.reshape(logits.shape)


def decode_next_token(
    logits: Tensor,
    token_idx: int | None = None,
    sample: bool = False,
    temperature: float = 0.7,
    top_k: int = 50,
    top_p: float = 0.95,
) -> tuple[Tensor, Tensor | None]:
    """Sample the next token at one position, or at every position, by torch's generator.

    Args:
        logits: [B, T, V]; not changed.
        token_idx: the position; negative ones count from the end; None: all T positions.
        sample: False (or temperature 0) takes the most likely token.

    Returns:
        Greedy: tokens [B] of one position or [B, T] of all, and None. Sampled: tokens [B, 1] or [B, T], and
        their distributions [B, V] or [B * T, V].
    """
    if token_idx is not None:
        logits = logits[:, token_idx]
    if not sample or temperature < LEAST_TEMPERATURE:
        return logits.argmax(-1), None
    rows = logits.reshape(-1, logits.shape[-1]).float() / temperature
    probabilities = top_k_top_p_filtering(rows, top_k, top_p).softmax(-1)
    tokens = probabilities.multinomial(1)
    return tokens.view(logits.shape[:-1] if token_idx is None else (-1, 1)), probabilities


def crop_past_key_values(past_key_values: KeysAndValues, maximum_length: int) -> KeysAndValues:
    """Forget what a cache holds beyond `maximum_length` positions.

    Args:
        past_key_values: what `forward` here fills, or a cache of transformers: it is returned. Or keys and
            values of each layer, [B, kv_heads, T, head_dim], as in the paper's code: shorter views are.
    """
    if isinstance(past_key_values, KVCache):
        past_key_values.rollback([max(0, length - maximum_length) for length in past_key_values.lengths()])
        return past_key_values
    if isinstance(past_key_values, Cache):
        if (beyond := past_key_values.get_seq_length() - maximum_length) > 0:
            past_key_values.crop(-beyond)
        return past_key_values
    return tuple(
        (keys[:, :, :maximum_length], values[:, :, :maximum_length]) for keys, values in past_key_values
    )
