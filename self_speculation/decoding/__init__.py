"""Shared by all strategies: the batch, sequences, sampling and stop conditions."""
