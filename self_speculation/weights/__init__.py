"""Formats of weights and products with them, down to the operators of a CPU.

Knows nothing of layers, caches, positions or files.
"""
