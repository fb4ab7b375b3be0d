"""Folders, `.gguf` files and hub repositories to a model that is ready to decode.

Knows nothing of requests; nothing that decodes imports it.
"""
