"""The names that scripts written for the paper's code base import from here; each lives where it belongs.

`docs/moving.md` says which have no counterpart, and what to use in their place.
"""

from transformers import Cache

from self_speculation.decoding.sampling import decode_next_token, top_k_top_p_filtering
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


def crop_past_key_values(past_key_values: Cache, maximum_length: int) -> Cache:
    """Forget what a cache of transformers holds beyond `maximum_length` positions; returns the same cache."""
    if (beyond := past_key_values.get_seq_length() - maximum_length) > 0:
        past_key_values.crop(-beyond)
    return past_key_values
