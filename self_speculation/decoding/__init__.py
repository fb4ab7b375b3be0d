"""Shared by all strategies: the batch, its sequences, sampling and stop conditions."""
