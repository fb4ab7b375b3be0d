"""Passes: ranges of a model's layers over a cache, by torch, by operators or captured; and copies that draft.

Knows nothing of tokens' meaning, requests, drafts' policy or files.
"""
