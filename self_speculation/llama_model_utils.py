"""The names that scripts written for the paper's code base import from here; each lives where it belongs."""

from self_speculation.decoding.sampling import decode_next_token, top_k_top_p_filtering
from self_speculation.model.decoder import ForwardResult, forward, forward_early, forward_remainder

__all__ = [
    "ForwardResult",
    "decode_next_token",
    "forward",
    "forward_early",
    "forward_remainder",
    "top_k_top_p_filtering",
]
