"""The names that scripts written for the paper's code base import from here; each lives where it belongs.

`docs/moving.md` says which have no counterpart, and what to use in their place.
"""

from collections.abc import Sequence
from typing import TypeAlias

from transformers import Cache

from self_speculation.decoding.sampling import decode_next_token, top_k_top_p_filtering
from self_speculation.passes.kv_cache import KVCache, Pair
from self_speculation.passes.model_runner import ForwardResult, forward, forward_early, forward_remainder

__all__ = [
    "ForwardResult",
    "crop_past_key_values",
    "decode_next_token",
    "forward",
    "forward_early",
    "forward_remainder",
    "top_k_top_p_filtering",
]

KeysAndValues: TypeAlias = KVCache | Cache | Sequence[Pair]


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
