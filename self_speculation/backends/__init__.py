"""Ranges of a model's layers over memory of keys and values, by torch, by operators of a CPU or by a card's
kernels; graphs, sampling, and copies that draft.

Knows nothing of tokens' meaning, requests, drafts' policy or files.
"""
